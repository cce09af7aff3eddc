// Histograms, adjacency and edge weights of superpixels; docs/kernels/color_affinity.md has the definition.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "common/target_clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kColorBins = 25, kTextureBins = 10;
constexpr int kColors = 3 * kColorBins, kTextures = 2 * kTextureBins;
// A node's counters: 75 colours, 20 textures, pixels.
constexpr int kPixels = kColors + kTextures, kCounters = kPixels + 1;

struct Strides {
  int64_t batch, channel, row, column;
};

struct Problem {
  int64_t batch, height, width, nodes;
  const uint8_t* image;  // [B, 3, H, W], any strides
  Strides image_at;
  const void* superpixels;  // [B, H, W] int32 or int64, any strides
  bool wide_ids;
  Strides ids_at;
};

struct Run {
  int32_t begin, end, id;
};

// What a strip of rows of one image adds; all integers, so that no cut and no order shows in the sums.
struct Part {
  std::vector<int32_t> counters;  // [K, 2, 96]: even and odd pixels, so that equal neighbours do not wait for
                                  // each other; added up into the first half at the end
  std::vector<uint64_t> edges;    // (i << 32) + j with i < j; may repeat
  std::vector<Run> runs;          // of all rows of the strip
  std::vector<size_t> row_ends;   // in runs
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
};

// Pairs that were just added, so that the pixels of a border add few copies.
class PairFilter {
 public:
  PairFilter() : seen_(kSize, 0) {}

  void add(int32_t a, int32_t b, std::vector<uint64_t>& edges) {
    const uint64_t key = (static_cast<uint64_t>(std::min(a, b)) << 32) + static_cast<uint64_t>(std::max(a, b));
    uint64_t& place = seen_[(key * 0x9e3779b97f4a7c15u) >> (64 - kBits)];
    if (place == key) return;
    place = key;
    edges.push_back(key);
  }

 private:
  static constexpr int kBits = 12, kSize = 1 << kBits;
  std::vector<uint64_t> seen_;  // 0 is no pair
};

// One row with a margin of one pixel on both sides; `valid` is -1 or 0.
struct Row {
  std::vector<int32_t> luma, valid, ids;
  std::vector<Run> runs;  // without those of pixels without an id

  explicit Row(int64_t width) : luma(width + 2, 0), valid(width + 2, 0), ids(width + 2, -1) {}
};

CC4S_TARGET_CLONES
void luma_of(const uint8_t* __restrict red, const uint8_t* __restrict green, const uint8_t* __restrict blue,
             int64_t width, int32_t* __restrict luma) {
  for (int64_t x = 0; x < width; ++x) luma[x] = 299 * red[x] + 587 * green[x] + 114 * blue[x];
}

// Ids out of range become -1.
template <typename Id>
__attribute__((always_inline)) inline void ids_of(const Id* __restrict from, int64_t width, int64_t nodes,
                                                  int32_t* __restrict ids, int32_t* __restrict valid) {
  for (int64_t x = 0; x < width; ++x) {
    const bool inside = from[x] >= 0 && static_cast<int64_t>(from[x]) < nodes;
    valid[x] = inside ? -1 : 0;
    ids[x] = inside ? static_cast<int32_t>(from[x]) : -1;
  }
}
CC4S_TARGET_CLONES
void ids_of_int(const int32_t* from, int64_t width, int64_t nodes, int32_t* ids, int32_t* valid) {
  ids_of(from, width, nodes, ids, valid);
}
CC4S_TARGET_CLONES
void ids_of_long(const int64_t* from, int64_t width, int64_t nodes, int32_t* ids, int32_t* valid) {
  ids_of(from, width, nodes, ids, valid);
}

// changes[x] = whether a run ends after x.
CC4S_TARGET_CLONES
void changes_of(const int32_t* __restrict ids, int64_t width, uint8_t* __restrict changes) {
  for (int64_t x = 0; x + 1 < width; ++x) changes[x] = ids[x] != ids[x + 1];
  changes[width - 1] = 1;
}

