// Histograms, adjacency and edge weights of superpixels, device code; docs/kernels/color_affinity.md has the definition
// and says why the kernels are so. color_affinity_launch.h has their order.
//
// B images of H x W pixels, K nodes, E places for edges. All sums are of integers, so that no order shows in them.
#pragma once

#include "common/strides.cuh"
#include "common/warp.cuh"

namespace color_affinity {

constexpr int kColorBins = 25, kTextureBins = 10;
constexpr int kColors = 3 * kColorBins, kTextures = 2 * kTextureBins;
// A node's counters: 75 colours, 20 textures, pixels.
constexpr int kPixels = kColors + kTextures, kCounters = kPixels + 1;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32, kSide = kTile + 2;
// Nodes of a tile that are counted in shared memory; 800 superpixels of 465 x 465 pixels put up to 15 into one.
constexpr int kSlots = 32;
constexpr int kLargest = 0x7fffffff, kSmallest = -kLargest - 1;

// image: [B, 3, H, W]. ids: [B, H, W]; what is not 0..K-1 is no node.
template <class Id>
struct Maps {
  const unsigned char* image;
  Strides image_strides;
  const Id* ids;
  Strides id_strides;
  int height, width, nodes;

  __host__ __device__ unsigned tiles_across() const { return (static_cast<unsigned>(width) + kTile - 1) / kTile; }
  __host__ __device__ unsigned tiles() const {
    return tiles_across() * ((static_cast<unsigned>(height) + kTile - 1) / kTile);
  }
};

// 32 x 32 pixels with a margin of one, in shared memory; a node of -1 is no node or outside of the image.
struct Tile {
  int nodes[kSide * kSide];
  unsigned colors[kSide * kSide];  // R + (G << 8) + (B << 16)
};

// The image of this block's tile.
template <class Id>
__device__ __forceinline__ long long image_of(const Maps<Id>& maps) {
  return blockIdx.x / maps.tiles();
}

// Where the pixel i = 0..1023 of the tile is in its arrays.
__device__ __forceinline__ int inside(int i) { return (i / kTile + 1) * kSide + i % kTile + 1; }

template <class Id>
__device__ __forceinline__ void load(const Maps<Id>& maps, Tile& tile) {
  const long long b = image_of(maps);
  const unsigned index = blockIdx.x % maps.tiles();
  const int top = static_cast<int>(index / maps.tiles_across()) * kTile - 1;
  const int left = static_cast<int>(index % maps.tiles_across()) * kTile - 1;
  for (int i = static_cast<int>(threadIdx.x); i < kSide * kSide; i += kThreads) {
    const int y = top + i / kSide, x = left + i % kSide;
    int node = -1;
    unsigned color = 0;
    if (y >= 0 && y < maps.height && x >= 0 && x < maps.width) {
      const Id id = maps.ids[maps.id_strides.at(b, y, x)];
      if (id >= 0 && id < maps.nodes) node = static_cast<int>(id);
      const unsigned char* pixel = maps.image + maps.image_strides.at(b, y, x);
      color = pixel[0] | pixel[maps.image_strides.channel] << 8 | pixel[2 * maps.image_strides.channel] << 16;
    }
    tile.nodes[i] = node;
    tile.colors[i] = color;
  }
  __syncthreads();
}

__device__ __forceinline__ int luma(unsigned color) {
  return static_cast<int>(299 * (color & 255u) + 587 * (color >> 8 & 255u) + 114 * (color >> 16));
}

// Y[+1] - Y[-1] at the pixel p along a step; twice the one-sided difference beside one invalid pixel, 0 between two.
__device__ __forceinline__ int gradient(const Tile& tile, int p, int step) {
  const int here = luma(tile.colors[p]);
  const bool before = tile.nodes[p - step] >= 0, after = tile.nodes[p + step] >= 0;
  const int sum = (before ? here - luma(tile.colors[p - step]) : 0) + (after ? luma(tile.colors[p + step]) - here : 0);
  return before && after ? sum : 2 * sum;
}

__device__ __forceinline__ int texture_bin(int g, int low, int high) {
  return high > low ? min((g - low) * kTextureBins / (high - low), kTextureBins - 1) : 0;
}

// Calls body(i, j), i < j, where the pixel p and the next one along `step` belong to different nodes, but not where the
// pair beside it, one back `along` the border, is the same: a straight piece of a border counts once.
template <class Body>
__device__ __forceinline__ void border_pair(const Tile& tile, int p, int step, int along, Body body) {
  const int a = tile.nodes[p], b = tile.nodes[p + step];
  if (b < 0 || a == b) return;
  const int c = tile.nodes[p - along], d = tile.nodes[p + step - along];
  if ((c == a && d == b) || (c == b && d == a)) return;
  body(min(a, b), max(a, b));
}

// zeros: `count` integers. ranges: [B, 2] smallest and largest gradient. extremes: [B, 2] smallest and largest weight,
// as the bits of doubles >= 0, which are ordered as the doubles are.
__global__ void __launch_bounds__(kThreads)
    clear(int* __restrict__ zeros, long long count, int* __restrict__ ranges,
          unsigned long long* __restrict__ extremes, long long batch) {
  const long long step = static_cast<long long>(gridDim.x) * kThreads;
  const long long first = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  for (long long i = first; i < count; i += step) zeros[i] = 0;
  for (long long b = first; b < batch; b += step) {
    ranges[2 * b] = kLargest;
    ranges[2 * b + 1] = kSmallest;
    extremes[2 * b] = ~0ull;
    extremes[2 * b + 1] = 0;
  }
}

// One block for a tile. ranges: [B, 2], takes the gradients. bucket_starts: [B, K + 1], takes for each node the number of
// its border pairs with larger nodes.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    measure(Maps<Id> maps, int* __restrict__ ranges, int* __restrict__ bucket_starts) {
  __shared__ Tile tile;
  __shared__ int range[2];
  if (threadIdx.x == 0) {
    range[0] = kLargest;
    range[1] = kSmallest;
  }
  load(maps, tile);
  const long long b = image_of(maps);
  int* const sizes = bucket_starts + b * (maps.nodes + 1);
  const auto add = [&](int i, int) { atomicAdd(&sizes[i], 1); };
  int low = kLargest, high = kSmallest;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int p = inside(i);
    if (tile.nodes[p] < 0) continue;
    const int across = gradient(tile, p, 1), down = gradient(tile, p, kSide);
    low = min(low, min(across, down));
    high = max(high, max(across, down));
    border_pair(tile, p, 1, kSide, add);
    border_pair(tile, p, kSide, 1, add);
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane_index() == 0) {
    atomicMin(&range[0], low);
    atomicMax(&range[1], high);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicMin(&ranges[2 * b], range[0]);
    atomicMax(&ranges[2 * b + 1], range[1]);
  }
}

