// Tensors of any floating dtype and strides, and the strips of rows into which the CPU kernels cut an image.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace cc4s {

using torch::headeronly::ScalarType;

// A tensor of any floating dtype and strides.
struct Array {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t strides[4] = {};
};

// Calls function(pointer) with the type of the elements behind `data`.
template <typename Void, typename F>
inline void with_type(Void* data, ScalarType dtype, F function) {
  const auto call = [&](auto zero) {
    using E = decltype(zero);
    if constexpr (std::is_const_v<Void>) {
      function(static_cast<const E*>(data));
    } else {
      function(static_cast<E*>(data));
    }
  };
  switch (dtype) {
    case ScalarType::Double:
      return call(double{});
    case ScalarType::Float:
      return call(float{});
    case ScalarType::Half:
      return call(c10::Half{});
    default:
      return call(c10::BFloat16{});
  }
}

inline bool is_floating(const torch::stable::Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline Array array_of(const torch::stable::Tensor& tensor) {
  Array array{tensor.const_data_ptr(), tensor.scalar_type(), {}};
  for (int64_t i = 0; i < tensor.dim(); ++i) array.strides[i] = tensor.stride(i);
  return array;
}

template <typename T>
constexpr ScalarType scalar_type() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

// Consecutive rows: the unit of work. The cut depends on the height only, so that sums are the same for every number
// of threads.
struct Strip {
  int64_t begin, end;
};

constexpr int64_t kStrips = 32, kStripRows = 8;

inline std::vector<Strip> strips_of(int64_t height) {
  const int64_t rows = std::max(kStripRows, (height + kStrips - 1) / kStrips);
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < height; begin += rows) strips.push_back({begin, std::min(begin + rows, height)});
  return strips;
}

}  // namespace cc4s