// after - before, twice the one-sided difference where one of the two is not valid. Grows [low, high] by the values
// of valid pixels.
CC4S_TARGET_CLONES
void differences(const int32_t* __restrict luma, const int32_t* __restrict valid, const int32_t* __restrict before,
                 const int32_t* __restrict before_valid, const int32_t* __restrict after,
                 const int32_t* __restrict after_valid, int64_t width, int32_t* __restrict out,
                 int32_t* __restrict range) {
  int32_t low = range[0], high = range[1];
  for (int64_t x = 0; x < width; ++x) {
    // Masks of 0 and -1 instead of conditions, which would keep this from vector code.
    const int32_t here = luma[x];
    const int32_t step = ((here - before[x]) & before_valid[x]) + ((after[x] - here) & after_valid[x]);
    const int32_t g = step + (step & ~(before_valid[x] & after_valid[x]));
    out[x] = g;
    low = std::min(low, (g & valid[x]) | (std::numeric_limits<int32_t>::max() & ~valid[x]));
    high = std::max(high, (g & valid[x]) | (std::numeric_limits<int32_t>::min() & ~valid[x]));
  }
  range[0] = low;
  range[1] = high;
}

// The places in a node's counters of both gradients of a pixel, 75 + bin and 85 + bin, in two bytes.
// bin = (g - low) * 10 // span: numerator and span are below 2^24, and a quotient below k <= 10 is further from k
// than float32 rounds, so that truncation is exact.
CC4S_TARGET_CLONES
void texture_places(const int32_t* __restrict across, const int32_t* __restrict down, int64_t width, int32_t low,
                    int32_t span, int32_t* __restrict places) {
  const float divisor = static_cast<float>(std::max(span, 1));
  const int32_t factor = span > 0 ? kTextureBins : 0;
  for (int64_t x = 0; x < width; ++x) {
    // Gradients of pixels without an id are outside the range; nobody reads their places.
    const int32_t a = static_cast<int32_t>(static_cast<float>((across[x] - low) * factor) / divisor);
    const int32_t d = static_cast<int32_t>(static_cast<float>((down[x] - low) * factor) / divisor);
    places[x] = (kColors + std::min(a, kTextureBins - 1)) |
                (kColors + kTextureBins + std::min(d, kTextureBins - 1)) << 8;
  }
}

// The places of the three colours of a pixel, in three bytes: 25 c + min(24, v * 25 // 255).
CC4S_TARGET_CLONES
void color_places(const uint8_t* __restrict red, const uint8_t* __restrict green, const uint8_t* __restrict blue,
                  int64_t width, int32_t* __restrict places) {
  // n * 32897 >> 23 is n // 255 for n below 2^16.
  const auto bin = [](int32_t v) { return std::min(v * kColorBins * 32897 >> 23, kColorBins - 1); };
  for (int64_t x = 0; x < width; ++x) {
    places[x] = bin(red[x]) | (kColorBins + bin(green[x])) << 8 | (2 * kColorBins + bin(blue[x])) << 16;
  }
}

// Counts the `bytes` places of each pixel of a run.
template <int bytes>
inline void count_places(const int32_t* places, const Run& run, int32_t* counters) {
  int32_t* const odd = counters + kCounters;
  int32_t x = run.begin;
  for (; x + 2 <= run.end; x += 2) {
    const int32_t a = places[x], b = places[x + 1];
    for (int byte = 0; byte < bytes; ++byte) {
      ++counters[(a >> 8 * byte) & 0xff];
      ++odd[(b >> 8 * byte) & 0xff];
    }
  }
  if (x < run.end) {
    for (int byte = 0; byte < bytes; ++byte) ++counters[(places[x] >> 8 * byte) & 0xff];
  }
}

// The rows of one strip: first everything but the textures, which wait for the range of the whole image.
class StripPass {
 public:
  explicit StripPass(const Problem& problem)
      : p_(problem),
        rows_{Row(problem.width), Row(problem.width), Row(problem.width)},
        channels_(3 * problem.width),
        wide_ids_(problem.width),
        changes_(problem.width + 8, 0),
        places_(problem.width) {}

