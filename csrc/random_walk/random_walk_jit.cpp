// The host part of random_walk for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "random_walk/random_walk_cuda.cu"

CC4S_JIT_OP(random_walk)
