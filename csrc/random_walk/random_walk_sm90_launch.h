// The Hopper kernels of random_walk on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
//
// A launcher is called with (grid, threads, bytes of shared memory, kernel, arguments...), and `launcher.encode` fills the
// TensorMap of a matrix in boxes of 64 columns and some rows.
#pragma once

#include "random_walk/random_walk_sm90.cuh"

namespace random_walk {
namespace hopper {

// [B, n, columns] with adjacent columns; strides in elements. TMA wants them and the address in multiples of 16 bytes.
template <class T>
struct Matrix {
  const T* data;
  long long batch, row;
  int columns;
};

struct Sizes {
  int batch, n, key, value;
};

template <class T, class Launch>
TensorMap map_of(Launch&& launch, const Sizes& s, const Matrix<T>& matrix, int box_rows) {
  TensorMap map;
  constexpr long long kBytes = sizeof(T);
  launch.encode(map, matrix.data, matrix.row * kBytes, matrix.batch * kBytes, matrix.columns, s.n, s.batch, box_rows);
  return map;
}

inline int parts_of(int count, int part) { return (count + part - 1) / part; }

template <class T, int key, int value, bool transposed, class Launch>
void run_walk(Launch&& launch, const Sizes& s, const Matrix<T>& own, const Matrix<T>& other, const Matrix<T>& wide,
              Walk<T> walk_) {
  walk_.n = s.n;
  walk_.width = s.value;
  walk_.splits = parts_of(s.value, value);
  const long long blocks = static_cast<long long>(parts_of(s.n, kOwned)) * walk_.splits * s.batch;
  launch(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), WalkMemory<key, value>::kBytes,
         walk<T, key, value, transposed>, map_of(launch, s, own, kOwned), map_of(launch, s, other, kTile),
         map_of(launch, s, wide, kTile), walk_);
}

// Y = keep P state + restart start and lse2; of w the mask, lse2, out, start with its strides and the factors are given.
// 1 <= d <= 128, 1 <= D <= 512, both multiples of 8. None of B and N is 0.
template <class T, bool transposed, class Launch>
void run_walk(Launch&& launch, const Sizes& s, const Matrix<T>& own, const Matrix<T>& other, const Matrix<T>& wide,
              const Walk<T>& w) {
  if (s.key > 64) {
    run_walk<T, 128, 256, transposed>(launch, s, own, other, wide, w);
  } else if ((s.value + 127) / 128 % 2 != 0) {
    // Columns in parts of 128 leave less of the last one unused.
    run_walk<T, 64, 128, transposed>(launch, s, own, other, wide, w);
  } else {
    run_walk<T, 64, 256, transposed>(launch, s, own, other, wide, w);
  }
}

template <class T, class Launch>
void run_level(Launch&& launch, const Sizes& s, const Matrix<T>& g, const Matrix<T>& y, const Matrix<T>& start,
               float restart, const bool* mask, const float* lse_grad, float* out) {
  const long long positions = static_cast<long long>(s.batch) * s.n, blocks = (positions * 32 - 1) / kLevelThreads + 1;
  launch(dim3(static_cast<unsigned>(blocks)), dim3(kLevelThreads), 0, level<T>,
         Level<T>{g.data, y.data, start.data, g.batch, g.row, y.batch, y.row, start.batch, start.row, mask, lse_grad,
                  out, positions, s.n, s.value, restart});
}

// The gradient of own = q (by_query) or k into `out` or added to `sums` of w, of which the mask, lse2, level and the
// factors are given too.
template <class T, bool by_query, class Launch>
void run_scores(Launch&& launch, const Sizes& s, const Matrix<T>& own, const Matrix<T>& other,
                const Matrix<T>& wide_own, const Matrix<T>& wide_other, Scores<T> w) {
  w.n = s.n;
  w.key = s.key;
  w.chunks = parts_of(s.value, kSlab);
  const dim3 grid(static_cast<unsigned>(static_cast<long long>(parts_of(s.n, kOwned)) * s.batch));
  const auto run = [&](auto kernel, int bytes) {
    launch(grid, dim3(kThreads), bytes, kernel, map_of(launch, s, own, kOwned), map_of(launch, s, other, kTile),
           map_of(launch, s, wide_own, kOwned), map_of(launch, s, wide_other, kTile), w);
  };
  if (s.key > 64) {
    run(scores<T, 128, by_query>, ScoresMemory<128>::kBytes);
  } else {
    run(scores<T, 64, by_query>, ScoresMemory<64>::kBytes);
  }
}

}  // namespace hopper
}  // namespace random_walk
