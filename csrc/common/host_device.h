// Functions and tables for the CPU and for CUDA device code.
#pragma once

#ifdef __CUDACC__
#define CC4S_HOST_DEVICE __host__ __device__
#define CC4S_TABLE __device__ const
#else
#define CC4S_HOST_DEVICE
#define CC4S_TABLE constexpr
#endif
