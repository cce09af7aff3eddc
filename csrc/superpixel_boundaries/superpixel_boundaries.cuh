// Pixels that touch another superpixel, device code; docs/kernels/superpixel_boundaries.md has the rule.
#pragma once

#include "common/strides.cuh"

namespace superpixel_boundaries {

constexpr int kThreads = 256;

// ids: [B, H, W], fewer than 2^31 pixels in each map. out: [B, H, W], 1 where a 4-neighbour has another id.
// One thread for a pixel; the threads of a warp read neighbours in a row, so that the four others come from the cache.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    mark(const Id* __restrict__ ids, Strides strides, int height, int width, unsigned blocks_per_map,
         unsigned char* __restrict__ out) {
  const long long b = blockIdx.x / blocks_per_map;
  const unsigned pixels = static_cast<unsigned>(height) * static_cast<unsigned>(width);
  const unsigned pixel = blockIdx.x % blocks_per_map * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const int y = static_cast<int>(pixel / static_cast<unsigned>(width));
  const int x = static_cast<int>(pixel % static_cast<unsigned>(width));
  const Id* here = ids + strides.at(b, y, x);
  const Id id = *here;
  bool other = false;
  if (x > 0) other |= here[-strides.column] != id;
  if (x + 1 < width) other |= here[strides.column] != id;
  if (y > 0) other |= here[-strides.row] != id;
  if (y + 1 < height) other |= here[strides.row] != id;
  out[b * pixels + pixel] = id >= 0 && other;
}

}  // namespace superpixel_boundaries
