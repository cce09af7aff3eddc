// random_walk on Hopper: wgmma products of tiles that TMA copies. docs/kernels/random_walk.md, "Deep dive: Hopper".
// csrc/common/score_tiles_sm90.cuh says how a block works.
#pragma once

#include "common/score_tiles_sm90.cuh"

namespace random_walk {
namespace hopper {

using namespace sm90;

// ---- P V, or P^T G

// Rows of `out` are contiguous; what a pointer holds stands at the kernel.
template <class T>
struct Walk {
  const bool* mask;  // [B, n] or null
  float* lse2;       // [B, n]
  T* out;            // [B, n, width]
  const T* start;    // [B, n, width] with the strides below; not read where restart is 0
  long long start_batch, start_row;
  int n, width, splits;
  float factor, keep, restart;
};

// Shared memory of `walk`: the owned tile, the ring of tiles, then lse2 and bits of each buffer, and the barriers.
template <int key, int value>
struct WalkMemory {
  static constexpr int kOwnBytes = kOwned * key * 2, kOtherBytes = kTile * key * 2, kWideBytes = kTile * value * 2;
  static constexpr int kStageBytes = kOtherBytes + kWideBytes;
  static constexpr int kSideBytes = 3 * 1024;
  static constexpr int kMost = (kSharedBytes - kSideBytes - kOwnBytes) / kStageBytes;
  static constexpr int kStages = kMost < 6 ? kMost : 6;
  static constexpr int kBytes = kOwnBytes + kStages * kStageBytes + kSideBytes;

  char* own;
  char* stages;
  float* lse2;               // [stages, 64]
  unsigned long long* bits;  // [stages]
  Barrier* own_full;
  Barrier* full;   // [stages]
  Barrier* empty;  // [stages]

  __device__ __forceinline__ explicit WalkMemory(char* memory) {
    own = memory;
    stages = own + kOwnBytes;
    lse2 = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    bits = reinterpret_cast<unsigned long long*>(lse2 + kStages * kTile);
    own_full = bits + kStages;
    full = own_full + 1;
    empty = full + kStages;
  }
  __device__ __forceinline__ char* other(int stage) const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ char* wide(int stage) const { return other(stage) + kOtherBytes; }
};

// Copies the owned tile, and tile after tile of the other side; one warp.
template <int key, int value, bool transposed>
__device__ __forceinline__ void walk_copies(const WalkMemory<key, value>& memory, const TensorMap& own,
                                            const TensorMap& other, const TensorMap& wide, const bool* mask,
                                            const float* lse2, int n, int first, int column, int batch) {
  using Memory = WalkMemory<key, value>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) {
    arrive_expect(memory.own_full, Memory::kOwnBytes);
#pragma unroll
    for (int slab = 0; slab < key / kSlab; ++slab) {
      load(own, memory.own + slab * kOwned * kSlabRow, memory.own_full, slab * kSlab, first, batch);
    }
  }
  Place place;
  for (int position = 0; position < n; position += kTile) {
    // From global memory before the wait for a buffer.
    const unsigned long long bits = valid_positions(mask, position, n);
    float low = kInfinity, high = kInfinity;
    if (transposed) {
      if (bits >> lane & 1) low = lse2[position + lane];
      if (bits >> (lane + 32) & 1) high = lse2[position + lane + 32];
    }
    Barrier* const full = memory.full + place.stage;
    wait(memory.empty + place.stage, place.parity ^ 1);
    if (transposed) {
      memory.lse2[place.stage * kTile + lane] = low;
      memory.lse2[place.stage * kTile + lane + 32] = high;
    }
    if (lane == 0) {
      memory.bits[place.stage] = bits;
      arrive_expect(full, Memory::kStageBytes);
#pragma unroll
      for (int slab = 0; slab < key / kSlab; ++slab) {
        load(other, memory.other(place.stage) + slab * kTile * kSlabRow, full, slab * kSlab, position, batch);
      }
#pragma unroll
      for (int slab = 0; slab < value / kSlab; ++slab) {
        load(wide, memory.wide(place.stage) + slab * kTile * kSlabRow, full, column + slab * kSlab, position, batch);
      }
    } else {
      arrive(full);
    }
    place.next(Memory::kStages);
  }
}

// Products of scores become weights exp2(score - lse2) in place; lse2: of the tile's columns.
__device__ __forceinline__ void column_weights(float (&s)[32], const float* lse2, float factor) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 column = *reinterpret_cast<const float2*>(lse2 + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s[4 * j + 2 * half] = exp2_approximate(s[4 * j + 2 * half] * factor - column.x);
      s[4 * j + 2 * half + 1] = exp2_approximate(s[4 * j + 2 * half + 1] * factor - column.y);
    }
  }
}

template <bool transposed>
__device__ __forceinline__ void walk_weights(float (&s)[32], unsigned long long bits, const float* lse2, float factor,
                                             Softmax& softmax, float (&decay)[2]) {
  if constexpr (transposed) {
    column_weights(s, lse2, factor);
  } else {
    keep_bits(s, bits);
    softmax.take(s, factor, decay);
  }
}

