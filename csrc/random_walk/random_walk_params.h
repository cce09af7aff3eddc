// Arguments of the CUDA kernels of `random_walk`, for every chip. T: BFloat16 or Half of common/mma_sm80.cuh.
#pragma once

#include "common/rows.cuh"

namespace random_walk {

// What all kernels need. Scores are in units of log 2: factor = scale / ln 2. Positions that are not valid in `mask` are
// no state: their rows are never read, and written as 0.
struct Problem {
  int batch, n;
  const bool* mask;  // [B, n] or null
  float factor;
  float keep;     // 1 - restart
  float restart;  // in [0, 1]
};

// y = keep P x + restart start and lse2, or (transposed) y = keep P^T x + restart start with lse2 given.
template <class T>
struct Step {
  Problem problem;
  Rows<const T> q, k;      // [B, n, d]
  Rows<const T> x, start;  // [B, n, D]
  Rows<T> y;               // [B, n, D]
  float* lse2;             // [B, n]: out; of a transposed step, in
};

// level = <g, y - restart start> - lse_grad: dE_ij = P_ij (keep <g_i, x_j> - level_i).
template <class T>
struct Level {
  Problem problem;
  Rows<const T> g, y, start;  // [B, n, D]
  const float* lse_grad;      // [B, n] or null
  float* level;               // [B, n] out
};

// The gradients of the scores of one step, multiplied by K and by Q: dQ = scale dE K, dK = scale dE^T Q.
template <class T>
struct Scores {
  Problem problem;
  float scale;
  Rows<const T> q, k;      // [B, n, d]
  Rows<const T> g, x;      // [B, n, D]: gradient of the state after the step, state before it
  const float *lse2, *level;  // [B, n]
  Rows<T> q_grad, k_grad;     // [B, n, d] out, written where `q_sum` and `k_sum` are null
  Rows<float> q_sum, k_sum;   // [B, n, d], added to
};

}  // namespace random_walk
