// The host part of slic for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "slic/slic_cuda.cu"

CC4S_JIT_OP(slic)
