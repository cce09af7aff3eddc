// The grid of cells of SLIC, step 2 of docs/kernels/slic.md; also device code, free of std headers.
#pragma once

#include "common/host_device.h"

namespace cc4s {

struct Cells {
  long long rows, cols;
  long long weight;  // of a squared distance in 1/16 pixels, times 2^20
};

// compactness: in 1/256.
CC4S_HOST_DEVICE inline Cells cells_of(long long height, long long width, long long num_segments,
                                       long long compactness) {
  const long long n = num_segments < height * width ? num_segments : height * width;
  const long long target = 4 * n * height / width;
  long long twice = 0;  // floor(sqrt(target))
  for (long long bit = 1LL << 31; bit > 0; bit >>= 1) {
    if ((twice + bit) * (twice + bit) <= target) twice += bit;
  }
  const long long nearest = (twice + 1) / 2, most = height < n ? height : n;
  const long long rows = nearest < 1 ? 1 : nearest > most ? most : nearest;
  const long long cols = width < n / rows ? width : n / rows;
  const long long tall = (height + rows - 1) / rows, wide = (width + cols - 1) / cols;
  const long long spacing = tall > wide ? tall : wide;
  return {rows, cols, (2 * 256 * compactness * compactness + spacing * spacing) / (2 * spacing * spacing)};
}

// The first pixel of cell i of `cells` along an axis of `size` pixels, and the cell of pixel x.
CC4S_HOST_DEVICE inline int cell_begin(long long i, long long size, long long cells) {
  return static_cast<int>((i * size + cells - 1) / cells);
}
CC4S_HOST_DEVICE inline int cell_of(long long x, long long size, long long cells) {
  return static_cast<int>(x * cells / size);
}

}  // namespace cc4s
