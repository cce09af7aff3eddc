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
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/strides_of.h"
#include "common/target_clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kColorBins = 25, kTextureBins = 10;
// A node's counters stand in four groups of 32: red, green, blue, textures. The rest of a group is 0, but for the
// last counter of all, which counts the pixels.
constexpr int kGroup = 32, kTextures = 3 * kGroup, kCounters = 4 * kGroup, kPixels = kCounters - 1;
// A multiple of 8 that holds both textures and nothing else.
constexpr int kTextureRoom = 24;

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
  std::vector<uint8_t> bytes;     // [K, 128]: counts the latest pixels of each node, at most 255
  std::vector<int32_t> counters;  // [K, 128]: counts the ones before
  std::vector<uint64_t> edges;    // (i << 32) + j with i < j; may repeat
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
};

// All of one image: what its parts add up to.
struct Image {
  std::vector<int32_t> counters;  // [K, 128]
  std::vector<uint64_t> edges;    // sorted, each once
};

// The pairs of a row, most of which were added before in the row or in the one above it: those are left out.
class PairFilter {
 public:
  // At most `most` pairs of a row.
  explicit PairFilter(int64_t most) : seen_(kSize, 0), row_(most), count_(0) {}

  // Pixels without an id have no edge.
  void add(int32_t a, int32_t b) {
    const int32_t low = std::min(a, b), high = std::max(a, b);
    const uint64_t key = (static_cast<uint64_t>(low) << 32) | static_cast<uint32_t>(high);
    uint64_t& place = seen_[(key * 0x9e3779b97f4a7c15u) >> (64 - kBits)];
    // Without a branch, which would be mispredicted.
    row_[count_] = key;
    count_ += (place != key) & (low >= 0);
    place = key;
  }

  void end_row(std::vector<uint64_t>& edges) {
    edges.insert(edges.end(), row_.begin(), row_.begin() + count_);
    count_ = 0;
  }

 private:
  static constexpr int kBits = 10, kSize = 1 << kBits;
  std::vector<uint64_t> seen_;  // 0 is no pair
  std::vector<uint64_t> row_;
  int64_t count_;
};

// One row with a margin of one pixel on both sides.
struct Row {
  std::vector<int32_t> luma, ids;
  bool inside;                 // the image
  bool whole;                  // every pixel has an id, or the row is not inside
  std::vector<uint8_t> copy;   // of channels that are strided
  const uint8_t* channels[3];  // [W] each

  explicit Row(int64_t width)
      : luma(width + 2, 0), ids(width + 2, -1), inside(false), whole(true), copy(3 * width), channels{} {}
};

CC4S_TARGET_CLONES
void luma_of(const uint8_t* __restrict red, const uint8_t* __restrict green, const uint8_t* __restrict blue,
             int64_t width, int32_t* __restrict luma) {
  for (int64_t x = 0; x < width; ++x) luma[x] = 299 * red[x] + 587 * green[x] + 114 * blue[x];
}

// Ids out of range become -1. Returns whether there was none.
template <typename Id>
__attribute__((always_inline)) inline bool ids_of(const Id* __restrict from, int64_t width, int64_t nodes,
                                                  int32_t* __restrict ids) {
  using Unsigned = std::make_unsigned_t<Id>;
  const Unsigned limit = static_cast<Unsigned>(nodes);
  int32_t whole = -1;
  for (int64_t x = 0; x < width; ++x) {
    // Negative ids are large as unsigned numbers.
    const int32_t inside = static_cast<Unsigned>(from[x]) < limit ? -1 : 0;
    ids[x] = static_cast<int32_t>(from[x]) | ~inside;
    whole &= inside;
  }
  return whole != 0;
}
CC4S_TARGET_CLONES
bool ids_of_int(const int32_t* from, int64_t width, int64_t nodes, int32_t* ids) {
  return ids_of(from, width, nodes, ids);
}
CC4S_TARGET_CLONES
bool ids_of_long(const int64_t* from, int64_t width, int64_t nodes, int32_t* ids) {
  return ids_of(from, width, nodes, ids);
}

