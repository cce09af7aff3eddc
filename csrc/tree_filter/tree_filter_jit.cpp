// The host part of tree_filter for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "tree_filter/tree_filter_cuda.cu"

CC4S_JIT_OP(tree_filter)
