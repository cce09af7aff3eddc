// Arguments of the tile code of `transition_consistency`. E: dtype of the tensors, S: of scores and sums.
#pragma once

#include "common/pairwise.h"

namespace cc4s {

// Rows of P and P' are indexed by `q`; the caller swaps q and k for column normalisation.
template <class E, class S>
struct ConsistencyInput {
  int64_t batch, n;
  Matrix<const E> q, k, q_target, k_target;  // [B, N, d]
  const Valid* valid;
  S scale;
};

// All [B, N].
template <class S>
struct ConsistencyOutput {
  S *kl, *lse, *lse_target;
  S *diagonal, *diagonal_target;  // P_ii, P'_ii
};

template <class E, class S>
struct ConsistencyBackward {
  const S *lse, *lse_target, *diagonal;  // [B, N]
  const S* grad_kl;                      // [B, N] or null
  const S* grad_trace;                   // [B] or null
  Matrix<E> grad_q, grad_k;              // [B, N, d]
};

}  // namespace cc4s