// across[x]: a run ends after x. down[x]: x and the pixel below it are of two ids, other ones than one pixel before.
CC4S_TARGET_CLONES
void borders_of(const int32_t* __restrict ids, const int32_t* __restrict below, int64_t width,
                uint8_t* __restrict across, uint8_t* __restrict down) {
  for (int64_t x = 0; x < width; ++x) {
    across[x] = ids[x] != ids[x + 1];
    down[x] = (ids[x] != below[x]) & ((ids[x] != ids[x - 1]) | (below[x] != below[x - 1]));
  }
}

// Calls body(x) for every x with flags[x] = 1, all others being 0; 63 flags behind the last are read and must be 0.
template <typename Body>
inline void for_each_flag(const std::vector<uint8_t>& flags, int64_t width, const Body& body) {
  for (int64_t x = 0; x < width; x += 64) {
    uint64_t bits = 0;
    for (int k = 0; k < 8; ++k) {
      uint64_t eight;
      std::memcpy(&eight, flags.data() + x + 8 * k, sizeof(eight));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      eight = __builtin_bswap64(eight);
#endif
      // Byte i to bit i.
      bits |= (eight * 0x0102040810204080u) >> 56 << 8 * k;
    }
    for (; bits != 0; bits &= bits - 1) body(static_cast<int32_t>(x + __builtin_ctzll(bits)));
  }
}

// Gradients of a row: after - before, twice the one-sided difference where one of the two is not valid.
// Here where all pixels of the three rows are valid: the sides of the image have margins of luma that do so, and at its
// top and bottom the row takes the place of the missing one.
class WholeGradients {
 public:
  WholeGradients(const Row& above, const Row& row, const Row& below)
      : luma_(row.luma.data() + 1),
        above_((above.inside ? above : row).luma.data() + 1),
        below_((below.inside ? below : row).luma.data() + 1),
        factor_(above.inside && below.inside ? 1 : 2) {}

  __attribute__((always_inline)) int32_t across(int64_t x) const { return luma_[x + 1] - luma_[x - 1]; }
  __attribute__((always_inline)) int32_t down(int64_t x) const { return (below_[x] - above_[x]) * factor_; }
  __attribute__((always_inline)) int32_t valid(int64_t) const { return -1; }

 private:
  const int32_t *luma_, *above_, *below_;
  int32_t factor_;
};

// With masks instead of conditions, which would keep the loops from vector code.
class MaskedGradients {
 public:
  MaskedGradients(const Row& above, const Row& row, const Row& below)
      : luma_(row.luma.data() + 1),
        ids_(row.ids.data() + 1),
        above_(above.luma.data() + 1),
        above_ids_(above.ids.data() + 1),
        below_(below.luma.data() + 1),
        below_ids_(below.ids.data() + 1) {}

  __attribute__((always_inline)) int32_t across(int64_t x) const {
    return gradient(luma_[x - 1], mask(ids_[x - 1]), luma_[x], luma_[x + 1], mask(ids_[x + 1]));
  }
  __attribute__((always_inline)) int32_t down(int64_t x) const {
    return gradient(above_[x], mask(above_ids_[x]), luma_[x], below_[x], mask(below_ids_[x]));
  }
  __attribute__((always_inline)) int32_t valid(int64_t x) const { return mask(ids_[x]); }

 private:
  // 0 for -1, else -1.
  __attribute__((always_inline)) static int32_t mask(int32_t id) { return ~(id >> 31); }
  __attribute__((always_inline)) static int32_t gradient(int32_t before, int32_t before_valid, int32_t here,
                                                         int32_t after, int32_t after_valid) {
    const int32_t step = ((here - before) & before_valid) + ((after - here) & after_valid);
    return step + (step & ~(before_valid & after_valid));
  }

  const int32_t *luma_, *ids_, *above_, *above_ids_, *below_, *below_ids_;
};