  // gradients: [2, H, W] of the image, the rows from `begin` to `end` are written.
  void colors_and_edges(int64_t b, int64_t begin, int64_t end, Part& part, int32_t* gradients) {
    part.counters.assign(static_cast<size_t>(p_.nodes * 2 * kCounters), 0);
    int32_t range[2] = {part.low, part.high};
    PairFilter filter;
    Row *above = &rows_[0], *row = &rows_[1], *below = &rows_[2];
    const uint8_t* channels[3];
    const uint8_t* next_channels[3];
    if (begin > 0) {
      read(b, begin - 1, *above, channels);
    } else {
      clear(*above);
    }
    read(b, begin, *row, next_channels);
    for (int64_t y = begin; y < end; ++y) {
      // With strides, the channels of a row are in a buffer that the next row overwrites: first the colours.
      std::copy(next_channels, next_channels + 3, channels);
      count_colors(*row, channels, part);
      part.runs.insert(part.runs.end(), row->runs.begin(), row->runs.end());
      part.row_ends.push_back(part.runs.size());
      if (y + 1 < p_.height) {
        read(b, y + 1, *below, next_channels);
      } else {
        clear(*below);
      }
      add_edges(*row, *below, filter, part.edges);
      const int32_t *luma = row->luma.data() + 1, *valid = row->valid.data() + 1;
      int32_t* to = gradients + y * p_.width;
      differences(luma, valid, luma - 1, valid - 1, luma + 1, valid + 1, p_.width, to, range);
      differences(luma, valid, above->luma.data() + 1, above->valid.data() + 1, below->luma.data() + 1,
                  below->valid.data() + 1, p_.width, to + p_.height * p_.width, range);
      Row* free = above;
      above = row;
      row = below;
      below = free;
    }
    part.low = range[0];
    part.high = range[1];
  }

  void textures(int64_t begin, int64_t end, int32_t low, int32_t span, Part& part, const int32_t* gradients) {
    size_t i = 0;
    for (int64_t y = begin; y < end; ++y) {
      texture_places(gradients + y * p_.width, gradients + (p_.height + y) * p_.width, p_.width, low, span,
                     places_.data());
      for (; i < part.row_ends[y - begin]; ++i) {
        const Run& run = part.runs[i];
        count_places<2>(places_.data(), run, part.counters.data() + int64_t{run.id} * 2 * kCounters);
      }
    }
  }

 private:
  void clear(Row& row) {
    std::fill(row.valid.begin(), row.valid.end(), 0);
    row.runs.clear();
  }

  void read(int64_t b, int64_t y, Row& row, const uint8_t** channels) {
    for (int c = 0; c < 3; ++c) {
      const uint8_t* from = p_.image + b * p_.image_at.batch + c * p_.image_at.channel + y * p_.image_at.row;
      channels[c] = from;
      if (p_.image_at.column == 1) continue;
      uint8_t* to = channels_.data() + c * p_.width;
      for (int64_t x = 0; x < p_.width; ++x) to[x] = from[x * p_.image_at.column];
      channels[c] = to;
    }
    luma_of(channels[0], channels[1], channels[2], p_.width, row.luma.data() + 1);
    read_ids(b, y, row);
  }

  void read_ids(int64_t b, int64_t y, Row& row) {
    const int64_t at = b * p_.ids_at.batch + y * p_.ids_at.row, step = p_.ids_at.column;
    int32_t *ids = row.ids.data() + 1, *valid = row.valid.data() + 1;
    if (p_.wide_ids || step != 1) {
      const int64_t* wide = static_cast<const int64_t*>(p_.superpixels) + at;
      const int32_t* narrow = static_cast<const int32_t*>(p_.superpixels) + at;
      if (step != 1) {
        for (int64_t x = 0; x < p_.width; ++x) wide_ids_[x] = p_.wide_ids ? wide[x * step] : narrow[x * step];
        wide = wide_ids_.data();
      }
      ids_of_long(wide, p_.width, p_.nodes, ids, valid);
    } else {
      ids_of_int(static_cast<const int32_t*>(p_.superpixels) + at, p_.width, p_.nodes, ids, valid);
    }
    row.runs.clear();
    changes_of(ids, p_.width, changes_.data());
    const int32_t width = static_cast<int32_t>(p_.width);
    for (int32_t begin = 0, x = 0; x < width;) {
      // Eight pixels at once; the margin behind the row is 0.
      uint64_t eight;
      std::memcpy(&eight, changes_.data() + x, sizeof(eight));
      if (eight == 0) {
        x += 8;
        continue;
      }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      x += __builtin_ctzll(eight) / 8;
#else
      while (changes_[x] == 0) ++x;
#endif
      ++x;
      if (ids[begin] >= 0) row.runs.push_back({begin, x, ids[begin]});
      begin = x;
    }
  }

