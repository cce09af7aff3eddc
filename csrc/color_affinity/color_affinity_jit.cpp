// The host part of color_affinity for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "color_affinity/color_affinity_cuda.cu"

CC4S_JIT_OP(color_affinity)
