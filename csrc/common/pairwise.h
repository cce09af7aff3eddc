// Host side of the pairwise ops: dtypes, leading dimensions and masks of their tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "common/tile_support.h"

namespace cc4s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (..., N, d) as [batch, n, width].
struct Shape {
  std::vector<int64_t> leading;
  int64_t batch = 1, n = 0, width = 0;

  explicit Shape(const Tensor& x) : n(x.size(x.dim() - 2)), width(x.size(x.dim() - 1)) {
    for (int64_t i = 0; i + 2 < x.dim(); ++i) {
      leading.push_back(x.size(i));
      batch *= x.size(i);
    }
  }

  std::vector<int64_t> with(std::initializer_list<int64_t> last) const {
    std::vector<int64_t> sizes = leading;
    sizes.insert(sizes.end(), last);
    return sizes;
  }
};

inline Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype);
}

// Scores, sums and normalisers: double for double, else float.
inline ScalarType scalar_of(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// The valid positions of each image; all of them without a mask.
class Valid {
 public:
  Valid(const std::optional<Tensor>& mask, int64_t batch, int64_t n) : n_(n) {
    if (!mask.has_value()) return;
    const Tensor flat = torch::stable::contiguous(*mask);
    const bool* in = static_cast<const bool*>(flat.const_data_ptr());
    offsets_.push_back(0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < n; ++i) {
        if (in[b * n + i]) index_.push_back(static_cast<int32_t>(i));
      }
      offsets_.push_back(static_cast<int64_t>(index_.size()));
    }
  }

  bool masked() const { return !offsets_.empty(); }

  Positions operator[](int64_t b) const {
    if (!masked()) return {n_, nullptr};
    return {offsets_[b + 1] - offsets_[b], index_.data() + offsets_[b]};
  }

 private:
  int64_t n_;
  std::vector<int32_t> index_;
  std::vector<int64_t> offsets_;  // [batch + 1] if masked
};

// A contiguous [batch, n, width] array; `rows` views the valid rows of one image.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t n = 0, width = 0;

  Rows<T> rows(int64_t b, Positions at) const { return {data + b * n * width, width, at}; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
Matrix<T> matrix(const Tensor& x) {
  const Shape shape(x);
  if constexpr (std::is_const_v<T>) {
    return {static_cast<T*>(x.const_data_ptr()), shape.n, shape.width};
  } else {
    return {static_cast<T*>(x.mutable_data_ptr()), shape.n, shape.width};
  }
}

// Runs body(i) for i in [0, count) on the threads of torch, each with its own State.
template <class State, class Body>
void for_each(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    State state;
    for (int64_t i = begin; i < end; ++i) body(state, i);
  });
}

}  // namespace cc4s