  void count_colors(const Row& row, const uint8_t* const* channels, Part& part) {
    color_places(channels[0], channels[1], channels[2], p_.width, places_.data());
    for (const Run& run : row.runs) {
      int32_t* counters = part.counters.data() + int64_t{run.id} * 2 * kCounters;
      counters[kPixels] += run.end - run.begin;
      count_places<3>(places_.data(), run, counters);
    }
  }

  static void add_edges(const Row& row, const Row& below, PairFilter& filter, std::vector<uint64_t>& edges) {
    for (size_t i = 1; i < row.runs.size(); ++i) {
      if (row.runs[i - 1].end == row.runs[i].begin) filter.add(row.runs[i - 1].id, row.runs[i].id, edges);
    }
    for (size_t i = 0, j = 0; i < row.runs.size() && j < below.runs.size();) {
      const Run &up = row.runs[i], &down = below.runs[j];
      const bool touch = std::max(up.begin, down.begin) < std::min(up.end, down.end);
      if (touch && up.id != down.id) filter.add(up.id, down.id, edges);
      // Both indices move from the ends as they were.
      const int32_t end = std::min(up.end, down.end);
      const bool step_up = up.end == end, step_down = down.end == end;
      i += step_up;
      j += step_down;
    }
  }

  const Problem& p_;
  Row rows_[3];
  std::vector<uint8_t> channels_;
  std::vector<int64_t> wide_ids_;
  std::vector<uint8_t> changes_;
  std::vector<int32_t> places_;
};

// Sum of squared differences of two histograms over their pixel counts.
__attribute__((always_inline)) inline double squared_distance(const int32_t* __restrict a, double a_scale,
                                                              const int32_t* __restrict b, double b_scale, int count) {
  double sums[4] = {};
  int s = 0;
  for (; s + 4 <= count; s += 4) {
    for (int k = 0; k < 4; ++k) {
      const double d = a[s + k] * a_scale - b[s + k] * b_scale;
      sums[k] += d * d;
    }
  }
  for (; s < count; ++s) {
    const double d = a[s] * a_scale - b[s] * b_scale;
    sums[0] += d * d;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

CC4S_TARGET_CLONES
void log_likeness(const uint64_t* edges, int64_t count, const int32_t* counters, double* out) {
  for (int64_t e = 0; e < count; ++e) {
    const int64_t i = static_cast<int64_t>(edges[e] >> 32), j = static_cast<int64_t>(edges[e] & 0xffffffffu);
    const int32_t *a = counters + i * 2 * kCounters, *b = counters + j * 2 * kCounters;
    const double a_scale = 1.0 / a[kPixels], b_scale = 1.0 / b[kPixels];
    const double color = squared_distance(a, a_scale, b, b_scale, kColors);
    const double texture = squared_distance(a + kColors, a_scale, b + kColors, b_scale, kTextures);
    out[e] = -5.0 * (std::sqrt(color) / 25.0 + std::sqrt(texture) / 100.0);
  }
}

Strides strides_of(const Tensor& tensor) {
  const bool planar = tensor.dim() == 4;
  return {tensor.stride(0), planar ? tensor.stride(1) : 0, tensor.stride(planar ? 2 : 1),
          tensor.stride(planar ? 3 : 2)};
}

Problem problem_of(const Tensor& image, const Tensor& superpixels, int64_t nodes) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.scalar_type() == ScalarType::Byte,
                  "image: expected uint8 (B, 3, H, W)");
  const int64_t height = image.size(2), width = image.size(3);
  STD_TORCH_CHECK(height > 0 && width > 0 && height * width < (int64_t{1} << 31),
                  "image: expected fewer than 2^31 pixels, and at least one");
  const ScalarType type = superpixels.scalar_type();
  STD_TORCH_CHECK(superpixels.dim() == 3 && superpixels.size(0) == image.size(0) && superpixels.size(1) == height &&
                      superpixels.size(2) == width && (type == ScalarType::Int || type == ScalarType::Long),
                  "superpixels: expected int32 or int64 (B, H, W) of the image");
  STD_TORCH_CHECK(nodes >= 1 && nodes < (int64_t{1} << 31), "num_superpixels: expected 1 to 2^31 - 1");
  return {image.size(0), height, width, nodes, image.const_data_ptr<uint8_t>(), strides_of(image),
          superpixels.const_data_ptr(), type == ScalarType::Long, strides_of(superpixels)};
}