// Grows [low, high] by both gradients of the valid pixels of a row.
template <typename Gradients>
__attribute__((always_inline)) inline void grow(Gradients at, int64_t width, int32_t* range) {
  int32_t low = range[0], high = range[1];
  for (int64_t x = 0; x < width; ++x) {
    const int32_t a = at.across(x), d = at.down(x), valid = at.valid(x);
    low = std::min(low, (std::min(a, d) & valid) | (std::numeric_limits<int32_t>::max() & ~valid));
    high = std::max(high, (std::max(a, d) & valid) | (std::numeric_limits<int32_t>::min() & ~valid));
  }
  range[0] = low;
  range[1] = high;
}
CC4S_TARGET_CLONES
void grow_whole(const WholeGradients& at, int64_t width, int32_t* range) { grow(at, width, range); }
CC4S_TARGET_CLONES
void grow_masked(const MaskedGradients& at, int64_t width, int32_t* range) { grow(at, width, range); }

// Vectors of 32 counters of a byte that have a 1 at one bin each, so that one addition counts one pixel.
struct OneHot {
  uint8_t color[64];                                 // the 32 bytes from 31 - bin
  uint8_t texture[kTextureBins * kTextureBins][32];  // by 10 * bin across + bin down: both, and the pixel
};
constexpr OneHot one_hot_tables() {
  OneHot tables{};
  tables.color[31] = 1;
  for (int a = 0; a < kTextureBins; ++a) {
    for (int d = 0; d < kTextureBins; ++d) {
      uint8_t* vector = tables.texture[kTextureBins * a + d];
      vector[a] = vector[kTextureBins + d] = vector[kPixels - kTextures] = 1;
    }
  }
  return tables;
}
// No vector of `color` crosses a cache line.
alignas(64) constexpr OneHot kOneHot = one_hot_tables();

// Offsets in kOneHot.texture of the bins (g - low) * 10 // span.
template <typename Gradients>
__attribute__((always_inline)) inline void texture_places(Gradients at, int64_t width, int32_t low, int32_t span,
                                                          uint16_t* places) {
  const int32_t divisor = std::max(span, 1), factor = span > 0 ? kTextureBins : 0;
  // All numbers are below 2^24 and quotients at most 10: the product with a reciprocal that is never too large, rounded
  // down, is the quotient or 1 less.
  const float reciprocal = (1.0f - 0x1p-22f) / static_cast<float>(divisor);
  const auto bin = [&](int32_t g) __attribute__((always_inline)) {
    const int32_t n = (g - low) * factor;
    const int32_t q = static_cast<int32_t>(static_cast<float>(n) * reciprocal);
    return std::min(q + (n - q * divisor >= divisor), kTextureBins - 1);
  };
  for (int64_t x = 0; x < width; ++x) {
    // Gradients of pixels without an id are outside the range; nobody reads their places.
    places[x] = static_cast<uint16_t>((kTextureBins * bin(at.across(x)) + bin(at.down(x))) * 32);
  }
}
CC4S_TARGET_CLONES
void whole_places(const WholeGradients& at, int64_t width, int32_t low, int32_t span, uint16_t* places) {
  texture_places(at, width, low, span, places);
}
CC4S_TARGET_CLONES
void masked_places(const MaskedGradients& at, int64_t width, int32_t low, int32_t span, uint16_t* places) {
  texture_places(at, width, low, span, places);
}

// Offsets in kOneHot.color: 31 - min(24, v * 25 // 255), where the minimum does nothing but to put 255 to 254.
CC4S_TARGET_CLONES
void color_places(const uint8_t* __restrict values, int64_t width, uint8_t* __restrict places) {
  for (int64_t x = 0; x < width; ++x) {
    const uint16_t n = static_cast<uint16_t>(std::min<uint8_t>(values[x], 254) * kColorBins);
    // (n + 1 + n // 256) // 256 is n // 255 for n below 2^16 - 1.
    const uint16_t bin = static_cast<uint16_t>((n + 1 + (n >> 8)) >> 8);
    places[x] = static_cast<uint8_t>(31 - bin);
  }
}

struct Places {
  std::vector<uint8_t> red, green, blue;
  std::vector<uint16_t> texture;

  explicit Places(int64_t width) : red(width), green(width), blue(width), texture(width) {}
};

typedef uint8_t Bytes __attribute__((vector_size(kGroup)));

