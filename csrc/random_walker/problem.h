// What one image is solved with, the same for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace cc4s::random_walker {

// |D^-1 r| of each system relative to |D^-1 b|, D its diagonal, and the most steps to get there; as in reference.py.
// After the last step as much as kAccepted will do.
constexpr double kTolerance = 1e-14, kAccepted = 1e-3;
constexpr int kMaxIterations = 20000;

// Where an element is: weight [B, 2, H, W], prob [B, C, H, W]; seeds [B, H, W] have no second axis.
struct View {
  int64_t batch, channel, row, column;
};

// The system sum_j w_ij (x_i - x_j) = b_i on the free pixels of an image; every other pixel has x = 0.
//
// Pixels stand with a frame of one: index (y + 1) * stride + x + 1, so that all have four neighbours; couplings to what
// is not free are 0 and need no test. The preconditioner is an incomplete Cholesky factor of five diagonals that keeps
// most of the row sums (relaxed MIC(0)): its number of steps grows with the root of the side, not with the side.
struct System {
  int64_t height, width, stride, size;
  std::vector<uint8_t> free;
  std::vector<double> right, down, diagonal;           // couplings to i + 1 and i + stride; the sum of all four
  std::vector<double> pivot, right_factor, down_factor;  // 1 / L_ii, and the couplings times it

  System(int64_t h, int64_t w)
      : height(h),
        width(w),
        stride(w + 2),
        size((h + 2) * (w + 2)),
        free(size, 0),
        right(size, 0.0),
        down(size, 0.0),
        diagonal(size, 1.0),
        pivot(size, 1.0),
        right_factor(size, 0.0),
        down_factor(size, 0.0) {}

  int64_t at(int64_t y, int64_t x) const { return (y + 1) * stride + x + 1; }
  int64_t first() const { return stride; }
  int64_t last() const { return size - stride; }

  void factorize() {
    // Shares of the row sums that are kept, and the pivot that is too small to trust: usual values.
    constexpr double kKept = 0.97, kSmall = 0.25;
    for (int64_t i = first(); i < last(); ++i) {
      if (!free[i]) continue;
      const int64_t left = i - 1, up = i - stride;
      const double a = right_factor[left], b = down_factor[up];
      double d = diagonal[i] - a * a - b * b - kKept * (a * down_factor[left] + b * right_factor[up]);
      if (d < kSmall * diagonal[i]) d = diagonal[i];
      pivot[i] = 1 / std::sqrt(d);
      right_factor[i] = right[i] * pivot[i];
      down_factor[i] = down[i] * pivot[i];
    }
  }
};

}  // namespace cc4s::random_walker
