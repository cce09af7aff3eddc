// Arguments of the tile code of `random_walk`. E: dtype of the tensors, S: of scores and sums.
#pragma once

#include "common/pairwise.h"

namespace cc4s {

template <class E, class S>
struct WalkInput {
  int64_t batch, n;
  Matrix<const E> q, k;  // [B, N, d]
  const Valid* valid;
  S scale;
  S move;  // 1 - restart
};

// One step: y = move P x + (1 - move) start.
template <class E, class S>
struct WalkStep {
  Matrix<const E> x, start;  // [B, N, D]
  Matrix<E> y;               // [B, N, D]
  S* lse;                    // [B, N]
};

// Gradients of all steps, from the last one back.
template <class E, class S>
struct WalkBackward {
  std::vector<Matrix<const E>> states;  // Y_0, ..., Y_steps, [B, N, D]
  const S* lse;                         // [B, N]
  Matrix<const E> grad_y;               // [B, N, D] or null
  const S* grad_lse;                    // [B, N] or null
  Matrix<E> grad_v;                     // [B, N, D]
  Matrix<S> carry[2];                   // [B, N, D], only with more than one step (then E = S)
  Matrix<E> grad_q, grad_k;             // [B, N, d]
};

}  // namespace cc4s
