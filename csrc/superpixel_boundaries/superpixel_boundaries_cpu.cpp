// Pixels that touch another superpixel; docs/kernels/superpixel_boundaries.md has the rule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "common/target_clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One row of ids with the rows above and below; at the edges of the image these are the row itself.
template <typename Id>
__attribute__((always_inline)) inline void mark_row(const Id* __restrict row, const Id* __restrict above,
                                                    const Id* __restrict below, int64_t width,
                                                    uint8_t* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] = static_cast<uint8_t>((row[x] >= 0) & ((row[x] != above[x]) | (row[x] != below[x])));
  }
  for (int64_t x = 1; x < width; ++x) {
    out[x] = static_cast<uint8_t>(out[x] | ((row[x] >= 0) & (row[x] != row[x - 1])));
  }
  for (int64_t x = 0; x + 1 < width; ++x) {
    out[x] = static_cast<uint8_t>(out[x] | ((row[x] >= 0) & (row[x] != row[x + 1])));
  }
}

CC4S_TARGET_CLONES
void mark(const int16_t* row, const int16_t* above, const int16_t* below, int64_t width, uint8_t* out) {
  mark_row(row, above, below, width, out);
}
CC4S_TARGET_CLONES
void mark(const int32_t* row, const int32_t* above, const int32_t* below, int64_t width, uint8_t* out) {
  mark_row(row, above, below, width, out);
}
CC4S_TARGET_CLONES
void mark(const int64_t* row, const int64_t* above, const int64_t* below, int64_t width, uint8_t* out) {
  mark_row(row, above, below, width, out);
}

template <typename Id>
void boundaries(const Tensor& ids, uint8_t* out) {
  const int64_t height = ids.size(1), width = ids.size(2), step = ids.stride(2);
  const Id* data = static_cast<const Id*>(ids.const_data_ptr());
  torch::stable::parallel_for(0, ids.size(0) * height, 64, [&](int64_t begin, int64_t end) {
    std::vector<Id> copies[3];
    const auto row_of = [&](int64_t b, int64_t y) {
      const Id* row = data + b * ids.stride(0) + y * ids.stride(1);
      if (step == 1) return row;
      std::vector<Id>& copy = copies[y % 3];
      copy.resize(static_cast<size_t>(width));
      for (int64_t x = 0; x < width; ++x) copy[x] = row[x * step];
      return static_cast<const Id*>(copy.data());
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      mark(row_of(b, y), row_of(b, y > 0 ? y - 1 : y), row_of(b, y + 1 < height ? y + 1 : y), width, out + i * width);
    }
  });
}

// ids [B, H, W] int16, int32 or int64, any strides -> bool [B, H, W].
Tensor superpixel_boundaries(const Tensor& ids) {
  STD_TORCH_CHECK(ids.dim() == 3, "superpixels: expected (B, H, W)");
  Tensor out = torch::stable::empty({ids.size(0), ids.size(1), ids.size(2)}, ScalarType::Bool);
  if (ids.numel() == 0) return out;
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  switch (ids.scalar_type()) {
    case ScalarType::Short:
      boundaries<int16_t>(ids, to);
      break;
    case ScalarType::Int:
      boundaries<int32_t>(ids, to);
      break;
    case ScalarType::Long:
      boundaries<int64_t>(ids, to);
      break;
    default:
      STD_TORCH_CHECK(false, "superpixels: expected int16, int32 or int64");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) { m.impl("superpixel_boundaries", TORCH_BOX(&superpixel_boundaries)); }
