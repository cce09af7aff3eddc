// Arguments of the tile code of `transition_matrix`. E: dtype of the tensors, S: of scores and sums.
#pragma once

#include "common/pairwise.h"

namespace cc4s {

enum class Normalize { row, column, symmetric };

template <class E, class S>
struct MatrixInput {
  int64_t batch, n;
  Matrix<const E> q, k;  // [B, N, d]
  const Valid* valid;    // all
  S scale;
  Normalize normalize;
};

template <class E, class S>
struct MatrixOutput {
  E* matrix;  // [B, N, N]
  S* lse;     // [B, N], of rows (columns for `column`)
};

// For `column` the caller swaps q and k and transposes the gradient.
template <class E, class S>
struct MatrixBackward {
  const E* grad;               // [B, N, N]
  bool transposed;             // grad is indexed [key, query]
  const S* lse;                // [B, N]
  Matrix<E> grad_q, grad_k;    // [B, N, d]
};

}  // namespace cc4s
