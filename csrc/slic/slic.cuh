// SLIC superpixels in integers, device code. Step numbers are those of the specification in docs/kernels/slic.md, which
// also says why the kernels are as they are; slic_launch.h has their order.
#pragma once

#include "common/strides.cuh"
#include "common/union_find.cuh"
#include "common/warp.cuh"
#include "slic/cells.h"
#include "slic/lab_tables.h"

namespace slic {

using Wide = unsigned long long;

constexpr int kPositionScale = 16;
constexpr int kWeightShift = 20;
constexpr int kIntMax = 0x7fffffff;

// A tile is a part of one row of cells: up to 64 columns, one per thread, in two halves of up to 9 pixels of a column.
constexpr int kTileWidth = 64;
constexpr int kHalves = 2;
constexpr int kRows = 9;
constexpr int kTileThreads = kTileWidth * kHalves;
// Tiles are cut so that they touch at most 18 columns of cells. The candidates for their pixels are those, one more on
// both sides, and the same in the rows above and below.
constexpr int kTileCells = 18;
constexpr int kCandidates = 3 * (kTileCells + 2);
// What is summed over the pixels of a cluster: their number, l, a, b, x, y.
constexpr int kSums = 6;
// Most lanes of a warp add to the same cluster: they take turns on so many copies of its sums.
constexpr int kCopies = 8;

constexpr int kPixelThreads = 256;
constexpr int kMaxMergeThreads = 1024;

struct Problem {
  int height, width, num_segments;
  int rows, cols;                  // of cells
  long long weight;                // Cells::weight
  int tile_width, tiles, chunks;   // tiles along x, and parts of a row of cells along y
  long long pixels, words, table;  // of an image: H W, its bits in words of 32, slots for borders
  long long batch;
};

// All in one allocation, see `Scratch scratch_of` in slic_launch.h. Pixels and regions are numbered within an image; a
// region has the number of its first pixel, its root.
struct Scratch {
  Wide* sums;         // [3, B, rows cols, kSums]
  int2* colors;       // [B, H W]: l | a << 16 and b; 0 and -1 where masked. Gone when borders are listed
  int* parent;        // [B, H W]: a pixel of the same region with a lower number, a root itself; -1 where masked
  int* size;          // [B, H W]: pixels of the region of a root
  Wide* choice;       // [B, H W]: see choice_of; 0 = none
  Wide* border;       // [B, table]: hash table of pairs of regions that touch, see border_of; 0 = free
  int* length;        // [B, table]: pairs of adjacent pixels of a border
  Wide* list_border;  // [B, 2 H W]: borders while the table is made anew
  int* list_length;   // [B, 2 H W]
  unsigned* roots;    // [B, words]: bit p % 32 of word p / 32 is set for a root p
  int* rank;          // [B, words]: segments before the word
  int* regions;       // [B]
};

// ---- Steps 1 to 5: colours, and rounds of centroids and nearest centroids

// Where a thread of a tile works.
struct Place {
  long long image;
  int band;  // row of cells
  // The candidates, row by row: `reach` columns of cells from first_col on, of the rows band - 1 to band + 1. Some may
  // be outside the grid.
  int first_col, reach;
  int tile_y, tile_rows;
  int half, half_rows;  // own half of the tile, and rows of a half; the second may have fewer
  int x, y, rows;       // own pixels: column x, `rows` of them from y on; as many for all lanes of a warp
  int candidate_col;    // of the own cell, among the candidates
  bool inside;          // the tile has a column for this thread; otherwise x is its first one
};

__device__ __forceinline__ Place place_of(const Problem& problem) {
  Place place;
  unsigned rest = blockIdx.x;
  const int tile_x = static_cast<int>(rest % problem.tiles) * problem.tile_width;
  rest /= problem.tiles;
  const int chunk = static_cast<int>(rest % problem.chunks);
  rest /= problem.chunks;
  place.band = static_cast<int>(rest % problem.rows);
  place.image = rest / problem.rows;

  const int begin = cc4s::cell_begin(place.band, problem.height, problem.rows);
  const int end = cc4s::cell_begin(place.band + 1, problem.height, problem.rows);
  const int chunk_rows = (end - begin + problem.chunks - 1) / problem.chunks;
  place.tile_y = begin + chunk * chunk_rows;
  place.tile_rows = max(min(chunk_rows, end - place.tile_y), 0);

  const int column = static_cast<int>(threadIdx.x) % kTileWidth;
  place.half = static_cast<int>(threadIdx.x) / kTileWidth;
  place.half_rows = (place.tile_rows + kHalves - 1) / kHalves;
  place.y = place.tile_y + place.half * place.half_rows;
  place.rows = max(min(place.half_rows, place.tile_rows - place.half * place.half_rows), 0);
  place.inside = column < problem.tile_width && tile_x + column < problem.width;
  place.x = place.inside ? tile_x + column : tile_x;
  place.first_col = cc4s::cell_of(tile_x, problem.width, problem.cols) - 1;
  const int last = min(tile_x + problem.tile_width, problem.width) - 1;
  place.reach = cc4s::cell_of(last, problem.width, problem.cols) + 2 - place.first_col;
  place.candidate_col = cc4s::cell_of(place.x, problem.width, problem.cols) - place.first_col;
  return place;
}

// Of own pixel r in [B, H W].
__device__ __forceinline__ long long offset_of(const Problem& problem, const Place& place, int r) {
  return place.image * problem.pixels + static_cast<long long>(place.y + r) * problem.width + place.x;
}

// A cluster as seen from a cell: 3 (row of cells - own + 1) + column of cells - own + 1.
constexpr int kOwn = 4;

__device__ __forceinline__ int candidate_of(const Place& place, int near) {
  return near / 3 * place.reach + place.candidate_col - 1 + near % 3;
}

// What the candidates of a tile get from its pixels: at most 2^11 with coordinates below 2^20; 32 bits hold the sums.
using Partial = unsigned[kCandidates][kSums][kCopies];

// Pixels of one column and cluster.
struct Run {
  unsigned count, l, a, b, y;
};

__device__ __forceinline__ void clear_partial(const Place& place, Partial& partial) {
  unsigned* values = &partial[0][0][0];
  for (int i = threadIdx.x; i < 3 * place.reach * kSums * kCopies; i += kTileThreads) values[i] = 0;
}

__device__ __forceinline__ void add_run(const Place& place, int near, const Run& run, Partial& partial) {
  unsigned* sum = &partial[candidate_of(place, near)][0][threadIdx.x % kCopies];
  atomicAdd(sum, run.count);
  atomicAdd(sum + kCopies, run.l);
  atomicAdd(sum + 2 * kCopies, run.a);
  atomicAdd(sum + 3 * kCopies, run.b);
  atomicAdd(sum + 4 * kCopies, run.count * static_cast<unsigned>(place.x));
  atomicAdd(sum + 5 * kCopies, run.y);
}

// sums [rows cols, kSums] of the image += those of the tile.
__device__ __forceinline__ void add_partial(const Problem& problem, const Place& place, const Partial& partial,
                                            Wide* sums) {
  for (int i = threadIdx.x; i < 3 * place.reach * kSums; i += kTileThreads) {
    const int candidate = i / kSums, k = i % kSums;
    unsigned total = 0;
    for (int copy = 0; copy < kCopies; ++copy) total += partial[candidate][k][copy];
    if (total == 0) continue;
    // Only clusters of the grid have pixels.
    const long long row = place.band - 1 + candidate / place.reach, col = place.first_col + candidate % place.reach;
    atomicAdd(sums + (row * problem.cols + col) * kSums + k, static_cast<Wide>(total));
  }
}

// near: clusters of the own pixels, -1 where masked or outside. Writes labels, and parents: where the run of the
// pixel's cluster begins in the row, or in the warp. Called by all threads.
__device__ __forceinline__ void write_labels(const Problem& problem, const Place& place, const int (&near)[kRows],
                                             int* parent, int* labels) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= place.rows) break;
    const int row = place.band - 1 + near[r] / 3, col = place.first_col + place.candidate_col - 1 + near[r] % 3;
    const int label = near[r] < 0 ? -1 : row * problem.cols + col;
    const int left = __shfl_up_sync(kAllLanes, label, 1);
    const unsigned starts = __ballot_sync(kAllLanes, lane == 0 || left != label) & (kAllLanes >> (31 - lane));
    if (!place.inside) continue;
    const long long offset = offset_of(problem, place, r);
    const int back = static_cast<int>(lane) - (31 - __clz(static_cast<int>(starts)));
    labels[offset] = label;
    parent[offset] = label < 0 ? -1 : static_cast<int>(offset - place.image * problem.pixels) - back;
  }
}

