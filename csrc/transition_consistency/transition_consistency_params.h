// Arguments of the CUDA kernels of `transition_consistency`, for every chip. T: BFloat16 or Half of common/mma_sm80.cuh.
#pragma once

#include "common/rows.cuh"

namespace transition_consistency {

// Scores are in units of log 2: factor = scale / ln 2. Positions that are not valid in `mask` are no state: their rows
// are never read, and written as 0.
template <class T>
struct Problem {
  int batch, n;
  const bool* mask;  // [B, n] or null
  float factor;
  Rows<const T> q, k, q_target, k_target;  // [B, n, d]
};

// All [B, n] out: kl in nats, P_ii, P'_ii, and the logsumexps of both in units of log 2.
template <class T>
struct Divergences {
  Problem<T> problem;
  float *kl, *diagonal, *diagonal_target, *lse2, *lse2_target;
};

// dE_ij = kl_grad_i (P_ij - P'_ij) + trace_grad_i (delta_ij - P_ij), trace_grad_i = s P_ii; dQ = scale unit dE K and
// dK = scale unit dE^T Q.
template <class T>
struct Scores {
  Problem<T> problem;
  float scale;
  const float *lse2, *lse2_target, *kl_grad, *trace_grad;  // [B, n]
  const float* unit;                                       // [1], what both gradients are measured in
  Rows<T> q_grad, k_grad;                                  // [B, n, d] out
};

}  // namespace transition_consistency
