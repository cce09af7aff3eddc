// Lanes and warps of one-dimensional blocks; device code, free of torch and std headers.
#pragma once

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// The sum of `value` over the lanes up to this one. For a whole warp.
__device__ __forceinline__ int sum_up_to_lane(int value) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane_index() >= step) value += other;
  }
  return value;
}