__device__ __forceinline__ void clear(Wide* values, long long count) {
  const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (long long i = first; i < count; i += threads) values[i] = 0;
}

// [B, rows cols, kSums]; turn: of the three, by which round they are read in.
__device__ __forceinline__ Wide* sums_of(const Problem& problem, const Scratch& scratch, int turn) {
  return scratch.sums + turn % 3 * problem.batch * problem.rows * problem.cols * kSums;
}

// The sums that `begin` adds to, and counters.
__global__ void __launch_bounds__(kPixelThreads) prepare(Problem problem, Scratch scratch) {
  clear(sums_of(problem, scratch, 0), problem.batch * problem.rows * problem.cols * kSums);
  const long long b = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < problem.batch) scratch.regions[b] = 0;
}

struct CubeRoot {
  __device__ int operator()(int t) const {
    return cc4s::lab_root(t, static_cast<int>(cbrtf(static_cast<float>(t) / cc4s::kCubeRootSteps) * (1 << 15)));
  }
};

// image [B, 3, H, W], mask [B, H, W] or null: colours, the cells as clusters (steps 1 and 3) and their sums.
// last: there are no rounds, labels [B, H, W] are these.
__global__ void __launch_bounds__(kTileThreads)
    begin(Problem problem, Scratch scratch, const unsigned char* __restrict__ image, Strides image_at,
          const bool* __restrict__ mask, Strides mask_at, bool last, int* __restrict__ labels) {
  const long long clusters = static_cast<long long>(problem.rows) * problem.cols;
  clear(sums_of(problem, scratch, 1), problem.batch * clusters * kSums);
  const Place place = place_of(problem);
  if (place.tile_rows == 0) return;

  __shared__ int linear[256];
  __shared__ Partial partial;
  for (int i = threadIdx.x; i < 256; i += kTileThreads) linear[i] = cc4s::kLinear[i];
  clear_partial(place, partial);
  __syncthreads();

  unsigned valid = 0;  // bits of the own pixels
  Run run{};
#pragma unroll 1
  for (int r = 0; r < place.rows && place.inside; ++r) {
    const int y = place.y + r;
    int2 color = make_int2(0, -1);
    if (mask == nullptr || mask[mask_at.at(place.image, y, place.x)]) {
      const unsigned char* pixel = image + image_at.at(place.image, y, place.x);
      const cc4s::Lab lab = cc4s::lab_of(linear[pixel[0]], linear[pixel[image_at.channel]],
                                         linear[pixel[2 * image_at.channel]], CubeRoot{});
      color = make_int2(lab.l | lab.a << 16, lab.b);
      valid |= 1u << r;
      ++run.count;
      run.l += static_cast<unsigned>(lab.l);
      run.a += static_cast<unsigned>(lab.a);
      run.b += static_cast<unsigned>(lab.b);
      run.y += static_cast<unsigned>(y);
    }
    scratch.colors[offset_of(problem, place, r)] = color;
  }
  if (valid != 0) add_run(place, kOwn, run, partial);
  __syncthreads();
  add_partial(problem, place, partial, sums_of(problem, scratch, 0) + place.image * clusters * kSums);
  if (!last) return;
  int near[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) near[r] = (valid >> r & 1u) != 0 ? kOwn : -1;
  write_labels(problem, place, near, scratch.parent, labels);
}

