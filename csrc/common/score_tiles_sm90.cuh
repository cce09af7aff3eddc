// What the wgmma kernels of the pairwise ops share.
//
// A block owns 128 positions of one side, 64 to each of two consumer warpgroups, and walks over tiles of 64 positions of
// the other side, which one warp of a third warpgroup copies into a ring of buffers. Scores are in units of log 2
// (`factor` = scale / ln 2 > 0); a logsumexp in these units is called lse2. Positions that are no state (masked, or past
// the end) are taken out by bits or by an lse2 of infinity, and their rows are cleared where a product sums over them.
#pragma once

#include "common/sm90.cuh"

namespace hopper {

constexpr int kOwned = 128, kTile = 64;
constexpr int kBlockThreads = 3 * kWarpgroup;
// 65536 registers: 128 (2 * 240 + 24) of them.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
// Named barriers: the turns of the consumer warpgroups, and one inside each.
constexpr int kTurnBarrier = 1, kClearBarrier = 3;
// Arrivals that free a buffer: one of each consumer warp.
constexpr int kConsumerWarps = 8;

// Same in all threads of a warp, and known to be.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / 32, 0); }

// Bit i: position first + i is a state. Of a whole warp; mask [n] or null.
__device__ __forceinline__ unsigned long long valid_positions(const bool* mask, int first, int n) {
  const int low = first + static_cast<int>(threadIdx.x % 32), high = low + 32;
  const bool low_valid = low < n && (mask == nullptr || mask[low]);
  const bool high_valid = high < n && (mask == nullptr || mask[high]);
  return __ballot_sync(kWarp, low_valid) |
         static_cast<unsigned long long>(__ballot_sync(kWarp, high_valid)) << 32;
}

// The warp has read what a barrier guards.
__device__ __forceinline__ void release(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// s [64, 64] = own other^T over `key` columns; own: 64 rows of a tile of 128.
template <class T, int key>
__device__ __forceinline__ void multiply_scores(float (&s)[32], const char* own, const char* other) {
#pragma unroll
  for (int step = 0; step < key / 16; ++step) {
    multiply<T>(s, by_columns(own, kOwned, step), by_columns(other, kTile, step), step > 0);
  }
}

// sums [64, N] += w tile [64, N], w [64, 64] in registers.
template <class T, int count>
__device__ __forceinline__ void multiply_weights(float (&sums)[count], const unsigned (&w)[4][4], const char* tile) {
#pragma unroll
  for (int step = 0; step < 4; ++step) multiply<T>(sums, w[step], by_rows(tile, kTile, step));
}

template <class T>
__device__ __forceinline__ void operands(unsigned (&w)[4][4], const float (&s)[32]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) operand<T>(w[step], s, step);
}

// s to `other` where no bit stands.
__device__ __forceinline__ void keep_bits(float (&s)[32], unsigned long long bits, float other) {
  if (bits == ~0ull) return;
  bits >>= threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((bits >> (8 * j + i % 2) & 1) == 0) s[4 * j + i] = other;
    }
  }
}

// Products of scores become weights exp2(score - lse2) in place; lse2: of the tile's columns.
__device__ __forceinline__ void column_weights(float (&s)[32], const float* lse2, float factor) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 column = *reinterpret_cast<const float2*>(lse2 + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s[4 * j + 2 * half] = exp2_of(s[4 * j + 2 * half] * factor - column.x);
      s[4 * j + 2 * half + 1] = exp2_of(s[4 * j + 2 * half + 1] * factor - column.y);
    }
  }
}

// Rows of a tile [64, 64 slabs] without a bit become zeros, for the products of this consumer warpgroup; `group` 0 or 1.
// The other may do the same at any time.
__device__ __forceinline__ void clear_rows(char* tile, int slabs, unsigned long long bits, int group) {
  if (bits == ~0ull) return;
  const int thread = static_cast<int>(threadIdx.x % kWarpgroup);
  for (int row = thread / 8; row < kTile; row += kWarpgroup / 8) {
    if (bits >> row & 1) continue;
    for (int slab = 0; slab < slabs; ++slab) {
      *reinterpret_cast<uint4*>(tile + (slab * kTile + row) * kSlabRow + thread % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_shared();
  named_sync(kClearBarrier + group, kWarpgroup);
}

// The online softmax of the two rows of a thread; a total is the thread's share of the row's.
struct Softmax {
  float peak[2] = {-infinity(), -infinity()};  // of products times `factor`, rounded
  float total[2] = {0.0f, 0.0f};

  // Products s become weights exp2(factor s - new peak); decay: the factor for what was summed before.
  __device__ __forceinline__ void take(float (&s)[32], float factor, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -infinity();
#pragma unroll
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
      // A difference of rounded numbers: where the peak stands still, decay is exactly 1.
      const float next = fmaxf(peak[half], row_max(most) * factor);
      // A row without a valid key so far: -inf - -inf would be NaN.
      const float shift = next == -infinity() ? 0.0f : next;
      decay[half] = exp2_of(peak[half] - shift);
      peak[half] = next;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; ++i) {
          s[i] = exp2_of(s[i] * factor - shift);
          sum += s[i];
        }
      }
      total[half] = total[half] * decay[half] + sum;
    }
  }
};

// Lane i of a quad gets value i of each of its lanes.
__device__ __forceinline__ void transpose_quad(unsigned (&v)[4]) {
  const bool odd = threadIdx.x % 2 != 0, upper = threadIdx.x / 2 % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned got = __shfl_xor_sync(kWarp, odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? got : v[i];
    v[i + 1] = odd ? v[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned got = __shfl_xor_sync(kWarp, upper ? v[i] : v[i + 2], 2);
    v[i] = upper ? got : v[i];
    v[i + 2] = upper ? v[i + 2] : got;
  }
}

// Writes half `half` of d [64, N] to `row`, the thread's row from the first of its N columns; columns from `columns`
// on are left out (a multiple of 8). All lanes of a warp call it, those without a row with null.
template <class T, int count>
__device__ __forceinline__ void store_row(T* row, const float (&d)[count], int half, int columns) {
#pragma unroll
  for (int part = 0; part < count / 16; ++part) {
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack<T>(d[16 * part + 4 * i + 2 * half], d[16 * part + 4 * i + 2 * half + 1]);
    transpose_quad(v);
    const int column = 32 * part + static_cast<int>(threadIdx.x % 4) * 8;
    if (row != nullptr && column < columns) *reinterpret_cast<uint4*>(row + column) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

}  // namespace hopper
