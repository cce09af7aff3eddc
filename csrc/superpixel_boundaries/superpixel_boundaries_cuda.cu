// superpixel_boundaries on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/cuda_launch.h"
#include "superpixel_boundaries/superpixel_boundaries_launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ids [B, H, W] int16, int32 or int64, any strides -> bool [B, H, W].
Tensor boundaries(const Tensor& ids) {
  STD_TORCH_CHECK(ids.dim() == 3, "superpixels: expected (B, H, W)");
  const int64_t batch = ids.size(0), height = ids.size(1), width = ids.size(2);
  STD_TORCH_CHECK(height * width < (int64_t{1} << 31), "superpixels: expected fewer than 2^31 pixels");
  Tensor out = torch::stable::new_empty(ids, {batch, height, width}, ScalarType::Bool);
  if (ids.numel() == 0) return out;
  STD_TORCH_CHECK(batch * ((height * width - 1) / superpixel_boundaries::kThreads + 1) < (int64_t{1} << 31),
                  "superpixels: too many maps");
  const StreamLauncher launch(ids);
  const auto run = [&](auto id) {
    superpixel_boundaries::run(launch, static_cast<const decltype(id)*>(ids.const_data_ptr()), strides_of(ids), batch,
                               static_cast<int>(height), static_cast<int>(width),
                               static_cast<unsigned char*>(out.mutable_data_ptr()));
  };
  switch (ids.scalar_type()) {
    case ScalarType::Short:
      run(short{});
      break;
    case ScalarType::Int:
      run(int{});
      break;
    case ScalarType::Long:
      run(0LL);
      break;
    default:
      STD_TORCH_CHECK(false, "superpixels: expected int16, int32 or int64");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) { m.impl("superpixel_boundaries", TORCH_BOX(&boundaries)); }