// Counts the pixels of the runs of one row.
CC4S_TARGET_CLONES
void count_runs(const Places& places, const std::vector<Run>& runs, uint8_t* all_bytes, int32_t* all_counters) {
  const uint8_t *red = places.red.data(), *green = places.green.data(), *blue = places.blue.data();
  const uint16_t* texture = places.texture.data();
  const uint8_t* textures = kOneHot.texture[0];
  constexpr int32_t kFull = std::numeric_limits<uint8_t>::max();
  // Vectors one by one: a copy of all four would go through memory in smaller pieces.
  const auto load = [](Bytes& to, const uint8_t* from) __attribute__((always_inline)) {
    std::memcpy(&to, from, sizeof(to));
  };
  const auto add = [](Bytes& to, const uint8_t* from) __attribute__((always_inline)) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    to += bytes;
  };
  const auto store = [](const Bytes& from, uint8_t* to) __attribute__((always_inline)) {
    std::memcpy(to, &from, sizeof(from));
  };
  for (const Run& run : runs) {
    uint8_t* bytes = all_bytes + int64_t{run.id} * kCounters;
    for (int32_t x = run.begin; x < run.end;) {
      const int32_t end = x + std::min(run.end - x, kFull);
      if (bytes[kPixels] + (end - x) > kFull) {
        int32_t* counters = all_counters + int64_t{run.id} * kCounters;
        for (int i = 0; i < kCounters; ++i) counters[i] += bytes[i];
        for (int i = 0; i < kCounters; i += kGroup) store(Bytes{}, bytes + i);
      }
      Bytes r, g, b, t;
      load(r, bytes);
      load(g, bytes + kGroup);
      load(b, bytes + 2 * kGroup);
      load(t, bytes + kTextures);
      for (; x < end; ++x) {
        add(r, kOneHot.color + red[x]);
        add(g, kOneHot.color + green[x]);
        add(b, kOneHot.color + blue[x]);
        add(t, textures + texture[x]);
      }
      store(r, bytes);
      store(g, bytes + kGroup);
      store(b, bytes + 2 * kGroup);
      store(t, bytes + kTextures);
    }
  }
}

// The rows of one strip: first the range of the gradients, then, with that of the whole image, all else.
class StripPass {
 public:
  explicit StripPass(const Problem& problem)
      : p_(problem),
        rows_{Row(problem.width), Row(problem.width), Row(problem.width)},
        wide_ids_(problem.width),
        across_(problem.width + 64, 0),
        down_(problem.width + 64, 0),
        places_(problem.width) {}

  void range(int64_t b, int64_t begin, int64_t end, Part& part) {
    int32_t range[2] = {part.low, part.high};
    for_each_row(b, begin, end, [&](const Row& above, const Row& row, const Row& below) {
      if (above.whole && row.whole && below.whole) {
        grow_whole(WholeGradients(above, row, below), p_.width, range);
      } else {
        grow_masked(MaskedGradients(above, row, below), p_.width, range);
      }
    });
    part.low = range[0];
    part.high = range[1];
  }

  void counts_and_edges(int64_t b, int64_t begin, int64_t end, int32_t low, int32_t span, Part& part) {
    part.bytes.assign(static_cast<size_t>(p_.nodes * kCounters), 0);
    part.counters.assign(part.bytes.size(), 0);
    // A run ends and a border starts at most once at a pixel.
    PairFilter filter(2 * p_.width + 1);
    for_each_row(b, begin, end, [&](const Row& above, const Row& row, const Row& below) {
      const int32_t *ids = row.ids.data() + 1, *next = below.ids.data() + 1;
      borders_of(ids, next, p_.width, across_.data(), down_.data());
      runs_.clear();
      int32_t start = 0;
      // The last run ends with a flag too, unless it has no id.
      for_each_flag(across_, p_.width, [&](int32_t x) {
        if (ids[x] >= 0) runs_.push_back({start, x + 1, ids[x]});
        filter.add(ids[x], ids[x + 1]);
        start = x + 1;
      });
      for_each_flag(down_, p_.width, [&](int32_t x) { filter.add(ids[x], next[x]); });
      filter.end_row(part.edges);

      if (above.whole && row.whole && below.whole) {
        whole_places(WholeGradients(above, row, below), p_.width, low, span, places_.texture.data());
      } else {
        masked_places(MaskedGradients(above, row, below), p_.width, low, span, places_.texture.data());
      }
      color_places(row.channels[0], p_.width, places_.red.data());
      color_places(row.channels[1], p_.width, places_.green.data());
      color_places(row.channels[2], p_.width, places_.blue.data());
      count_runs(places_, runs_, part.bytes.data(), part.counters.data());
    });
  }