// One part for each image, with all its histograms and its edges, sorted, each once.
std::vector<Part> parts_of(const Problem& problem) {
  const int64_t height = problem.height, pixels = height * problem.width;
  // Strips only where there are fewer images than threads, and where their histograms are small.
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const bool small = problem.nodes * kCounters <= 4 * pixels;
  const int64_t strips = small ? std::clamp<int64_t>((threads + problem.batch - 1) / problem.batch, 1,
                                                     std::clamp<int64_t>(height / 16, 1, 16))
                               : 1;
  std::vector<Part> parts(static_cast<size_t>(problem.batch * strips));
  // Not cleared: all that is read is written before.
  const std::unique_ptr<int32_t[]> gradients(new int32_t[static_cast<size_t>(problem.batch * 2 * pixels)]);
  const auto for_each_strip = [&](const auto& body) {
    torch::stable::parallel_for(0, problem.batch * strips, 1, [&](int64_t begin, int64_t end) {
      StripPass pass(problem);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / strips, s = i % strips;
        body(pass, b, s * height / strips, (s + 1) * height / strips, parts[i], gradients.get() + b * 2 * pixels);
      }
    });
  };
  for_each_strip([&](StripPass& pass, int64_t b, int64_t begin, int64_t end, Part& part, int32_t* g) {
    pass.colors_and_edges(b, begin, end, part, g);
  });
  for_each_strip([&](StripPass& pass, int64_t b, int64_t begin, int64_t end, Part& part, const int32_t* g) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t s = 0; s < strips; ++s) {
      low = std::min(low, parts[b * strips + s].low);
      high = std::max(high, parts[b * strips + s].high);
    }
    // Without a valid pixel nothing is counted.
    if (low <= high) pass.textures(begin, end, low, high - low, part, g);
  });
  std::vector<Part> images(static_cast<size_t>(problem.batch));
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Part& all = images[b];
      all = std::move(parts[b * strips]);
      for (int64_t s = 1; s < strips; ++s) {
        const Part& part = parts[b * strips + s];
        for (size_t i = 0; i < all.counters.size(); ++i) all.counters[i] += part.counters[i];
        all.edges.insert(all.edges.end(), part.edges.begin(), part.edges.end());
      }
      for (int64_t k = 0; k < problem.nodes; ++k) {
        int32_t* even = all.counters.data() + k * 2 * kCounters;
        for (int i = 0; i < kCounters; ++i) even[i] += even[kCounters + i];
      }
      std::sort(all.edges.begin(), all.edges.end());
      all.edges.erase(std::unique(all.edges.begin(), all.edges.end()), all.edges.end());
    }
  });
  return images;
}

