// The kernels of superpixel_boundaries on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "superpixel_boundaries/superpixel_boundaries.cuh"

namespace superpixel_boundaries {

// ids [B, H, W] with strides, out [B, H, W] contiguous; none of the sizes is 0.
template <class Id, class Launch>
void run(Launch&& launch, const Id* ids, Strides strides, long long batch, int height, int width, unsigned char* out) {
  const long long pixels = static_cast<long long>(height) * width;
  const unsigned blocks = static_cast<unsigned>((pixels + kThreads - 1) / kThreads);
  launch(dim3(static_cast<unsigned>(batch * blocks)), dim3(kThreads), mark<Id>, ids, strides, height, width, blocks,
         out);
}

}  // namespace superpixel_boundaries