 private:
  // Calls body(row above, row, row below).
  template <typename Body>
  void for_each_row(int64_t b, int64_t begin, int64_t end, const Body& body) {
    Row *above = &rows_[0], *row = &rows_[1], *below = &rows_[2];
    read(b, begin - 1, *above);
    read(b, begin, *row);
    for (int64_t y = begin; y < end; ++y) {
      read(b, y + 1, *below);
      body(*above, *row, *below);
      std::swap(above, row);
      std::swap(row, below);
    }
  }

  void read(int64_t b, int64_t y, Row& row) {
    row.inside = y >= 0 && y < p_.height;
    if (!row.inside) {
      row.whole = true;
      std::fill(row.ids.begin(), row.ids.end(), -1);
      return;
    }
    for (int c = 0; c < 3; ++c) {
      const uint8_t* from = p_.image + b * p_.image_at.batch + c * p_.image_at.channel + y * p_.image_at.row;
      row.channels[c] = from;
      if (p_.image_at.column == 1) continue;
      uint8_t* to = row.copy.data() + c * p_.width;
      for (int64_t x = 0; x < p_.width; ++x) to[x] = from[x * p_.image_at.column];
      row.channels[c] = to;
    }
    int32_t* luma = row.luma.data() + 1;
    luma_of(row.channels[0], row.channels[1], row.channels[2], p_.width, luma);
    // Beside the image so that a difference over two pixels is twice the one-sided one.
    const int64_t last = p_.width - 1;
    luma[-1] = 2 * luma[0] - luma[std::min<int64_t>(1, last)];
    luma[p_.width] = 2 * luma[last] - luma[std::max<int64_t>(last - 1, 0)];
    read_ids(b, y, row);
  }

  void read_ids(int64_t b, int64_t y, Row& row) {
    const int64_t at = b * p_.ids_at.batch + y * p_.ids_at.row, step = p_.ids_at.column;
    int32_t* ids = row.ids.data() + 1;
    if (p_.wide_ids || step != 1) {
      const int64_t* wide = static_cast<const int64_t*>(p_.superpixels) + at;
      const int32_t* narrow = static_cast<const int32_t*>(p_.superpixels) + at;
      if (step != 1) {
        for (int64_t x = 0; x < p_.width; ++x) wide_ids_[x] = p_.wide_ids ? wide[x * step] : narrow[x * step];
        wide = wide_ids_.data();
      }
      row.whole = ids_of_long(wide, p_.width, p_.nodes, ids);
    } else {
      row.whole = ids_of_int(static_cast<const int32_t*>(p_.superpixels) + at, p_.width, p_.nodes, ids);
    }
  }

  const Problem& p_;
  Row rows_[3];
  std::vector<int64_t> wide_ids_;
  std::vector<uint8_t> across_, down_;
  std::vector<Run> runs_;  // of one row, without those of pixels without an id
  Places places_;
};

// The edges of all parts of an image, sorted, each once.
std::vector<uint64_t> sorted_edges(const Part* parts, int64_t count, int64_t nodes) {
  // Sorted by the first id by counting, then the few of each first id by the second.
  std::vector<size_t> offset(static_cast<size_t>(nodes + 1), 0);
  for (int64_t s = 0; s < count; ++s) {
    for (const uint64_t edge : parts[s].edges) ++offset[(edge >> 32) + 1];
  }
  for (int64_t k = 0; k < nodes; ++k) offset[k + 1] += offset[k];
  std::vector<uint64_t> edges(offset[nodes]);
  std::vector<size_t> next(offset.begin(), offset.end() - 1);
  for (int64_t s = 0; s < count; ++s) {
    for (const uint64_t edge : parts[s].edges) edges[next[edge >> 32]++] = edge;
  }
  for (int64_t k = 0; k < nodes; ++k) std::sort(edges.begin() + offset[k], edges.begin() + offset[k + 1]);
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  return edges;
}

