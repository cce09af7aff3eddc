// SLIC superpixels on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "common/cuda_launch.h"
#include "slic/slic_launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// image [B, 3, H, W] uint8, mask [B, H, W] bool -> ids [B, H, W] int32. compactness: in 1/256.
Tensor segment(const Tensor& image, const std::optional<Tensor>& mask, int64_t num_segments, int64_t compactness,
               int64_t iterations) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.scalar_type() == ScalarType::Byte,
                  "image: expected uint8 (B, 3, H, W)");
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  STD_TORCH_CHECK(num_segments >= 1 && num_segments < (int64_t{1} << 31), "num_segments: expected 1 to 2^31 - 1");
  STD_TORCH_CHECK(compactness >= 0 && compactness <= 100 * 256, "compactness: expected 0 to 100 in 1/256");
  STD_TORCH_CHECK(std::max(height, width) <= (int64_t{1} << 20) && height * width < (int64_t{1} << 31),
                  "image: expected sides up to 2^20 and fewer than 2^31 pixels");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 3 && mask->scalar_type() == ScalarType::Bool && mask->size(0) == batch &&
                        mask->size(1) == height && mask->size(2) == width &&
                        mask->get_device_index() == image.get_device_index(),
                    "mask: expected bool (B, H, W) of the image, on its device");
  }
  Tensor labels = torch::stable::new_empty(image, {batch, height, width}, ScalarType::Int);
  if (labels.numel() == 0) return labels;

  const slic::Problem problem = slic::problem_of(batch, height, width, num_segments, compactness);
  STD_TORCH_CHECK(slic::blocks_of(problem) < (int64_t{1} << 31), "image: too many pixels in all");
  const StreamLauncher launch(image);
  const Tensor memory = torch::stable::new_empty(image, {slic::layout_of(problem, nullptr).bytes}, ScalarType::Byte);
  const slic::Layout layout = slic::layout_of(problem, static_cast<char*>(memory.mutable_data_ptr()));
  slic::run(launch, problem, layout.scratch, static_cast<const unsigned char*>(image.const_data_ptr()),
            strides_of(image), mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
            mask.has_value() ? strides_of(*mask) : Strides{}, iterations, static_cast<int*>(labels.mutable_data_ptr()));
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) { m.impl("slic", TORCH_BOX(&segment)); }
