// The host part of superpixel_boundaries for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "superpixel_boundaries/superpixel_boundaries_cuda.cu"

CC4S_JIT_OP(superpixel_boundaries)