// One block for a row of values: [B, K + 1]. The first K of a row become the sums of those before them, the last their
// total.
__global__ void __launch_bounds__(kThreads) exclusive_sums(int* __restrict__ values, int nodes) {
  __shared__ int warp_sums[kWarps];
  int* const row = values + static_cast<long long>(blockIdx.x) * (nodes + 1);
  int total = 0;
  for (int begin = 0; begin < nodes; begin += kThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const int value = i < nodes ? row[i] : 0;
    int sum = sum_up_to_lane(value);
    if (lane_index() == 31) warp_sums[warp_index()] = sum;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_index()) sum += warp_sums[w];
    }
    if (i < nodes) row[i] = total + sum - value;
    for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
    // The next round writes warp_sums.
    __syncthreads();
  }
  if (threadIdx.x == 0) row[nodes] = total;
}

// A table of nodes in shared memory, -1 = free.
__device__ __forceinline__ void reserve_slot(int* slots, int node) {
  for (int probe = 0; probe < kSlots; ++probe) {
    const int found = atomicCAS(&slots[(node + probe) % kSlots], -1, node);
    if (found == -1 || found == node) return;
  }
}

// -1 where the node found no place.
__device__ __forceinline__ int slot_of(const int* slots, int node) {
  for (int probe = 0; probe < kSlots; ++probe) {
    const int slot = (node + probe) % kSlots;
    if (slots[slot] == node) return slot;
  }
  return -1;
}

