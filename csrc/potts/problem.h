// What one call works on, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "common/image_rows.h"

namespace cc4s::potts {

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