__device__ __forceinline__ int rounded_ratio(Wide sum, Wide count) {
  const Wide numerator = 2 * sum + count, denominator = 2 * count;
  // A division of 32 bits takes a third of the time.
  if (numerator >> 32 == 0) {
    return static_cast<int>(static_cast<unsigned>(numerator) / static_cast<unsigned>(denominator));
  }
  return static_cast<int>(numerator / denominator);
}

__device__ __forceinline__ int weighted_square(long long weight, int d) {
  return static_cast<int>((weight * d * d) >> kWeightShift);
}

// Steps 4 and 5 once. turn: number of the round, modulo 3. Reads the sums of this round, adds to those of the next one
// and clears those of the one after, which nobody reads or adds to meanwhile. Five blocks on a multiprocessor: up to 96
// registers, which is what the pixels need.
__global__ void __launch_bounds__(kTileThreads, 5)
    assign(Problem problem, Scratch scratch, int turn, bool last, int* __restrict__ labels) {
  const long long clusters = static_cast<long long>(problem.rows) * problem.cols;
  clear(sums_of(problem, scratch, turn + 2), problem.batch * clusters * kSums);
  const Place place = place_of(problem);
  if (place.tile_rows == 0) return;

  __shared__ int center[kCandidates][5];  // l, a, b, 16 x, 16 y; l = -1: no such cluster, or it is dead
  __shared__ int4 terms[kCandidates];     // -2 l, -2 a, -2 b, l^2 + a^2 + b^2
  // Weighted squared distances along y, for kRows pixels of each half; read by four.
  __shared__ int4 row_terms[kCandidates][kHalves][(kRows + 3) / 4];
  __shared__ Partial partial;
  clear_partial(place, partial);
  const Wide* sums = sums_of(problem, scratch, turn) + place.image * clusters * kSums;
  const int candidates = 3 * place.reach;
  for (int i = threadIdx.x; i < candidates * 5; i += kTileThreads) {
    const int candidate = i / 5, k = i % 5;
    const int row = place.band - 1 + candidate / place.reach, col = place.first_col + candidate % place.reach;
    int value = -1;
    if (row >= 0 && row < problem.rows && col >= 0 && col < problem.cols) {
      const Wide* sum = sums + (static_cast<long long>(row) * problem.cols + col) * kSums;
      if (sum[0] > 0) value = rounded_ratio(k < 3 ? sum[1 + k] : kPositionScale * sum[1 + k], sum[0]);
    }
    center[candidate][k] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < candidates; i += kTileThreads) {
    const int l = center[i][0], a = center[i][1], b = center[i][2];
    // Nothing is closer than what is as far as an int goes.
    terms[i] = l < 0 ? make_int4(0, 0, 0, kIntMax) : make_int4(-2 * l, -2 * a, -2 * b, l * l + a * a + b * b);
  }
  for (int i = threadIdx.x; i < candidates * kHalves * kRows; i += kTileThreads) {
    const int candidate = i / (kHalves * kRows), half = i / kRows % kHalves, r = i % kRows;
    const int row = half * place.half_rows + r;
    const bool used = r < place.half_rows && row < place.tile_rows && center[candidate][0] >= 0;
    const int d = kPositionScale * (place.tile_y + row) - center[candidate][4];
    reinterpret_cast<int*>(row_terms[candidate][half])[r] = used ? weighted_square(problem.weight, d) : 0;
  }
  __syncthreads();

  // Of the own pixels; the loops over them are unrolled, so that they stay in registers.
  int l[kRows], a[kRows], b[kRows], nearest[kRows], near[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int2 color = make_int2(0, -1);
    if (r < place.rows && place.inside) {
      color = scratch.colors[offset_of(problem, place, r)];
    }
    l[r] = color.x & 0xffff;
    a[r] = color.x >> 16;
    b[r] = color.y;
    near[r] = -1;
    // No distance is below that of a masked pixel, or of none, which so keeps its -1.
    nearest[r] = color.y < 0 ? -kIntMax : kIntMax;
  }
  // Clusters in ascending order and a strict comparison: ties go to the lowest id.
#pragma unroll 1
  for (int from_here = 0, candidate = place.candidate_col - 1; from_here < 9; ++from_here) {
    const int4 term = terms[candidate];
    const int d = kPositionScale * place.x - center[candidate][3];
    const int column_term = term.w + (center[candidate][0] < 0 ? 0 : weighted_square(problem.weight, d));
    const int4* row_term = row_terms[candidate][place.half];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int4 four = row_term[r / 4];
      const int dy = r % 4 == 0 ? four.x : r % 4 == 1 ? four.y : r % 4 == 2 ? four.z : four.w;
      // Less the square of the pixel's own colour, which all its distances have: above -2^30 and below 2^31.
      const int distance = column_term + dy + term.x * l[r] + term.y * a[r] + term.z * b[r];
      const bool closer = distance < nearest[r];
      nearest[r] = closer ? distance : nearest[r];
      near[r] = closer ? from_here : near[r];
    }
    candidate += from_here % 3 == 2 ? place.reach - 2 : 1;
  }

  Run run{};
  int current = -1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (near[r] != current) {
      if (current >= 0) add_run(place, current, run, partial);
      run = Run{};
      current = near[r];
    }
    ++run.count;
    run.l += static_cast<unsigned>(l[r]);
    run.a += static_cast<unsigned>(a[r]);
    run.b += static_cast<unsigned>(b[r]);
    run.y += static_cast<unsigned>(place.y + r);
  }
  if (current >= 0) add_run(place, current, run, partial);
  __syncthreads();
  add_partial(problem, place, partial, sums_of(problem, scratch, turn + 1) + place.image * clusters * kSums);
  if (last) write_labels(problem, place, near, scratch.parent, labels);
}

