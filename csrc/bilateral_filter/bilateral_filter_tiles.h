// Tile code of `bilateral_filter`; compiled once for each instruction set. See docs/kernels/bilateral_filter.md.
#include "common/tile_engine.h"

constexpr int kFeatures = 5;  // y, x, red, green, blue

// The pixels of a tile, packed.
template <class S>
struct BilateralTile {
  const S* features;  // [kFeatures, ld]
  const S* values;    // [channels, ld]
  S low[kFeatures], high[kFeatures];
};

// exp is 0 below: no pair of tiles that is skipped would have added anything.
template <class S>
constexpr S kLowestExponent = std::is_same_v<S, double> ? -746 : -87.5;

template <class S>
bool too_far(const BilateralTile<S>& a, const BilateralTile<S>& b, S position, S color) {
  S exponent = 0;
  for (int f = 0; f < kFeatures; ++f) {
    const S gap = std::max({S{0}, a.low[f] - b.high[f], b.low[f] - a.high[f]});
    exponent += gap * gap * (f < 2 ? position : color);
  }
  return exponent < kLowestExponent<S>;
}

// panel[j][i] = K of `count` pixels j of `other` and kPanel pixels i of `own` from `first` on.
template <class En, class S>
void kernel_panel(const S* own, const S* other, int64_t ld, int64_t first, int64_t count, S position, S color,
                  S* panel) {
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  V a[kFeatures], b[kFeatures];
  for (int f = 0; f < kFeatures; ++f) {
    a[f] = load(own + f * ld + first);
    b[f] = load(own + f * ld + first + W);
  }
  for (int64_t j = 0; j < count; ++j, panel += En::kPanel) {
    V left[kFeatures], right[kFeatures];
#pragma GCC unroll 8
    for (int f = 0; f < kFeatures; ++f) {
      const V x = splat(other[f * ld + j]);
      left[f] = (a[f] - x) * (a[f] - x);
      right[f] = (b[f] - x) * (b[f] - x);
    }
    store(panel, vexp((left[0] + left[1]) * position + (left[2] + left[3] + left[4]) * color));
    store(panel + W, vexp((right[0] + right[1]) * position + (right[2] + right[3] + right[4]) * color));
  }
}

template <class En>
void bilateral_filter_image(const BilateralFilter<typename En::Scalar>& in) {
  using S = typename En::Scalar;
  // Rows of a tile start in different cache sets.
  constexpr int64_t ld = Patches::kPixels + En::kSkew;
  const std::vector<Patches::Tile>& tiles = in.patches->tiles;
  const int32_t* index = in.patches->index.data();
  const int64_t count = static_cast<int64_t>(tiles.size()), channels = in.channels;
  const int64_t size = (kFeatures + channels) * ld;
  Buffer<S> packed(count * size);
  std::vector<BilateralTile<S>> all(tiles.size());

  struct Nothing {};
  for_each<Nothing>(count, [&](Nothing&, int64_t t) {
    const Patches::Tile tile = tiles[t];
    S* features = packed + t * size;
    S* values = features + kFeatures * ld;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t pixel = index[tile.begin + i];
      features[i] = static_cast<S>(pixel / in.width);
      features[ld + i] = static_cast<S>(pixel % in.width);
      for (int64_t c = 0; c < 3; ++c) features[(2 + c) * ld + i] = in.levels[c * in.pixels + pixel];
      for (int64_t c = 0; c < channels; ++c) values[c * ld + i] = in.values[c * in.pixels + pixel];
    }
    all[t].features = features;
    all[t].values = values;
    for (int f = 0; f < kFeatures; ++f) {
      S* row = features + f * ld;
      std::fill(row + tile.count, row + ld, S{0});
      all[t].low[f] = *std::min_element(row, row + tile.count);
      all[t].high[f] = *std::max_element(row, row + tile.count);
    }
  });

  struct State {
    Buffer<S> panel{Patches::kPixels * En::kPanel};  // [pixels of the other tile, kPanel]
    std::vector<S> sums;                             // [channels, ld]
  };
  for_each<State>(count, [&](State& state, int64_t t) {
    const Patches::Tile own = tiles[t];
    state.sums.assign(static_cast<size_t>(channels * ld), S{0});
    for (int64_t u = 0; u < count; ++u) {
      if (too_far(all[t], all[u], in.position, in.color)) continue;
      const int64_t n = tiles[u].count;
      const typename En::Left values{all[u].values, ld, 1};
      for (int64_t first = 0; first < own.count; first += En::kPanel) {
        kernel_panel<En>(all[t].features, all[u].features, ld, first, n, in.position, in.color, state.panel.get());
        if (t == u && !in.include_self) {
          for (int64_t i = first; i < std::min(first + En::kPanel, n); ++i) {
            state.panel[i * En::kPanel + i - first] = 0;
          }
        }
        En::multiply(values, state.panel, 0, channels, En::kPanel, n, state.sums.data() + first, ld, true);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      S* out = in.out + c * in.pixels;
      for (int64_t i = 0; i < own.count; ++i) out[index[own.begin + i]] = state.sums[c * ld + i];
    }
  });
}
