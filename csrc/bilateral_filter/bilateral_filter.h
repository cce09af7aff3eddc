// Arguments of the tile code of `bilateral_filter`. S: dtype of colours, values and sums.
#pragma once

#include "common/pairwise.h"

namespace cc4s {

// Tiles of valid pixels: each is a patch of the image, so that far patches are far tiles.
class Patches {
 public:
  static constexpr int64_t kRows = 8, kColumns = 16;
  static constexpr int64_t kPixels = kRows * kColumns;

  struct Tile {
    int64_t begin, count;  // in `index`
  };

  // mask: [height, width] or null.
  Patches(const bool* mask, int64_t height, int64_t width) {
    index.reserve(static_cast<size_t>(height * width));
    const int64_t down = (height + kRows - 1) / kRows, across = (width + kColumns - 1) / kColumns;
    for (int64_t patch = 0; patch < down * across; ++patch) {
      const int64_t i = patch / across, j = patch % across;
      const int64_t begin = static_cast<int64_t>(index.size());
      for (int64_t y = i * height / down; y < (i + 1) * height / down; ++y) {
        for (int64_t x = j * width / across; x < (j + 1) * width / across; ++x) {
          if (mask == nullptr || mask[y * width + x]) index.push_back(static_cast<int32_t>(y * width + x));
        }
      }
      const int64_t count = static_cast<int64_t>(index.size()) - begin;
      if (count > 0) tiles.push_back({begin, count});
    }
  }

  std::vector<int32_t> index;  // positions in the image, tile by tile
  std::vector<Tile> tiles;
};

// One image.
template <class S>
struct BilateralFilter {
  const Patches* patches;
  int64_t pixels, width, channels;
  const S* values;     // [channels, pixels]
  const S* levels;     // [3, pixels]
  S position, color;   // -1 / (2 sigma^2)
  bool include_self;
  S* out;  // [channels, pixels]
};

}  // namespace cc4s