__device__ __forceinline__ void count_pixel(int* counters, unsigned color, int across_bin, int down_bin) {
  for (int channel = 0; channel < 3; ++channel) {
    const int value = static_cast<int>(color >> 8 * channel & 255u);
    atomicAdd(&counters[channel * kColorBins + min(value * kColorBins / 255, kColorBins - 1)], 1);
  }
  atomicAdd(&counters[kColors + across_bin], 1);
  atomicAdd(&counters[kColors + kTextureBins + down_bin], 1);
}

// One block for a tile. ranges: [B, 2]. bucket_starts: [B, K + 1]. taken: [B, K], places in use in each bucket. buckets:
// [B, 2 H W], for each node the larger ends of its border pairs, in any order, with repetitions. counters: [B, K, 96].
template <class Id>
__global__ void __launch_bounds__(kThreads)
    count(Maps<Id> maps, const int* __restrict__ ranges, const int* __restrict__ bucket_starts, int* __restrict__ taken,
          int* __restrict__ buckets, int* __restrict__ counters) {
  __shared__ Tile tile;
  __shared__ int slots[kSlots];
  __shared__ int sums[kSlots * kCounters];
  for (int i = static_cast<int>(threadIdx.x); i < kSlots * kCounters; i += kThreads) sums[i] = 0;
  if (threadIdx.x < kSlots) slots[threadIdx.x] = -1;
  load(maps, tile);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int node = tile.nodes[inside(i)];
    if (node >= 0 && (i % kTile == 0 || tile.nodes[inside(i) - 1] != node)) reserve_slot(slots, node);
  }
  __syncthreads();
  const long long b = image_of(maps);
  const int low = ranges[2 * b], high = ranges[2 * b + 1];
  const int* const starts = bucket_starts + b * (maps.nodes + 1);
  int* const places = taken + b * maps.nodes;
  int* const own_buckets = buckets + b * 2 * maps.height * maps.width;
  int* const own_counters = counters + b * maps.nodes * kCounters;
  const auto put = [&](int i, int j) { own_buckets[starts[i] + atomicAdd(&places[i], 1)] = j; };
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int p = inside(i), node = tile.nodes[p];
    if (node < 0) continue;
    const int across = texture_bin(gradient(tile, p, 1), low, high);
    const int down = texture_bin(gradient(tile, p, kSide), low, high);
    const int slot = slot_of(slots, node);
    if (slot >= 0) {
      count_pixel(sums + slot * kCounters, tile.colors[p], across, down);
    } else {
      count_pixel(own_counters + static_cast<long long>(node) * kCounters, tile.colors[p], across, down);
    }
    border_pair(tile, p, 1, kSide, put);
    border_pair(tile, p, kSide, 1, put);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kSlots * kCounters; i += kThreads) {
    if (sums[i] == 0) continue;
    atomicAdd(&own_counters[static_cast<long long>(slots[i / kCounters]) * kCounters + i % kCounters], sums[i]);
  }
}

// The number of pixels of a node: the sum of the bins of one gradient. For a whole warp.
__device__ __forceinline__ int pixels_of(const int* counters) {
  return __reduce_add_sync(kAllLanes, lane_index() < kTextureBins ? counters[kColors + lane_index()] : 0);
}

