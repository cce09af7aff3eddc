// Matrices as TMA reads them; for the launch headers of Hopper kernels.
#pragma once

#include "common/rows.cuh"
#include "common/sm90.cuh"

namespace hopper {

inline int parts_of(int count, int part) { return (count + part - 1) / part; }

// Whether TMA can read a matrix whose rows are as `Rows` says. Strides of 0 (expanded tensors) are not tried.
template <class Problem, class T>
bool is_readable(const Problem& problem, const Rows<T>& matrix) {
  return (matrix.row > 0 || problem.n == 1) && (matrix.batch > 0 || problem.batch == 1);
}

// matrix [B, n, width] in boxes of 64 columns and `rows` rows.
template <class Launch, class Problem, class T>
TensorMap map_of(Launch&& launch, const Problem& problem, const Rows<T>& matrix, int rows) {
  TensorMap map;
  // The stride of what there is one of is free, but not 0.
  const long long row = matrix.row > 0 ? matrix.row : matrix.width;
  const long long batch = matrix.batch > 0 ? matrix.batch : row * problem.n;
  launch.encode(map, matrix.at, row * sizeof(T), batch * sizeof(T), matrix.width, problem.n, problem.batch, rows);
  return map;
}

}  // namespace hopper