// out = keep P wide + restart start of 128 rows and `value` columns, with lse2 written; or, transposed,
// out = keep P^T wide + restart start with lse2 read. own [B, n, key] in boxes of 128 rows: q, transposed k;
// other [B, n, key] in boxes of 64: k, transposed q; wide [B, n, width] in boxes of 64: v, transposed g.
template <class T, int key, int value, bool transposed>
__global__ void __launch_bounds__(kThreads, 1)
    walk(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
         const __grid_constant__ TensorMap wide, const Walk<T> w) {
  using Memory = WalkMemory<key, value>;
  const Memory memory(shared_memory());
  const int blocks = (w.n + kOwned - 1) / kOwned, tiles = (w.n + kTile - 1) / kTile;
  const int block = static_cast<int>(blockIdx.x);
  const int first = block % blocks * kOwned, column = block / blocks % w.splits * value;
  const int batch = block / blocks / w.splits;
  const bool* const mask = w.mask == nullptr ? nullptr : w.mask + static_cast<long long>(batch) * w.n;
  float* const lse2 = w.lse2 + static_cast<long long>(batch) * w.n;
  const int warp = warp_of_block();

  if (threadIdx.x == 0) {
    init(memory.own_full, 1);
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      init(memory.full + stage, 32);
      init(memory.empty + stage, kConsumerWarps);
    }
    fence_init();
  }
  __syncthreads();

  if (warp < 4) {
    give_registers<kProducerRegisters>();
    if (warp == 0) {
      walk_copies<key, value, transposed>(memory, own, other, wide, mask, lse2, w.n, first, column, batch);
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const char* const own_tile = memory.own + group * 64 * kSlabRow;
  float sums[value / 2], s[32], decay[2] = {1.0f, 1.0f};
  unsigned weights[4][4];
  Softmax softmax;
#pragma unroll
  for (int i = 0; i < value / 2; ++i) sums[i] = 0.0f;

  // Group 0 issues its products first, then the groups take turns: one computes weights while the other multiplies.
  const int my_turn = 1 + group, other_turn = 2 - group;
  if (group == 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait(memory.own_full, 0);
  Place now, before;
  wait(memory.full, 0);
  named_sync(my_turn, 2 * kWarpgroup);
  fence(s);
  multiply_scores<T, key>(s, own_tile, memory.other(0));
  commit();
  if (group == 0 || tiles > 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait_products<0>(s);
  walk_weights<transposed>(s, memory.bits[0], memory.lse2, w.factor, softmax, decay);
  operands<T>(weights, s);
  now.next(Memory::kStages);
  for (int tile = 1; tile < tiles; ++tile) {
    wait(memory.full + now.stage, now.parity);
    named_sync(my_turn, 2 * kWarpgroup);
    fence(s, sums);
    multiply_scores<T, key>(s, own_tile, memory.other(now.stage));
    commit();
    multiply_weights<T>(sums, weights, memory.wide(before.stage));
    commit();
    if (group == 0 || tile + 1 < tiles) named_arrive(other_turn, 2 * kWarpgroup);
    wait_products<1>(s);
    walk_weights<transposed>(s, memory.bits[now.stage], memory.lse2 + now.stage * kTile, w.factor, softmax, decay);
    wait_products<0>(sums);
    release(memory.empty + before.stage);
    // Peaks soon stand still.
    if (!transposed && __any_sync(0xffffffffu, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < value / 2; ++i) sums[i] *= decay[i / 2 % 2];
    }
    operands<T>(weights, s);
    before = now;
    now.next(Memory::kStages);
  }
  fence(sums);
  multiply_weights<T>(sums, weights, memory.wide(before.stage));
  commit();
  wait_products<0>(sums);

  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + warp % 4 * 16 + group * 64 + lane / 4 + 8 * half;
    const bool valid = is_valid(mask, row, w.n);
    float share = w.keep;
    if (!transposed) {
      const float total = row_sum(softmax.total[half]);
      share = w.keep / (valid ? total : 1.0f);
      if (row < w.n && column == 0 && lane % 4 == 0) {
        lse2[row] = valid ? softmax.peak[half] * w.factor + log2_approximate(total) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < value / 2; ++i) {
      if (i / 2 % 2 == half) sums[i] = valid ? sums[i] * share : 0.0f;
    }
    if (w.restart != 0.0f && valid) {
      const T* const from = w.start + batch * w.start_batch + row * w.start_row;
#pragma unroll
      for (int i = 2 * half; i < value / 2; i += 4) {
        const int at = column + i / 4 * 8 + lane % 4 * 2;
        if (at >= w.width) continue;
        float low, high;
        unpack<T>(*reinterpret_cast<const unsigned*>(from + at), low, high);
        sums[i] += w.restart * low;
        sums[i + 1] += w.restart * high;
      }
    }
    T* const to = w.out + (static_cast<long long>(batch) * w.n + row) * w.width + column;
    store_row(row < w.n ? to : nullptr, sums, half, w.width - column);
  }
}

}  // namespace hopper
}  // namespace random_walk
