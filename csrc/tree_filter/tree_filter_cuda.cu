// tree_filter on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <tuple>

#include "common/cuda_launch.h"
#include "tree_filter/tree_filter_launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using tree_filter::Cutter;
using tree_filter::Planes;
using tree_filter::Problem;
using tree_filter::Rows;

Rows rows_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1)}; }
Planes planes_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

const long long* integers(const Tensor& tensor) { return static_cast<const long long*>(tensor.const_data_ptr()); }
long long* integers_out(Tensor& tensor) { return static_cast<long long*>(tensor.mutable_data_ptr()); }

bool is_wide(const Tensor& tensor, const char* message) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, message);
  return type == ScalarType::Double;
}

// Calls body(T{}) with the type of a tensor.
template <class Body>
void with_type(bool wide, Body body) {
  if (wide) {
    body(double{});
  } else {
    body(float{});
  }
}

void check_size(const Problem& problem) {
  STD_TORCH_CHECK(tree_filter::blocks_of(problem) < (int64_t{1} << 31), "values: too many pixels in all");
}

// weight [B, E] -> order, parent, edge [B, H W] int64.
std::tuple<Tensor, Tensor, Tensor> trees(const Tensor& weight, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height * width < (int64_t{1} << 30), "expected 1 to 2^30 - 1 pixels");
  const char* const message = "weight: expected float32 or float64 (B, E)";
  const bool wide = is_wide(weight, message);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == height * (width - 1) + (height - 1) * width, message);
  const int64_t batch = weight.size(0);
  Tensor order = torch::stable::new_empty(weight, {batch, height * width}, ScalarType::Long);
  Tensor parent = torch::stable::new_empty(weight, {batch, height * width}, ScalarType::Long);
  Tensor edge = torch::stable::new_empty(weight, {batch, height * width}, ScalarType::Long);
  if (batch == 0) return {order, parent, edge};
  const Problem problem = tree_filter::problem_of(batch, height, width, 0);
  check_size(problem);
  const StreamLauncher launch(weight);
  Cutter size(nullptr);
  tree_filter::forest_of(problem, wide, size);
  Tensor memory = torch::stable::new_empty(weight, {size.bytes()}, ScalarType::Byte);
  Cutter cutter(static_cast<char*>(memory.mutable_data_ptr()));
  const tree_filter::Forest forest = tree_filter::forest_of(problem, wide, cutter);
  with_type(wide, [&](auto type) {
    tree_filter::grow_trees(launch, problem, forest, weight.const_data_ptr<decltype(type)>(), rows_of(weight),
                            integers_out(order), integers_out(parent), integers_out(edge));
  });
  return {order, parent, edge};
}

Problem check(const Tensor& values, const Tensor& decay, const Tensor& order, const Tensor& parent) {
  is_wide(values, "values: expected float32 or float64 (B, C, N)");
  STD_TORCH_CHECK(values.dim() == 3 && values.size(2) >= 1 && values.size(2) < (int64_t{1} << 30),
                  "values: expected (B, C, N) with 1 to 2^30 - 1 pixels");
  STD_TORCH_CHECK(values.size(1) < (int64_t{1} << 30), "values: expected fewer than 2^30 channels");
  for (const Tensor* t : std::initializer_list<const Tensor*>{&decay, &order, &parent}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == values.size(0) && t->size(1) == values.size(2) &&
                        t->get_device_index() == values.get_device_index(),
                    "tree: expected (B, N) on the device of values");
    STD_TORCH_CHECK(t->scalar_type() == (t == &decay ? values.scalar_type() : ScalarType::Long), "tree: a wrong dtype");
  }
  const Problem problem = tree_filter::problem_of(values.size(0), 1, values.size(2), values.size(1));
  check_size(problem);
  return problem;
}

// Calls body(launch, T{}, fields) with scratch.
template <class Body>
void with_fields(const Tensor& values, const Tensor& decay, const Problem& problem, bool backward, Body body) {
  const StreamLauncher launch(values);
  with_type(values.scalar_type() == ScalarType::Double, [&](auto type) {
    const auto* const from = decay.const_data_ptr<decltype(type)>();
    Cutter size(nullptr);
    tree_filter::fields_of(problem, from, rows_of(decay), backward, size);
    Tensor memory = torch::stable::new_empty(values, {size.bytes()}, ScalarType::Byte);
    Cutter cutter(static_cast<char*>(memory.mutable_data_ptr()));
    body(launch, type, tree_filter::fields_of(problem, from, rows_of(decay), backward, cutter));
  });
}

// values [B, C, N], decay [B, N] to the parent of each place, order and parent [B, N] of `trees` -> [B, C, N].
Tensor filtered(const Tensor& values, const Tensor& decay, const Tensor& order, const Tensor& parent) {
  const Problem problem = check(values, decay, order, parent);
  Tensor out = torch::stable::new_empty(values, {values.size(0), values.size(1), values.size(2)});
  if (out.numel() == 0) return out;
  with_fields(values, decay, problem, false, [&](const auto& launch, auto type, const auto& fields) {
    using T = decltype(type);
    tree_filter::filter(launch, problem, fields, integers(order), rows_of(order), integers(parent), rows_of(parent),
                        values.const_data_ptr<T>(), planes_of(values), out.mutable_data_ptr<T>());
  });
  return out;
}

// gradient [B, C, N] -> gradients of values and decay.
std::tuple<Tensor, Tensor> filtered_backward(const Tensor& gradient, const Tensor& values, const Tensor& decay,
                                             const Tensor& order, const Tensor& parent) {
  const Problem problem = check(values, decay, order, parent);
  STD_TORCH_CHECK(gradient.dim() == 3 && gradient.size(0) == values.size(0) && gradient.size(1) == values.size(1) &&
                      gradient.size(2) == values.size(2) && gradient.scalar_type() == values.scalar_type() &&
                      gradient.get_device_index() == values.get_device_index(),
                  "gradient: expected the shape, dtype and device of values");
  Tensor values_gradient = torch::stable::new_empty(values, {values.size(0), values.size(1), values.size(2)});
  Tensor decay_gradient = torch::stable::new_empty(values, {values.size(0), values.size(2)});
  if (values.size(0) == 0) return {values_gradient, decay_gradient};
  with_fields(values, decay, problem, true, [&](const auto& launch, auto type, const auto& fields) {
    using T = decltype(type);
    tree_filter::filter_backward(launch, problem, fields, integers(order), rows_of(order), integers(parent),
                                 rows_of(parent), values.const_data_ptr<T>(), planes_of(values),
                                 gradient.const_data_ptr<T>(), planes_of(gradient),
                                 values_gradient.mutable_data_ptr<T>(), decay_gradient.mutable_data_ptr<T>());
  });
  return {values_gradient, decay_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) {
  m.impl("tree_filter_trees", TORCH_BOX(&trees));
  m.impl("tree_filter", TORCH_BOX(&filtered));
  m.impl("tree_filter_backward", TORCH_BOX(&filtered_backward));
}
