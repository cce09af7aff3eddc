// What one call works on, the same for every instruction set.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace cc4s::upsample_losses {

using torch::headeronly::ScalarType;

// A (B, H, W) map of any strides; data is null where the argument was not given.
struct PixelMap {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Int;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
};

// Output position i lies between source positions low[i] and high[i], at fraction[i] of the way.
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<double> fraction;

  Axis(int64_t size, int64_t out, bool align_corners) : low(out), high(out), fraction(out) {
    for (int64_t i = 0; i < out; ++i) {
      double at = 0;
      if (align_corners) {
        if (out > 1) at = static_cast<double>(i * (size - 1)) / static_cast<double>(out - 1);
      } else {
        at = std::max((static_cast<double>(i) + 0.5) * static_cast<double>(size) / static_cast<double>(out) - 0.5, 0.0);
      }
      const int64_t whole = std::min(static_cast<int64_t>(at), size - 1);
      low[i] = static_cast<int32_t>(whole);
      high[i] = static_cast<int32_t>(std::min(whole + 1, size - 1));
      fraction[i] = at - static_cast<double>(whole);
    }
  }
};

// Rows of pixels between the same two rows of logits; at most kIntervalRows.
struct Interval {
  int64_t begin, end;
  int32_t low, high;
};

constexpr int64_t kIntervalRows = 16;

// Consecutive intervals: the unit of work. The cut depends on the sizes only, so that sums are the same for every
// number of threads.
struct Strip {
  size_t begin, end;             // of the intervals
  int32_t row_begin, row_end;    // rows of logits that they touch
};

constexpr int64_t kStrips = 32, kStripRows = 8;

struct Rows {
  std::vector<Interval> intervals;
  std::vector<Strip> strips;

  explicit Rows(const Axis& axis) {
    const int64_t height = static_cast<int64_t>(axis.low.size());
    for (int64_t y = 0; y < height;) {
      const int64_t begin = y;
      while (y < height && y - begin < kIntervalRows && axis.low[y] == axis.low[begin]) ++y;
      intervals.push_back({begin, y, axis.low[begin], axis.high[begin]});
    }
    const int64_t rows = std::max(kStripRows, (height + kStrips - 1) / kStrips);
    for (size_t i = 0; i < intervals.size();) {
      const size_t begin = i;
      while (i < intervals.size() && (i == begin || intervals[i].end - intervals[begin].begin <= rows)) ++i;
      strips.push_back({begin, i, intervals[begin].low, intervals[i - 1].high + 1});
    }
  }
};

// Sums of one strip of one image.
template <typename T>
struct Partial {
  double cross_entropy = 0, labelled = 0, entropy = 0, weight = 0;
  // The ids that occur, in order of appearance, their numbers of pixels and sums of probabilities [ids, C].
  std::vector<int32_t> ids;
  std::vector<int64_t> counts;
  std::vector<T> pooled;
  // Gradient of the strip's rows of logits: [rows, w, padded C].
  std::vector<T> gradient;
};

template <typename T>
struct Problem {
  int64_t batch, classes, low_height, low_width, height, width, num_ids, ignore_index;
  const T* logits;             // [B, C, h, w], any strides
  int64_t logit_strides[4];
  PixelMap labels, weight, ids;
  const std::vector<T>& class_weight;  // [C], or empty
  const Axis& column_axis;
  const Axis& row_axis;
  const Rows& rows;
  // Backward only.
  bool backward = false;
  std::vector<T> cross_entropy_gradient = {}, entropy_gradient = {};  // [B]
  const T* pooled_gradient = nullptr;                       // [B, K, C], any strides, or null
  int64_t pooled_strides[3] = {};
};

}  // namespace cc4s::upsample_losses
