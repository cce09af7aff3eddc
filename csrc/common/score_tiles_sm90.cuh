// What the wgmma kernels of the pairwise ops share.
//
// A block owns 128 positions of one side, 64 to each of two consumer warpgroups, and walks over tiles of 64 positions of
// the other side, which one warp of a third warpgroup copies into a ring of buffers. Scores are in units of log 2
// (`factor` = scale / ln 2 > 0); a logsumexp in these units is called lse2. Positions that are no state (masked, or past
// the end) are taken out by bits or by an lse2 of infinity; their rows are zeros.
#pragma once

#include "common/sm90.cuh"

namespace sm90 {

constexpr int kOwned = 128, kTile = 64;
constexpr int kThreads = 3 * kWarpgroup;
// 65536 registers: 128 (2 * 240 + 24) of them.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
// Arrivals that free a buffer: one of each consumer warp.
constexpr int kConsumerWarps = 8;

constexpr float kInfinity = __builtin_huge_valf();

// Same in all threads of a warp, and known to be.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

// Bit i: position first + i is a state. Of a whole warp; mask [n] or null.
__device__ __forceinline__ unsigned long long valid_positions(const bool* mask, int first, int n) {
  const int low = first + static_cast<int>(threadIdx.x % 32), high = low + 32;
  const bool low_valid = low < n && (mask == nullptr || mask[low]);
  const bool high_valid = high < n && (mask == nullptr || mask[high]);
  return __ballot_sync(0xffffffffu, low_valid) |
         static_cast<unsigned long long>(__ballot_sync(0xffffffffu, high_valid)) << 32;
}

__device__ __forceinline__ bool is_valid(const bool* mask, int position, int n) {
  return position < n && (mask == nullptr || mask[position]);
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

// Over the four threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// s to -infinity where no bit stands.
__device__ __forceinline__ void keep_bits(float (&s)[32], unsigned long long bits) {
  if (bits == ~0ull) return;
  bits >>= threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((bits >> (8 * j + i % 2) & 1) == 0) s[4 * j + i] = -kInfinity;
    }
  }
}

// The online softmax of the two rows of a thread; a total is the thread's share of the row's.
struct Softmax {
  float peak[2] = {-kInfinity, -kInfinity};  // of products, without `factor`
  float total[2] = {0.0f, 0.0f};

  // Products s become weights exp2(factor s - new peak); decay: the factor for what was summed before.
  __device__ __forceinline__ void take(float (&s)[32], float factor, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = peak[half];
#pragma unroll
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
      most = row_max(most);
      // A row without a valid key so far: -inf - -inf would be NaN.
      const float shift = most == -kInfinity ? 0.0f : most * factor;
      decay[half] = exp2_approximate(peak[half] * factor - shift);
      peak[half] = most;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; ++i) {
          s[i] = exp2_approximate(s[i] * factor - shift);
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
    const unsigned got = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? got : v[i];
    v[i + 1] = odd ? v[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + 2], 2);
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

// Rows for TMA: out [B, n, width] contiguous, zeros where a position is no state. Strides in elements, width a multiple
// of 8; `wide`: columns are adjacent and rows start at multiples of 16 bytes.
template <class T>
struct Rows {
  const T* from;
  long long batch, row, column;
  const bool* mask;  // [B, n] or null
  T* out;
  long long parts;  // B n width / 8
  int n, width;
  bool wide;
};
constexpr int kCopyThreads = 256;

template <class T>
__global__ void copy_rows(const Rows<T> w) {
  const long long part = static_cast<long long>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (part >= w.parts) return;
  const long long position = part / (w.width / 8);
  const int column = static_cast<int>(part % (w.width / 8)) * 8;
  unsigned v[4] = {0, 0, 0, 0};
  if (w.mask == nullptr || w.mask[position]) {
    const T* const from = w.from + position / w.n * w.batch + position % w.n * w.row + column * w.column;
    if (w.wide) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = from[2 * i * w.column].bits | static_cast<unsigned>(from[(2 * i + 1) * w.column].bits) << 16;
      }
    }
  }
  *reinterpret_cast<uint4*>(w.out + part * 8) = make_uint4(v[0], v[1], v[2], v[3]);
}

}  // namespace sm90
