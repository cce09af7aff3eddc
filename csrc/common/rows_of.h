// Tensors as the arguments of the pairwise CUDA kernels; for launchers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>

#include "common/mma_sm80.cuh"
#include "common/rows.cuh"

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if (std::is_same_v<T, mma_sm80::BFloat16>) return ScalarType::BFloat16;
  if (std::is_same_v<T, mma_sm80::Half>) return ScalarType::Half;
  return std::is_same_v<T, bool> ? ScalarType::Bool : ScalarType::Float;
}

// Calls body with a value of the type of a half-precision tensor.
template <class Body>
void with_half_type(const torch::stable::Tensor& tensor, Body body) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16) {
    body(mma_sm80::BFloat16{});
  } else {
    body(mma_sm80::Half{});
  }
}

// x [B, N, width], of the B, N and device of `like`, in the dtype T, with rows as `Rows` has them.
template <class T>
Rows<T> rows_of(const torch::stable::Tensor& x, const torch::stable::Tensor& like, const char* name) {
  const auto at = reinterpret_cast<T*>(const_cast<void*>(static_cast<const void*>(x.const_data_ptr())));
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                      x.scalar_type() == scalar_type_of<std::remove_const_t<T>>() &&
                      x.get_device_index() == like.get_device_index(),
                  name, ": expected (B, N, width) of one dtype and device");
  STD_TORCH_CHECK(x.stride(2) == 1 && x.size(2) % 8 == 0 && x.size(2) > 0 && x.size(2) <= 1024 &&
                      x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && reinterpret_cast<uintptr_t>(at) % 16 == 0,
                  name, ": expected rows at multiples of 16 bytes, of 8 to 1024 columns");
  return {at, x.stride(0), x.stride(1), static_cast<int>(x.size(2))};
}

// x [B, N], contiguous, of the B, N and device of `like` [B, N, width].
template <class T>
T* values_of(const torch::stable::Tensor& x, const torch::stable::Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.is_contiguous() &&
                      x.scalar_type() == scalar_type_of<T>() && x.get_device_index() == like.get_device_index(),
                  name, ": expected contiguous (B, N)");
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(x.const_data_ptr())));
}
// The same or null.
template <class T>
T* values_of(const std::optional<torch::stable::Tensor>& x, const torch::stable::Tensor& like, const char* name) {
  return x.has_value() ? values_of<T>(*x, like, name) : nullptr;
}