// ---- Step 6: regions

// Hangs the higher root under the lower one; true if this call united two trees.
__device__ __forceinline__ bool unite(int* parent, int i, int j) {
  for (;;) {
    i = find(parent, i);
    j = find(parent, j);
    if (i == j) return false;
    const int low = min(i, j), high = max(i, j);
    const int old = atomicCAS(parent + high, high, low);
    if (old == high) return true;
    // No root any more.
    i = old;
    j = low;
  }
}

// One thread for a pixel; the blocks of an image are whole warps of 32 pixels from the first one.
struct PixelPlace {
  long long image;
  long long p;  // may be past the last
};

__device__ __forceinline__ PixelPlace pixel_of(const Problem& problem) {
  const unsigned blocks = static_cast<unsigned>((problem.pixels + kPixelThreads - 1) / kPixelThreads);
  return {blockIdx.x / blocks, static_cast<long long>(blockIdx.x % blocks) * kPixelThreads + threadIdx.x};
}

// Joins the runs of `write_labels` to regions: once for each pair of runs that touch.
__global__ void __launch_bounds__(kPixelThreads)
    unite_runs(Problem problem, Scratch scratch, const int* __restrict__ labels) {
  const PixelPlace at = pixel_of(problem);
  if (at.p >= problem.pixels) return;
  const long long base = at.image * problem.pixels;
  scratch.size[base + at.p] = 0;
  const int* label = labels + base + at.p;
  if (label[0] < 0) return;
  const int x = static_cast<int>(at.p % problem.width), p = static_cast<int>(at.p);
  const bool left = x > 0 && label[-1] == label[0];
  int* parent = scratch.parent + base;
  // Runs end at the borders of warps.
  if (left && x % problem.tile_width % 32 == 0) unite(parent, p, p - 1);
  if (p < problem.width || label[-problem.width] != label[0]) return;
  // Where the pixels to the left touch as well, they are of the same runs, or joined to them.
  if (!left || label[-problem.width - 1] != label[0]) unite(parent, p, p - problem.width);
}