// image [B, 3, H, W] uint8, superpixels [B, H, W] -> edge_index [B, 2, E] int64, weight [B, E] float32,
// num_edges [B] int64, counts [B, K] int64.
std::tuple<Tensor, Tensor, Tensor, Tensor> color_affinity(const Tensor& image, const Tensor& superpixels,
                                                          int64_t num_superpixels, int64_t max_edges) {
  STD_TORCH_CHECK(max_edges >= 0, "max_edges: expected at least 0");
  const Problem problem = problem_of(image, superpixels, num_superpixels);
  Tensor edge_index = torch::stable::empty({problem.batch, 2, max_edges}, ScalarType::Long);
  Tensor weight = torch::stable::empty({problem.batch, max_edges}, ScalarType::Float);
  Tensor num_edges = torch::stable::empty({problem.batch}, ScalarType::Long);
  Tensor counts = torch::stable::empty({problem.batch, num_superpixels}, ScalarType::Long);
  if (problem.batch == 0) return {edge_index, weight, num_edges, counts};
  const std::vector<Part> images = parts_of(problem);
  int64_t* to_index = edge_index.mutable_data_ptr<int64_t>();
  float* to_weight = weight.mutable_data_ptr<float>();
  int64_t* to_number = num_edges.mutable_data_ptr<int64_t>();
  int64_t* to_counts = counts.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Part& part = images[b];
      const int64_t found = static_cast<int64_t>(part.edges.size()), stored = std::min(found, max_edges);
      to_number[b] = found;
      for (int64_t k = 0; k < num_superpixels; ++k) {
        to_counts[b * num_superpixels + k] = part.counters[k * 2 * kCounters + kPixels];
      }
      int64_t *first = to_index + b * 2 * max_edges, *second = first + max_edges;
      float* weights = to_weight + b * max_edges;
      std::fill(first, second + max_edges, int64_t{0});
      for (int64_t e = 0; e < stored; ++e) {
        first[e] = static_cast<int64_t>(part.edges[e] >> 32);
        second[e] = static_cast<int64_t>(part.edges[e] & 0xffffffffu);
      }
      // Edges without a place: no silent loss, the energy becomes NaN.
      const bool poisoned = found > max_edges;
      std::fill(weights, weights + max_edges, poisoned ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
      if (poisoned || found == 0) continue;
      std::vector<double> w(static_cast<size_t>(found));
      log_likeness(part.edges.data(), found, part.counters.data(), w.data());
      for (double& value : w) value = std::exp(value);
      const double lowest = *std::min_element(w.begin(), w.end());
      for (double& value : w) value = std::max(value - 0.8 * lowest, 0.0);
      const double highest = *std::max_element(w.begin(), w.end());
      for (int64_t e = 0; e < found; ++e) weights[e] = static_cast<float>(0.8 * w[e] / (highest > 0 ? highest : 1.0));
    }
  });
  return {edge_index, weight, num_edges, counts};
}

// The integers alone: color [B, K, 75], texture [B, K, 20], counts [B, K], all int64.
std::tuple<Tensor, Tensor, Tensor> color_histograms(const Tensor& image, const Tensor& superpixels,
                                                    int64_t num_superpixels) {
  const Problem problem = problem_of(image, superpixels, num_superpixels);
  Tensor color = torch::stable::empty({problem.batch, num_superpixels, kColors}, ScalarType::Long);
  Tensor texture = torch::stable::empty({problem.batch, num_superpixels, kTextures}, ScalarType::Long);
  Tensor counts = torch::stable::empty({problem.batch, num_superpixels}, ScalarType::Long);
  if (problem.batch == 0) return {color, texture, counts};
  const std::vector<Part> images = parts_of(problem);
  int64_t* to_color = color.mutable_data_ptr<int64_t>();
  int64_t* to_texture = texture.mutable_data_ptr<int64_t>();
  int64_t* to_counts = counts.mutable_data_ptr<int64_t>();
  for (const Part& part : images) {
    for (int64_t k = 0; k < num_superpixels; ++k) {
      const int32_t* counters = part.counters.data() + k * 2 * kCounters;
      to_color = std::copy(counters, counters + kColors, to_color);
      to_texture = std::copy(counters + kColors, counters + kPixels, to_texture);
      *to_counts++ = counters[kPixels];
    }
  }
  return {color, texture, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("color_affinity", TORCH_BOX(&color_affinity));
  m.impl("color_histograms", TORCH_BOX(&color_histograms));
}
