// The host part of transition_consistency for kernels that NVRTC compiles at run time.
#include "common/jit_launch.h"

#include "transition_consistency/transition_consistency_cuda.cu"

CC4S_JIT_OP(transition_consistency)