// How many lanes from this one on, up to the next with `start`. Called by all lanes of a warp.
__device__ __forceinline__ int run_length(bool start) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned later = __ballot_sync(kAllLanes, start) >> 1 >> lane;
  return later == 0 ? 32 - static_cast<int>(lane) : __ffs(static_cast<int>(later));
}

// Parents become roots; roots get their size.
__global__ void __launch_bounds__(kPixelThreads) find_roots(Problem problem, Scratch scratch) {
  const PixelPlace at = pixel_of(problem);
  const long long base = at.image * problem.pixels;
  int root = -1;
  if (at.p < problem.pixels && load(scratch.parent + base + at.p) >= 0) {
    root = find(scratch.parent + base, static_cast<int>(at.p));
    store(scratch.parent + base + at.p, root);
  }
  const unsigned lane = threadIdx.x % 32;
  const int left = __shfl_up_sync(kAllLanes, root, 1);
  const bool start = lane == 0 || left != root;
  const int length = run_length(start);
  if (start && root >= 0) atomicAdd(scratch.size + base + root, length);
  const bool is_root = root >= 0 && root == at.p;
  if (is_root) scratch.choice[base + root] = 0;
  const unsigned bits = __ballot_sync(kAllLanes, is_root);
  if (lane == 0 && at.p < problem.pixels) {
    scratch.roots[at.image * problem.words + at.p / 32] = bits;
    if (bits != 0) atomicAdd(scratch.regions + at.image, __popc(bits));
  }
}

// ---- Steps 7 and 8: borders between regions, and unions