// Adds up what the parts of an image counted, in the counters of the first.
CC4S_TARGET_CLONES
void add_counters(Part* parts, int64_t count) {
  int32_t* __restrict sum = parts[0].counters.data();
  const int64_t size = static_cast<int64_t>(parts[0].counters.size());
  for (int64_t s = 0; s < count; ++s) {
    const uint8_t* __restrict bytes = parts[s].bytes.data();
    for (int64_t i = 0; i < size; ++i) sum[i] += bytes[i];
    if (s == 0) continue;
    const int32_t* __restrict counters = parts[s].counters.data();
    for (int64_t i = 0; i < size; ++i) sum[i] += counters[i];
  }
}

// Sum of squared differences of a histogram and the counters of another one times `share`; `count` is a multiple of 8.
__attribute__((always_inline)) inline double squared_distance(const double* a, const int32_t* b, double share,
                                                              int count) {
  typedef double Doubles __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  // Two sums, so that an addition does not wait for the one before.
  Doubles sums[2] = {};
  for (int s = 0; s < count; s += 8) {
    for (int k = 0; k < 2; ++k) {
      Doubles x;
      Ints y;
      std::memcpy(&x, a + s + 4 * k, sizeof(x));
      std::memcpy(&y, b + s + 4 * k, sizeof(y));
      const Doubles d = x - __builtin_convertvector(y, Doubles) * share;
      sums[k] += d * d;
    }
  }
  const Doubles total = sums[0] + sums[1];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// -5 dist of sorted edges.
CC4S_TARGET_CLONES
void log_likeness(const uint64_t* edges, int64_t count, const int32_t* counters, double* out) {
  double first[kPixels];
  int64_t first_id = -1;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t i = static_cast<int64_t>(edges[e] >> 32), j = static_cast<int64_t>(edges[e] & 0xffffffffu);
    if (i != first_id) {
      const int32_t* a = counters + i * kCounters;
      const double share = 1.0 / a[kPixels];
      for (int s = 0; s < kPixels; ++s) first[s] = a[s] * share;
      first_id = i;
    }
    const int32_t* b = counters + j * kCounters;
    const double share = 1.0 / b[kPixels];
    const double color = squared_distance(first, b, share, kTextures);
    const double texture = squared_distance(first + kTextures, b + kTextures, share, kTextureRoom);
    out[e] = -5.0 * (std::sqrt(color) / 25.0 + std::sqrt(texture) / 100.0);
  }
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

// Into how many parts an image is cut: only where there are fewer images than threads.
int64_t chunks_of(const Problem& problem) {
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  return std::clamp<int64_t>((threads + problem.batch - 1) / problem.batch, 1, 16);
}

std::vector<Image> images_of(const Problem& problem) {
  const int64_t height = problem.height, pixels = height * problem.width;
  // Strips only where their histograms are small.
  const bool small = problem.nodes * kCounters <= 4 * pixels;
  const int64_t strips = small ? std::min(chunks_of(problem), std::max<int64_t>(height / 16, 1)) : 1;
  std::vector<Part> parts(static_cast<size_t>(problem.batch * strips));
  const auto for_each_strip = [&](const auto& body) {
    torch::stable::parallel_for(0, problem.batch * strips, 1, [&](int64_t first, int64_t last) {
      StripPass pass(problem);
      for (int64_t i = first; i < last; ++i) {
        const int64_t b = i / strips, s = i % strips;
        body(pass, b, s * height / strips, (s + 1) * height / strips, parts[i]);
      }
    });
  };
  for_each_strip([&](StripPass& pass, int64_t b, int64_t begin, int64_t end, Part& part) {
    pass.range(b, begin, end, part);
  });
  for_each_strip([&](StripPass& pass, int64_t b, int64_t begin, int64_t end, Part& part) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t s = 0; s < strips; ++s) {
      low = std::min(low, parts[b * strips + s].low);
      high = std::max(high, parts[b * strips + s].high);
    }
    // Without a valid pixel there is no range, and nothing to count.
    const bool any = low <= high;
    pass.counts_and_edges(b, begin, end, any ? low : 0, any ? high - low : 0, part);
  });
  std::vector<Image> images(static_cast<size_t>(problem.batch));
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      add_counters(&parts[b * strips], strips);
      images[b].counters = std::move(parts[b * strips].counters);
      images[b].edges = sorted_edges(&parts[b * strips], strips, problem.nodes);
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
  const std::vector<Image> images = images_of(problem);
  int64_t* to_index = edge_index.mutable_data_ptr<int64_t>();
  float* to_weight = weight.mutable_data_ptr<float>();
  int64_t* to_number = num_edges.mutable_data_ptr<int64_t>();
  int64_t* to_counts = counts.mutable_data_ptr<int64_t>();
  std::vector<std::vector<double>> likeness(images.size());
  for (size_t b = 0; b < images.size(); ++b) likeness[b].resize(images[b].edges.size());
  const int64_t chunks = chunks_of(problem);
  torch::stable::parallel_for(0, problem.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, c = i % chunks, count = static_cast<int64_t>(images[b].edges.size());
      const int64_t first = c * count / chunks, last = (c + 1) * count / chunks;
      double* w = likeness[b].data();
      log_likeness(images[b].edges.data() + first, last - first, images[b].counters.data(), w + first);
      for (int64_t e = first; e < last; ++e) w[e] = std::exp(w[e]);
    }
  });
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const std::vector<uint64_t>& edges = images[b].edges;
      const int32_t* counters = images[b].counters.data();
      const int64_t found = static_cast<int64_t>(edges.size()), stored = std::min(found, max_edges);
      to_number[b] = found;
      for (int64_t k = 0; k < num_superpixels; ++k) {
        to_counts[b * num_superpixels + k] = counters[k * kCounters + kPixels];
      }
      int64_t *first = to_index + b * 2 * max_edges, *second = first + max_edges;
      float* weights = to_weight + b * max_edges;
      std::fill(first, second + max_edges, int64_t{0});
      for (int64_t e = 0; e < stored; ++e) {
        first[e] = static_cast<int64_t>(edges[e] >> 32);
        second[e] = static_cast<int64_t>(edges[e] & 0xffffffffu);
      }
      // Edges without a place: no silent loss, the energy becomes NaN.
      const bool poisoned = found > max_edges;
      std::fill(weights, weights + max_edges, poisoned ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
      if (poisoned || found == 0) continue;
      std::vector<double>& w = likeness[b];
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
  Tensor color = torch::stable::empty({problem.batch, num_superpixels, 3 * kColorBins}, ScalarType::Long);
  Tensor texture = torch::stable::empty({problem.batch, num_superpixels, 2 * kTextureBins}, ScalarType::Long);
  Tensor counts = torch::stable::empty({problem.batch, num_superpixels}, ScalarType::Long);
  if (problem.batch == 0) return {color, texture, counts};
  int64_t* to_color = color.mutable_data_ptr<int64_t>();
  int64_t* to_texture = texture.mutable_data_ptr<int64_t>();
  int64_t* to_counts = counts.mutable_data_ptr<int64_t>();
  for (const Image& found : images_of(problem)) {
    for (int64_t k = 0; k < num_superpixels; ++k) {
      const int32_t* node = found.counters.data() + k * kCounters;
      for (int c = 0; c < 3; ++c) to_color = std::copy_n(node + c * kGroup, kColorBins, to_color);
      to_texture = std::copy_n(node + kTextures, 2 * kTextureBins, to_texture);
      *to_counts++ = node[kPixels];
    }
  }
  return {color, texture, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("color_affinity", TORCH_BOX(&color_affinity));
  m.impl("color_histograms", TORCH_BOX(&color_histograms));
}
