// What one call works on, the same for every instruction set.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace cc4s::potts {

using torch::headeronly::ScalarType;

enum class Relaxation {
  kBilinear,
  kQuadratic,
  kNormalizedQuadratic,
  kCollisionCrossEntropy,
  kCollisionDivergence,
  kLogQuadratic,
};
enum class Norm { kSum, kFrobenius, kNone };

// Sums over pairs run over differences (p - q)^2 instead of products p q.
inline bool by_differences(Relaxation relaxation) { return relaxation == Relaxation::kQuadratic; }

// A relaxation needs of each end alone: nothing, |p|^2, or sum p (1 - p).
enum class Own { kNothing, kSquare, kSpread };
inline Own own_of(Relaxation relaxation) {
  switch (relaxation) {
    case Relaxation::kNormalizedQuadratic:
    case Relaxation::kCollisionDivergence:
      return Own::kSquare;
    case Relaxation::kLogQuadratic:
      return Own::kSpread;
    default:
      return Own::kNothing;
  }
}

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

// Sums over pairs, each once: of w r, of w and of w^2.
struct Sums {
  double energy = 0, weight = 0, square = 0;

  void add(const Sums& other) {
    energy += other.energy;
    weight += other.weight;
    square += other.square;
  }
};

// d energy / d r = slope * w for each pair of an image; d energy / d w = slope * r - shift - shift_by_weight * w.
template <typename T>
struct Factors {
  T slope = 0, shift = 0, shift_by_weight = 0;
};

// Pairs of a grid: right, down, down-right, down-left.
constexpr int kDirections = 4;
constexpr int kDown[kDirections] = {0, 1, 1, 1}, kRight[kDirections] = {1, 0, 1, -1};

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

template <typename T>
struct GridProblem {
  Relaxation relaxation;
  int64_t batch, classes, height, width, directions, weight_batch;
  Array prob;    // [B, C, H, W]
  Array weight;  // [B or 1, D, H, W]
  std::vector<Strip> strips;
  std::vector<Sums> sums;  // [B, strips] out, forward
  // Backward only.
  std::vector<Factors<T>> factors;    // [B]
  void* prob_gradient = nullptr;      // [B, C, H, W] contiguous, in the dtype of prob; null: not needed
  void* weight_gradient = nullptr;    // [B or 1, D, H, W], as above

  // Images that are worked on one after the other: all that share a weight whose gradient is a sum over them.
  int64_t group() const { return weight_gradient != nullptr ? batch / weight_batch : 1; }
  int64_t tasks() const { return batch / group() * static_cast<int64_t>(strips.size()); }
};

template <typename T>
struct GraphProblem {
  Relaxation relaxation;
  int64_t batch, nodes, classes, edges;
  Array prob;                // [B, K, C]
  Array weight;              // [B, E]
  const int64_t* ends;       // [B, 2, E], nodes that exist
  int64_t end_strides[3];
  std::vector<Sums> sums;    // [B] out, forward
  // Backward only.
  std::vector<Factors<T>> factors;  // [B]
  void* prob_gradient = nullptr;    // [B, K, C] contiguous, in the dtype of prob; null: not needed
  void* weight_gradient = nullptr;  // [B, E], as above
};

}  // namespace cc4s::potts