// Two regions, the lower one in front; never 0.
__device__ __forceinline__ Wide border_of(int i, int j) {
  return static_cast<Wide>(min(i, j)) << 32 | static_cast<unsigned>(max(i, j));
}
// 0 within a region and at masked pixels.
__device__ __forceinline__ Wide border_between(int valid, int other) {
  return other < 0 || other == valid ? 0 : border_of(valid, other);
}
__device__ __forceinline__ int first_of(Wide border) { return static_cast<int>(border >> 32); }
__device__ __forceinline__ int second_of(Wide border) { return static_cast<int>(border & 0xffffffffu); }

// The hash table of one image. Only the first `slots` are in use.
struct Borders {
  Wide* border;
  int* length;
  long long slots;
};

// Slots for `count` borders, or as many as there are: those are more than an image can have borders.
__device__ __forceinline__ long long slots_for(const Problem& problem, long long count) {
  return min(2 * count + 1, problem.table);
}

// Regions of an image form a planar graph: at most three times as many borders.
__device__ __forceinline__ Borders borders_of(const Problem& problem, const Scratch& scratch, long long image) {
  return {scratch.border + image * problem.table, scratch.length + image * problem.table,
          slots_for(problem, 3LL * scratch.regions[image])};
}

__device__ __forceinline__ void add_border(const Borders& borders, Wide border, int length) {
  unsigned hash = static_cast<unsigned>(first_of(border)) * 0x9e3779b1u ^ static_cast<unsigned>(second_of(border));
  hash = (hash ^ hash >> 16) * 0x85ebca6bu;
  hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
  long long slot = static_cast<long long>((hash >> 1) * static_cast<Wide>(borders.slots) >> 31);
  for (;;) {
    Wide found = *static_cast<volatile Wide*>(borders.border + slot);
    if (found == 0) found = atomicCAS(borders.border + slot, Wide{0}, border);
    if (found == 0 || found == border) break;
    if (++slot == borders.slots) slot = 0;
  }
  atomicAdd(borders.length + slot, length);
}

__global__ void __launch_bounds__(kPixelThreads) clear_borders(Problem problem, Scratch scratch) {
  const PixelPlace at = pixel_of(problem);
  const Borders borders = borders_of(problem, scratch, at.image);
  const long long threads = (problem.pixels + kPixelThreads - 1) / kPixelThreads * kPixelThreads;
  for (long long slot = at.p; slot < borders.slots; slot += threads) {
    borders.border[slot] = 0;
    borders.length[slot] = 0;
  }
}

__global__ void __launch_bounds__(kPixelThreads) find_borders(Problem problem, Scratch scratch) {
  const PixelPlace at = pixel_of(problem);
  const Borders borders = borders_of(problem, scratch, at.image);
  const int* region = scratch.parent + at.image * problem.pixels + at.p;
  Wide right = 0, down = 0;
  if (at.p < problem.pixels && region[0] >= 0) {
    if ((at.p + 1) % problem.width != 0) right = border_between(region[0], region[1]);
    if (at.p + problem.width < problem.pixels) down = border_between(region[0], region[problem.width]);
  }
  if (right != 0) add_border(borders, right, 1);
  // Borders along a row are added once for all their pixels of the warp.
  const Wide left = __shfl_up_sync(kAllLanes, down, 1);
  const bool start = threadIdx.x % 32 == 0 || left != down;
  const int length = run_length(start);
  if (start && down != 0) add_border(borders, down, length);
}

// Regions in the order of step 8: by size, then by number.
__device__ __forceinline__ Wide order_of(int size, int region) {
  return static_cast<Wide>(size) << 32 | static_cast<unsigned>(region);
}

// Choices of a neighbour: the greatest has the longest border, then the lowest number. Never 0.
__device__ __forceinline__ Wide choice_of(int length, int neighbour) {
  return static_cast<Wide>(length) << 32 | (0xffffffffu - static_cast<unsigned>(neighbour));
}

// One image, for one block.
struct Graph {
  Borders borders;
  int* parent;
  int* size;
  Wide* choice;
  Wide* list_border;
  int* list_length;
  const unsigned* roots;
  long long words;
};

// visit(region, region, length of their border)
template <class Visit>
__device__ __forceinline__ void for_each_border(const Graph& graph, Visit visit) {
  for (long long slot = threadIdx.x; slot < graph.borders.slots; slot += blockDim.x) {
    const Wide border = graph.borders.border[slot];
    if (border != 0) visit(first_of(border), second_of(border), graph.borders.length[slot]);
  }
}

