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

inline std::optional<Tensor> contiguous_as(const std::optional<Tensor>& x, ScalarType dtype) {
  if (!x.has_value()) return std::nullopt;
  return contiguous_as(*x, dtype);
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

// dQ of a backward pass whose tasks are groups of key tiles: one sum for each group, added up in order at the end.
// The number of groups depends on the shapes only, not on the threads, and bounds the memory.
template <class S>
class GroupSums {
 public:
  // width: columns of a sum; key_tile, row_tile: positions in a tile of keys and of queries.
  GroupSums(const Valid& valid, int64_t batch, int64_t n, int64_t width, int64_t key_tile, int64_t row_tile)
      : valid_(valid),
        batch_(batch),
        width_(width),
        key_tile_(key_tile),
        rows_(round_up(n, row_tile)),
        groups_(std::clamp<int64_t>(kBudget / std::max<int64_t>(1, batch * rows_ * width * int64_t{sizeof(S)}), 1,
                                    std::max<int64_t>(1, tiles(n)))),
        data_(batch * groups_ * rows_ * width) {}

  int64_t tasks() const { return batch_ * groups_; }
  int64_t batch_of(int64_t task) const { return task / groups_; }
  S* sum(int64_t task) const { return data_ + task * rows_ * width_; }

  // Calls body(first position, count, whether it is the first tile of the task) for each key tile of a task.
  template <class Body>
  void for_each_tile(int64_t task, const Body& body) const {
    const int64_t count = valid_[batch_of(task)].count, used = groups_of(count), group = task % groups_;
    if (group >= used) return;
    const int64_t begin = group * tiles(count) / used, end = (group + 1) * tiles(count) / used;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * key_tile_;
      body(first, std::min(key_tile_, count - first), tile == begin);
    }
  }

  // out = scale * the sum over groups.
  template <class E>
  void write(const Matrix<E>& out, S scale) const {
    constexpr int64_t kRows = 64;
    const int64_t blocks = (out.n + kRows - 1) / kRows;
    struct State {
      std::vector<S> row;
    };
    for_each<State>(batch_ * blocks, [&](State& state, int64_t task) {
      const int64_t b = task / blocks, begin = task % blocks * kRows;
      const Positions at = valid_[b];
      const int64_t used = groups_of(at.count);
      state.row.resize(static_cast<size_t>(width_));
      for (int64_t r = begin; r < std::min(begin + kRows, at.count); ++r) {
        std::fill(state.row.begin(), state.row.end(), S{0});
        for (int64_t g = 0; g < used; ++g) {
          const S* part = sum(b * groups_ + g) + r * width_;
          for (int64_t c = 0; c < out.width; ++c) state.row[c] += part[c];
        }
        E* to = out.rows(b, at)[r];
        for (int64_t c = 0; c < out.width; ++c) to[c] = narrow_to<E>(scale * state.row[c]);
      }
    });
  }

 private:
  static constexpr int64_t kBudget = int64_t{24} << 20;  // bytes

  int64_t tiles(int64_t count) const { return (count + key_tile_ - 1) / key_tile_; }
  int64_t groups_of(int64_t count) const { return std::min(groups_, tiles(count)); }

  const Valid& valid_;
  int64_t batch_, width_, key_tile_, rows_, groups_;
  Buffer<S> data_;
};

// Calls body with a value of the element type that stands for `dtype`.
template <class Body>
void with_element(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Double) return body(double{});
  if (dtype == ScalarType::BFloat16) return body(Half{});
  body(float{});
}

// The dtype that tensors are read and written in: bfloat16 as it is, else that of the scores.
inline ScalarType element_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? dtype : scalar_of(dtype);
}

inline Tensor cast_to(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace cc4s