// One warp for a node. color: [B, K, 75], texture: [B, K, 20], counts: [B, K].
__global__ void __launch_bounds__(kThreads)
    widen(const int* __restrict__ counters, long long rows, long long* __restrict__ color,
          long long* __restrict__ texture, long long* __restrict__ counts) {
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + warp_index();
  if (row >= rows) return;
  const int* const own = counters + row * kCounters;
  for (int s = lane_index(); s < kPixels; s += 32) {
    if (s < kColors) {
      color[row * kColors + s] = own[s];
    } else {
      texture[row * kTextures + s - kColors] = own[s];
    }
  }
  const int pixels = pixels_of(own);
  if (lane_index() == 0) counts[row] = pixels;
}

// What a bucket holds, ascending and each once: body(base, bits) with bit k of lane l set if base + 32 l + k is in it, for
// windows of 1024 nodes, skipping empty ones. For a whole warp; words: 32 of the warp in shared memory.
template <class Body>
__device__ __forceinline__ void for_each_window(const int* bucket, int size, unsigned* words, Body body) {
  if (size == 0) return;
  for (int base = 0;;) {
    words[lane_index()] = 0;
    __syncwarp();
    int next = kLargest;
    for (int e = lane_index(); e < size; e += 32) {
      const int offset = bucket[e] - base;
      if (offset >= 1024) {
        next = min(next, bucket[e]);
      } else if (offset >= 0) {
        atomicOr(&words[offset / 32], 1u << offset % 32);
      }
    }
    __syncwarp();
    next = __reduce_min_sync(kAllLanes, next);
    body(base, words[lane_index()]);
    if (next == kLargest) return;
    base = next;
  }
}

// One warp for a node. edge_starts: [B, K + 1], takes the number of edges to larger nodes. counters: [B, K, 96] and
// counts: [B, K] take the number of pixels.
__global__ void __launch_bounds__(kThreads)
    count_edges(const int* __restrict__ bucket_starts, const int* __restrict__ buckets, long long bucket_places,
                int nodes, long long rows, int* __restrict__ counters, int* __restrict__ edge_starts,
                long long* __restrict__ counts) {
  __shared__ unsigned words[kThreads];
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + warp_index();
  if (row >= rows) return;
  const long long b = row / nodes;
  const int* const bounds = bucket_starts + row + b;
  int edges = 0;
  for_each_window(buckets + b * bucket_places + bounds[0], bounds[1] - bounds[0], words + warp_index() * 32,
                  [&](int, unsigned bits) { edges += __popc(bits); });
  edges = __reduce_add_sync(kAllLanes, edges);
  int* const own = counters + row * kCounters;
  const int pixels = pixels_of(own);
  if (lane_index() == 0) {
    edge_starts[row + b] = edges;
    own[kPixels] = pixels;
    counts[row] = pixels;
  }
}

// One warp for a node. edge_starts: [B, K + 1]. edge_index: [B, 2, E]; edges after the first E of an image have no place.
__global__ void __launch_bounds__(kThreads)
    place_edges(const int* __restrict__ bucket_starts, const int* __restrict__ buckets, long long bucket_places,
                const int* __restrict__ edge_starts, int nodes, long long rows, long long places,
                long long* __restrict__ edge_index) {
  __shared__ unsigned words[kThreads];
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + warp_index();
  if (row >= rows) return;
  const long long b = row / nodes;
  const int* const bounds = bucket_starts + row + b;
  long long* const lower = edge_index + 2 * b * places;
  long long* const upper = lower + places;
  int first = edge_starts[row + b];
  const auto place_window = [&](int base, unsigned bits) {
    // The edges of a lane come after those of the lanes before it.
    const int own = __popc(bits);
    const int sum = sum_up_to_lane(own);
    for (int place = first + sum - own; bits != 0 && place < places; bits &= bits - 1, ++place) {
      lower[place] = row - b * nodes;
      upper[place] = base + 32 * lane_index() + __ffs(static_cast<int>(bits)) - 1;
    }
    first += __shfl_sync(kAllLanes, sum, 31);
  };
  for_each_window(buckets + b * bucket_places + bounds[0], bounds[1] - bounds[0], words + warp_index() * 32,
                  place_window);
}