// visit(root); all that were roots before step 7.
template <class Visit>
__device__ __forceinline__ void for_each_region(const Graph& graph, Visit visit) {
  for (long long word = threadIdx.x; word < graph.words; word += blockDim.x) {
    for (unsigned bits = graph.roots[word]; bits != 0; bits &= bits - 1) {
      visit(static_cast<int>(word * 32) + __ffs(static_cast<int>(bits)) - 1);
    }
  }
}

// A round of step 7 or 8, by all threads: regions up to `limit` in order_of unite with their choice; false if there is
// none. alive: regions left, shared.
__device__ inline bool merge_round(const Problem& problem, Graph& graph, Wide limit, int& alive) {
  __shared__ unsigned listed;
  const auto is_selected = [&](int region) { return order_of(graph.size[region], region) <= limit; };
  for_each_border(graph, [&](int i, int j, int length) {
    if (is_selected(i)) atomicMax(graph.choice + i, choice_of(length, j));
    if (is_selected(j)) atomicMax(graph.choice + j, choice_of(length, i));
  });
  if (threadIdx.x == 0) listed = 0;
  __syncthreads();

  int unions = 0;
  for_each_border(graph, [&](int i, int j, int length) {
    if (graph.choice[i] == choice_of(length, j)) unions += unite(graph.parent, i, j);
    if (graph.choice[j] == choice_of(length, i)) unions += unite(graph.parent, i, j);
  });
  if (unions > 0) atomicAdd(&alive, -unions);
  const bool any = __syncthreads_or(unions) != 0;

  for_each_border(graph, [&](int i, int j, int length) {
    graph.choice[i] = graph.choice[j] = 0;
    if (!any) return;
    const int root_i = find(graph.parent, i), root_j = find(graph.parent, j);
    // What is no root any more gives its pixels away, at the first of its borders.
    if (root_i != i) {
      const int pixels = atomicExch(graph.size + i, 0);
      if (pixels > 0) atomicAdd(graph.size + root_i, pixels);
    }
    if (root_j != j) {
      const int pixels = atomicExch(graph.size + j, 0);
      if (pixels > 0) atomicAdd(graph.size + root_j, pixels);
    }
    if (root_i == root_j) return;
    const unsigned place = atomicAdd(&listed, 1u);
    graph.list_border[place] = border_of(root_i, root_j);
    graph.list_length[place] = length;
  });
  __syncthreads();
  if (!any) return false;

  // Borders of regions that are one now are one border.
  graph.borders.slots = slots_for(problem, listed);
  for (long long slot = threadIdx.x; slot < graph.borders.slots; slot += blockDim.x) {
    graph.borders.border[slot] = 0;
    graph.borders.length[slot] = 0;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < listed; i += blockDim.x) {
    add_border(graph.borders, graph.list_border[i], graph.list_length[i]);
  }
  __syncthreads();
  return true;
}

