// bilateral_filter on the CPU in O(N) memory; its own gradient. See docs/kernels/bilateral_filter.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bilateral_filter/bilateral_filter.h"

#define CC4S_TILE_CODE "bilateral_filter/bilateral_filter_tiles.h"
#include "common/foreach_isa.h"

namespace {

using namespace cc4s;

template <class S>
void run(const BilateralFilter<S>& in) {
  CC4S_FOR_CURRENT_ISA(S, bilateral_filter_image, in);
}

// values [B, C, H, W], levels [B, 3, H, W] -> [B, C, H, W].
Tensor bilateral_filter(const Tensor& values_in, const Tensor& levels_in, const std::optional<Tensor>& mask_in,
                        double sigma_xy, double sigma_rgb, bool include_self) {
  const ScalarType dtype = scalar_of(values_in.scalar_type());
  const Tensor values = contiguous_as(values_in, dtype), levels = contiguous_as(levels_in, dtype);
  const std::optional<Tensor> mask = contiguous_as(mask_in, ScalarType::Bool);
  const int64_t batch = values.size(0), channels = values.size(1), height = values.size(2), width = values.size(3);
  const int64_t pixels = height * width;
  Tensor out = new_tensor({batch, channels, height, width}, dtype);
  if (mask.has_value()) torch::stable::zero_(out);
  if (out.numel() == 0) return cast_to(out, values_in.scalar_type());
  std::optional<Patches> patches;
  for (int64_t b = 0; b < batch; ++b) {
    if (mask.has_value() || b == 0) {
      patches.emplace(mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) + b * pixels : nullptr, height,
                      width);
    }
    const auto run_as = [&](auto tag) {
      using S = decltype(tag);
      run<S>({&*patches, pixels, width, channels, static_cast<const S*>(values.const_data_ptr()) + b * channels * pixels,
              static_cast<const S*>(levels.const_data_ptr()) + b * 3 * pixels,
              static_cast<S>(-0.5 / (sigma_xy * sigma_xy)), static_cast<S>(-0.5 / (sigma_rgb * sigma_rgb)), include_self,
              static_cast<S*>(out.mutable_data_ptr()) + b * channels * pixels});
    };
    if (dtype == ScalarType::Double) {
      run_as(double{});
    } else {
      run_as(float{});
    }
  }
  return cast_to(out, values_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) { m.impl("bilateral_filter", TORCH_BOX(&bilateral_filter)); }
