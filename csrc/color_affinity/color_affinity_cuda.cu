// color_affinity on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "color_affinity/color_affinity_launch.h"
#include "common/cuda_launch.h"

namespace {

using color_affinity::Maps;
using color_affinity::Scratch;
using color_affinity::Sizes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Sizes sizes_of(const Tensor& image, const Tensor& superpixels, int64_t nodes, int64_t places) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.scalar_type() == ScalarType::Byte,
                  "image: expected uint8 (B, 3, H, W)");
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  STD_TORCH_CHECK(height > 0 && width > 0 && height * width < (int64_t{1} << 30),
                  "image: expected fewer than 2^30 pixels, and at least one");
  const ScalarType type = superpixels.scalar_type();
  STD_TORCH_CHECK(superpixels.dim() == 3 && superpixels.size(0) == batch && superpixels.size(1) == height &&
                      superpixels.size(2) == width && (type == ScalarType::Int || type == ScalarType::Long) &&
                      superpixels.get_device_index() == image.get_device_index(),
                  "superpixels: expected int32 or int64 (B, H, W) of the image");
  STD_TORCH_CHECK(nodes >= 1 && nodes < (int64_t{1} << 30), "num_superpixels: expected 1 to 2^30 - 1");
  STD_TORCH_CHECK(places >= 0, "max_edges: expected at least 0");
  // Grids have up to 2^31 - 1 blocks: a tile, eight nodes or eight places each.
  const int64_t most = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(batch * ((height + 31) / 32) * ((width + 31) / 32) <= most && batch * nodes <= most &&
                      batch * (places / color_affinity::kWarps + 1) <= most,
                  "image: too many images");
  return {batch, static_cast<int>(height), static_cast<int>(width), static_cast<int>(nodes), places};
}

Tensor scratch_for(const Tensor& image, const Sizes& sizes) {
  return torch::stable::new_empty(image, {Scratch::bytes(sizes)}, ScalarType::Byte);
}

// Calls body(maps) with the type of the ids.
template <class Body>
void with_maps(const Tensor& image, const Tensor& superpixels, const Sizes& sizes, Body body) {
  const auto maps = [&](auto id) {
    using Id = decltype(id);
    body(Maps<Id>{image.const_data_ptr<uint8_t>(), strides_of(image),
                  static_cast<const Id*>(superpixels.const_data_ptr()), strides_of(superpixels), sizes.height,
                  sizes.width, sizes.nodes});
  };
  if (superpixels.scalar_type() == ScalarType::Int) {
    maps(int{});
  } else {
    maps(0LL);
  }
}

long long* integers(Tensor& tensor) { return static_cast<long long*>(tensor.mutable_data_ptr()); }

// image [B, 3, H, W] uint8, superpixels [B, H, W] -> edge_index [B, 2, E] int64, weight [B, E] float32,
// num_edges [B] int64, counts [B, K] int64.
std::tuple<Tensor, Tensor, Tensor, Tensor> affinity(const Tensor& image, const Tensor& superpixels,
                                                    int64_t num_superpixels, int64_t max_edges) {
  const Sizes sizes = sizes_of(image, superpixels, num_superpixels, max_edges);
  Tensor edge_index = torch::stable::new_empty(image, {sizes.batch, 2, max_edges}, ScalarType::Long);
  Tensor weight = torch::stable::new_empty(image, {sizes.batch, max_edges}, ScalarType::Float);
  Tensor num_edges = torch::stable::new_empty(image, {sizes.batch}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(image, {sizes.batch, num_superpixels}, ScalarType::Long);
  if (sizes.batch == 0) return {edge_index, weight, num_edges, counts};
  const StreamLauncher launch(image);
  Tensor memory = scratch_for(image, sizes);
  const Scratch scratch(static_cast<char*>(memory.mutable_data_ptr()), sizes);
  with_maps(image, superpixels, sizes, [&](const auto& maps) {
    color_affinity::run(launch, maps, sizes, scratch, integers(edge_index), weight.mutable_data_ptr<float>(),
                        integers(num_edges), integers(counts));
  });
  return {edge_index, weight, num_edges, counts};
}

// The integers alone: color [B, K, 75], texture [B, K, 20], counts [B, K], all int64.
std::tuple<Tensor, Tensor, Tensor> histograms(const Tensor& image, const Tensor& superpixels,
                                              int64_t num_superpixels) {
  const Sizes sizes = sizes_of(image, superpixels, num_superpixels, 0);
  Tensor color = torch::stable::new_empty(image, {sizes.batch, num_superpixels, color_affinity::kColors},
                                          ScalarType::Long);
  Tensor texture = torch::stable::new_empty(image, {sizes.batch, num_superpixels, color_affinity::kTextures},
                                            ScalarType::Long);
  Tensor counts = torch::stable::new_empty(image, {sizes.batch, num_superpixels}, ScalarType::Long);
  if (sizes.batch == 0) return {color, texture, counts};
  const StreamLauncher launch(image);
  Tensor memory = scratch_for(image, sizes);
  const Scratch scratch(static_cast<char*>(memory.mutable_data_ptr()), sizes);
  with_maps(image, superpixels, sizes, [&](const auto& maps) {
    color_affinity::run_histograms(launch, maps, sizes, scratch, integers(color), integers(texture), integers(counts));
  });
  return {color, texture, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) {
  m.impl("color_affinity", TORCH_BOX(&affinity));
  m.impl("color_histograms", TORCH_BOX(&histograms));
}