// The count-th smallest order(region) of all regions with has(region), 2^64 - 1 if there are fewer; by all threads.
template <class Has, class Order>
__device__ inline Wide smallest(const Graph& graph, unsigned count, Has has, Order order) {
  constexpr int kBits = 8, kBins = 1 << kBits;
  __shared__ unsigned bins[kBins];
  __shared__ unsigned left;  // to be counted among those that begin with `found`
  __shared__ Wide found;
  if (threadIdx.x == 0) {
    left = count;
    found = 0;
  }
  for (int shift = 64 - kBits; shift >= 0; shift -= kBits) {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for_each_region(graph, [&](int region) {
      if (!has(region)) return;
      const Wide value = order(region);
      // Two shifts: all 64 bits at once is no shift.
      if (value >> shift >> kBits == found) atomicAdd(bins + (value >> shift & (kBins - 1)), 1u);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 0;
      while (bin < kBins && bins[bin] < left) left -= bins[bin++];
      // Too few: only before the first digit is found.
      found = bin == kBins ? ~Wide{0} : found << kBits | static_cast<unsigned>(bin);
    }
    __syncthreads();
    if (found == ~Wide{0}) break;
  }
  return found;
}

// The sum of `value` over the threads before this one; by all threads.
__device__ inline int sum_before(int value) {
  __shared__ int warps[kMaxMergeThreads / 32];
  int sum = sum_up_to_lane(value);
  if (lane_index() == 31) warps[warp_index()] = sum;
  __syncthreads();
  for (int i = 0; i < warp_index(); ++i) sum += warps[i];
  return sum - value;
}

// Steps 7 to 9, one block for an image: afterwards `roots` has a bit for each segment and `rank` the ids.
// turn: number of rounds, modulo 3.
__global__ void __launch_bounds__(kMaxMergeThreads, 1) merge(Problem problem, Scratch scratch, int turn) {
  const long long image = blockIdx.x, base = image * problem.pixels;
  unsigned* roots = scratch.roots + image * problem.words;
  Graph graph{borders_of(problem, scratch, image),
              scratch.parent + base,
              scratch.size + base,
              scratch.choice + base,
              scratch.list_border + 2 * base,
              scratch.list_length + 2 * base,
              roots,
              problem.words};

  __shared__ int alive, clusters;
  __shared__ unsigned valid;
  if (threadIdx.x == 0) {
    alive = scratch.regions[image];
    clusters = 0;
    valid = 0;
  }
  __syncthreads();
  const long long cells = static_cast<long long>(problem.rows) * problem.cols;
  const Wide* sums = sums_of(problem, scratch, turn) + image * cells * kSums;
  for (long long i = threadIdx.x; i < cells; i += blockDim.x) {
    const unsigned count = static_cast<unsigned>(sums[i * kSums]);
    if (count == 0) continue;
    atomicAdd(&clusters, 1);
    atomicAdd(&valid, count);
  }
  __syncthreads();

  // 4 size clusters < valid
  const Wide small = valid == 0 ? 0 : (valid - 1) / (4 * static_cast<Wide>(clusters));
  while (merge_round(problem, graph, small << 32 | 0xffffffffu, alive)) {
  }

  while (alive > problem.num_segments) {
    const unsigned excess = static_cast<unsigned>(alive - problem.num_segments);
    // `choice` marks what has a neighbour.
    for_each_border(graph, [&](int i, int j, int) { graph.choice[i] = graph.choice[j] = 1; });
    __syncthreads();
    const Wide limit = smallest(
        graph, excess, [&](int region) { return graph.choice[region] != 0; },
        [&](int region) { return order_of(graph.size[region], region); });
    for_each_border(graph, [&](int i, int j, int) { graph.choice[i] = graph.choice[j] = 0; });
    __syncthreads();
    if (!merge_round(problem, graph, limit, alive)) break;
  }

  const auto is_alive = [&](int region) { return load(graph.parent + region) == region; };
  const auto largest_first = [&](int region) { return order_of(kIntMax - graph.size[region], region); };
  Wide limit = ~Wide{0};
  if (alive > problem.num_segments) {
    limit = smallest(graph, static_cast<unsigned>(problem.num_segments), is_alive, largest_first);
  }
  __syncthreads();
  // Each thread has words in a row.
  const long long share = (problem.words + blockDim.x - 1) / blockDim.x;
  const long long first = min(threadIdx.x * share, problem.words), end = min(first + share, problem.words);
  int kept = 0;
  for (long long word = first; word < end; ++word) {
    unsigned bits = roots[word];
    for (unsigned rest = bits; rest != 0; rest &= rest - 1) {
      const int region = static_cast<int>(word * 32) + __ffs(static_cast<int>(rest)) - 1;
      if (!is_alive(region) || largest_first(region) > limit) bits ^= rest & (0u - rest);
    }
    roots[word] = bits;
    kept += __popc(bits);
  }
  int before = sum_before(kept);
  for (long long word = first; word < end; ++word) {
    scratch.rank[image * problem.words + word] = before;
    before += __popc(roots[word]);
  }
}

// ---- Step 9: ids

// labels [B, H, W] of clusters become ids of segments.
__global__ void __launch_bounds__(kPixelThreads) number(Problem problem, Scratch scratch, int* __restrict__ labels) {
  const PixelPlace at = pixel_of(problem);
  if (at.p >= problem.pixels) return;
  int* parent = scratch.parent + at.image * problem.pixels;
  int id = -1;
  if (load(parent + at.p) >= 0) {
    const int root = find(parent, static_cast<int>(at.p));
    const long long word = at.image * problem.words + root / 32;
    const unsigned bit = 1u << root % 32;
    if ((scratch.roots[word] & bit) != 0) id = scratch.rank[word] + __popc(scratch.roots[word] & (bit - 1));
  }
  labels[at.image * problem.pixels + at.p] = id;
}

}  // namespace slic
