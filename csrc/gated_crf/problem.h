// What one call works on, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "common/image_rows.h"
#include "common/strides.cuh"

namespace cc4s::gated_crf {

// [B, H, W]; null: open everywhere.
struct Gate {
  const bool* data = nullptr;
  Strides strides{};
};

template <typename T>
struct Problem {
  int64_t batch, classes, channels, height, width, radius;
  T falloff;    // 1 / (2 sigma_xy^2)
  Array prob;   // [B, C, H, W]
  Array color;  // [B, channels, H, W], divided by sigma_rgb
  Gate source, destination;
  std::vector<Strip> strips;
  std::vector<double> sums;  // [B, strips] out, forward
  // Backward only.
  std::vector<T> factors;    // [B] gradient of the sums
  void* gradient = nullptr;  // [B, C, H, W] contiguous, in the dtype of prob

  int64_t tasks() const { return batch * static_cast<int64_t>(strips.size()); }
};

}  // namespace cc4s::gated_crf