// exp(-5 dist) of two nodes. For a whole warp.
__device__ __forceinline__ double likeness(const int* a, const int* b) {
  const long long a_pixels = a[kPixels], b_pixels = b[kPixels];
  double color = 0, texture = 0;
  for (int s = lane_index(); s < kPixels; s += 32) {
    // h(a) - h(b) times both numbers of pixels is an integer: equal histograms have distance 0.
    const double d = static_cast<double>(a[s] * b_pixels - b[s] * a_pixels);
    (s < kColors ? color : texture) += d * d;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    color += __shfl_xor_sync(kAllLanes, color, lanes);
    texture += __shfl_xor_sync(kAllLanes, texture, lanes);
  }
  const double scale = static_cast<double>(a_pixels) * static_cast<double>(b_pixels);
  return exp(-5.0 * (sqrt(color) / 25.0 + sqrt(texture) / 100.0) / scale);
}

// One warp for an edge that has a place. w: [B, E]. extremes: [B, 2].
__global__ void __launch_bounds__(kThreads)
    weigh(const long long* __restrict__ edge_index, const int* __restrict__ edge_starts,
          const int* __restrict__ counters, int nodes, long long places, unsigned blocks_per_image,
          double* __restrict__ w, unsigned long long* __restrict__ extremes) {
  __shared__ unsigned long long range[2];
  if (threadIdx.x == 0) {
    range[0] = ~0ull;
    range[1] = 0;
  }
  __syncthreads();
  const long long b = blockIdx.x / blocks_per_image;
  const long long place = static_cast<long long>(blockIdx.x % blocks_per_image) * kWarps + warp_index();
  if (place < places && place < edge_starts[b * (nodes + 1) + nodes]) {
    const long long i = edge_index[2 * b * places + place], j = edge_index[(2 * b + 1) * places + place];
    const int* const own = counters + b * nodes * kCounters;
    const double value = likeness(own + i * kCounters, own + j * kCounters);
    if (lane_index() == 0) {
      w[b * places + place] = value;
      atomicMin(&range[0], static_cast<unsigned long long>(__double_as_longlong(value)));
      atomicMax(&range[1], static_cast<unsigned long long>(__double_as_longlong(value)));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && range[0] <= range[1]) {
    atomicMin(&extremes[2 * b], range[0]);
    atomicMax(&extremes[2 * b + 1], range[1]);
  }
}

__device__ __forceinline__ double excess(double w, double lowest) { return max(w - 0.8 * lowest, 0.0); }

// One thread for a place. weight: [B, E], NaN for an image with more edges than places. num_edges: [B].
__global__ void __launch_bounds__(kThreads)
    finish(const int* __restrict__ edge_starts, const double* __restrict__ w,
           const unsigned long long* __restrict__ extremes, int nodes, long long places, unsigned blocks_per_image,
           long long* __restrict__ edge_index, float* __restrict__ weight, long long* __restrict__ num_edges) {
  const long long b = blockIdx.x / blocks_per_image;
  const long long place = static_cast<long long>(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const long long found = edge_starts[b * (nodes + 1) + nodes];
  if (place == 0) num_edges[b] = found;
  if (place >= places) return;
  double value = 0;
  if (place < found) {
    // The function grows with w: the largest excess is that of the largest w.
    const double lowest = __longlong_as_double(static_cast<long long>(extremes[2 * b]));
    const double highest = excess(__longlong_as_double(static_cast<long long>(extremes[2 * b + 1])), lowest);
    value = 0.8 * excess(w[b * places + place], lowest) / (highest > 0 ? highest : 1.0);
  } else {
    edge_index[2 * b * places + place] = 0;
    edge_index[(2 * b + 1) * places + place] = 0;
  }
  weight[b * places + place] = found > places ? nanf("") : static_cast<float>(value);
}

}  // namespace color_affinity
