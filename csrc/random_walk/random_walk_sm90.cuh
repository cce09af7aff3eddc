// random_walk on Hopper: wgmma products of tiles that TMA copies. docs/kernels/random_walk.md, "Deep dive: Hopper".
// csrc/common/score_tiles_sm90.cuh says how a block works.
#pragma once

#include "common/score_tiles_sm90.cuh"
#include "random_walk/random_walk_params.h"

namespace random_walk::sm90 {

using namespace hopper;

// ---- P V, or P^T G

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
    float low = infinity(), high = infinity();
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

template <bool transposed>
__device__ __forceinline__ void walk_weights(float (&s)[32], unsigned long long bits, const float* lse2, float factor,
                                             Softmax& softmax, float (&decay)[2]) {
  keep_bits(s, bits, -infinity());
  if constexpr (transposed) {
    column_weights(s, lse2, factor);
  } else {
    softmax.take(s, factor, decay);
  }
}

// 128 rows and `value` columns of a step, or of a transposed one. own in boxes of 128 rows: q, transposed k; other in boxes
// of 64: k, transposed q; wide in boxes of 64: x.
template <class T, int key, int value, bool transposed>
__global__ void __launch_bounds__(kBlockThreads, 1)
    walk(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
         const __grid_constant__ TensorMap wide, const Step<T> w) {
  using Memory = WalkMemory<key, value>;
  const Memory memory(shared_memory());
  const Problem& problem = w.problem;
  const int n = problem.n, width = w.y.width;
  const int blocks = (n + kOwned - 1) / kOwned, tiles = (n + kTile - 1) / kTile, splits = (width + value - 1) / value;
  const int block = static_cast<int>(blockIdx.x);
  const int first = block % blocks * kOwned, column = block / blocks % splits * value;
  const int batch = block / blocks / splits;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + static_cast<long long>(batch) * n;
  float* const lse2 = w.lse2 + static_cast<long long>(batch) * n;
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
      walk_copies<key, value, transposed>(memory, own, other, wide, mask, lse2, n, first, column, batch);
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
  const int my_turn = kTurnBarrier + group, other_turn = kTurnBarrier + 1 - group;
  if (group == 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait(memory.own_full, 0);
  Place now, before;
  wait(memory.full, 0);
  clear_rows(memory.wide(0), value / kSlab, memory.bits[0], group);
  named_sync(my_turn, 2 * kWarpgroup);
  fence(s);
  multiply_scores<T, key>(s, own_tile, memory.other(0));
  commit();
  if (group == 0 || tiles > 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait_products<0>(s);
  walk_weights<transposed>(s, memory.bits[0], memory.lse2, problem.factor, softmax, decay);
  operands<T>(weights, s);
  now.next(Memory::kStages);
  for (int tile = 1; tile < tiles; ++tile) {
    wait(memory.full + now.stage, now.parity);
    clear_rows(memory.wide(now.stage), value / kSlab, memory.bits[now.stage], group);
    named_sync(my_turn, 2 * kWarpgroup);
    fence(s, sums);
    multiply_scores<T, key>(s, own_tile, memory.other(now.stage));
    commit();
    multiply_weights<T>(sums, weights, memory.wide(before.stage));
    commit();
    if (group == 0 || tile + 1 < tiles) named_arrive(other_turn, 2 * kWarpgroup);
    wait_products<1>(s);
    walk_weights<transposed>(s, memory.bits[now.stage], memory.lse2 + now.stage * kTile, problem.factor, softmax, decay);
    wait_products<0>(sums);
    release(memory.empty + before.stage);
    // Peaks soon stand still.
    if (!transposed && __any_sync(kWarp, decay[0] != 1.0f || decay[1] != 1.0f)) {
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
  const Rows<T> y = w.y.entry(batch);
  const Rows<const T> start = w.start.entry(batch);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + group * 64 + warp % 4 * 16 + lane / 4 + 8 * half;
    const bool valid = is_valid(mask, row, n);
    float share = problem.keep;
    if (!transposed) {
      const float total = row_sum(softmax.total[half]);
      share = problem.keep / (valid ? total : 1.0f);
      if (row < n && column == 0 && lane % 4 == 0) {
        lse2[row] = valid ? softmax.peak[half] + log2_of(total) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < value / 2; ++i) {
      if (i / 2 % 2 == half) sums[i] = valid ? sums[i] * share : 0.0f;
    }
    if (problem.restart != 0.0f && valid) {
      const T* const from = start.at + row * start.row;
#pragma unroll
      for (int i = 2 * half; i < value / 2; i += 4) {
        const int at = column + i / 4 * 8 + lane % 4 * 2;
        if (at >= width) continue;
        float low, high;
        unpack<T>(*reinterpret_cast<const unsigned*>(from + at), low, high);
        sums[i] += problem.restart * low;
        sums[i + 1] += problem.restart * high;
      }
    }
    store_row(row < n ? y.at + row * y.row + column : nullptr, sums, half, width - column);
  }
}

// ---- gradients of Q and K

// Shared memory of `scores`: owned tiles of the narrow and the wide side, a ring of narrow tiles with lse2, level and
// bits, and a ring of chunks (64 positions x 64 columns) of wide tiles.
template <int key>
struct ScoresMemory {
  static constexpr int kMostChunks = 8, kNarrowStages = 2, kChunks = key == 64 ? 8 : 4;
  static constexpr int kOwnBytes = kOwned * key * 2, kOwnChunk = kOwned * kSlabRow;
  static constexpr int kNarrowBytes = kTile * key * 2, kChunkBytes = kTile * kSlabRow;
  static constexpr int kBytes = kOwnBytes + kMostChunks * kOwnChunk + kNarrowStages * kNarrowBytes +
                                kChunks * kChunkBytes + 2 * 1024;
  static_assert(kBytes <= kSharedBytes);

  char *own, *own_wide, *narrow_ring, *chunk_ring;
  float *lse2, *level;       // [stages, 64]
  unsigned long long* bits;  // [stages]
  Barrier *own_full, *narrow_full, *narrow_empty, *chunk_full, *chunk_empty;

  __device__ __forceinline__ explicit ScoresMemory(char* memory) {
    own = memory;
    own_wide = own + kOwnBytes;
    narrow_ring = own_wide + kMostChunks * kOwnChunk;
    chunk_ring = narrow_ring + kNarrowStages * kNarrowBytes;
    lse2 = reinterpret_cast<float*>(chunk_ring + kChunks * kChunkBytes);
    level = lse2 + kNarrowStages * kTile;
    bits = reinterpret_cast<unsigned long long*>(level + kNarrowStages * kTile);
    own_full = bits + kNarrowStages;
    narrow_full = own_full + 1;
    narrow_empty = narrow_full + kNarrowStages;
    chunk_full = narrow_empty + kNarrowStages;
    chunk_empty = chunk_full + kChunks;
  }
  __device__ __forceinline__ char* narrow(int stage) const { return narrow_ring + stage * kNarrowBytes; }
  __device__ __forceinline__ char* chunk(int stage) const { return chunk_ring + stage * kChunkBytes; }
};

// Copies the owned tiles, then for each tile of the other side its narrow part and the chunks of the wide one; one warp.
template <int key, bool by_query>
__device__ __forceinline__ void scores_copies(const ScoresMemory<key>& memory, const TensorMap& own,
                                              const TensorMap& other, const TensorMap& wide_own,
                                              const TensorMap& wide_other, int n, int chunks, const bool* mask,
                                              const float* lse2, const float* level, int first, int batch) {
  using Memory = ScoresMemory<key>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) {
    arrive_expect(memory.own_full, Memory::kOwnBytes + chunks * Memory::kOwnChunk);
#pragma unroll
    for (int slab = 0; slab < key / kSlab; ++slab) {
      load(own, memory.own + slab * kOwned * kSlabRow, memory.own_full, slab * kSlab, first, batch);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load(wide_own, memory.own_wide + chunk * Memory::kOwnChunk, memory.own_full, chunk * kSlab, first, batch);
    }
  }
  Place narrow, place;
  for (int position = 0; position < n; position += kTile) {
    // From global memory before the wait for a buffer.
    const unsigned long long bits = valid_positions(mask, position, n);
    float lse2_of[2], level_of[2];
    if (!by_query) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool valid = bits >> (lane + 32 * i) & 1;
        lse2_of[i] = valid ? lse2[position + lane + 32 * i] : infinity();
        level_of[i] = valid ? level[position + lane + 32 * i] : 0.0f;
      }
    }
    Barrier* const full = memory.narrow_full + narrow.stage;
    wait(memory.narrow_empty + narrow.stage, narrow.parity ^ 1);
    if (!by_query) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        memory.lse2[narrow.stage * kTile + lane + 32 * i] = lse2_of[i];
        memory.level[narrow.stage * kTile + lane + 32 * i] = level_of[i];
      }
    }
    if (lane == 0) {
      memory.bits[narrow.stage] = bits;
      arrive_expect(full, Memory::kNarrowBytes);
#pragma unroll
      for (int slab = 0; slab < key / kSlab; ++slab) {
        load(other, memory.narrow(narrow.stage) + slab * kTile * kSlabRow, full, slab * kSlab, position, batch);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        wait(memory.chunk_empty + place.stage, place.parity ^ 1);
        arrive_expect(memory.chunk_full + place.stage, Memory::kChunkBytes);
        load(wide_other, memory.chunk(place.stage), memory.chunk_full + place.stage, chunk * kSlab, position, batch);
        place.next(Memory::kChunks);
      }
    } else {
      arrive(full);
    }
    __syncwarp();
    narrow.next(Memory::kNarrowStages);
  }
}

// product [64, 64] (+)= own chunk^T over 64 columns.
template <class T, bool first>
__device__ __forceinline__ void multiply_chunk(float (&product)[32], const char* own, const char* chunk) {
#pragma unroll
  for (int step = 0; step < kSlab / 16; ++step) {
    multiply<T>(product, by_columns(own, kOwned, step), by_columns(chunk, kTile, step), !first || step > 0);
  }
}

// 128 rows of the gradient of q (by_query) or of k. own in boxes of 128 rows and other in boxes of 64: q and k, or k and q;
// wide_own and wide_other likewise: g and x, or x and g. D <= 512.
template <class T, int key, bool by_query>
__global__ void __launch_bounds__(kBlockThreads, 1)
    scores(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
           const __grid_constant__ TensorMap wide_own, const __grid_constant__ TensorMap wide_other,
           const Scores<T> w) {
  using Memory = ScoresMemory<key>;
  const Memory memory(shared_memory());
  const Problem& problem = w.problem;
  const int n = problem.n, chunks = (w.x.width + kSlab - 1) / kSlab;
  const int blocks = (n + kOwned - 1) / kOwned, tiles = (n + kTile - 1) / kTile;
  const int first = static_cast<int>(blockIdx.x) % blocks * kOwned, batch = static_cast<int>(blockIdx.x) / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + start;
  const float *const lse2 = w.lse2 + start, *const level = w.level + start;
  const int warp = warp_of_block();

  if (threadIdx.x == 0) {
    init(memory.own_full, 1);
    for (int stage = 0; stage < Memory::kNarrowStages; ++stage) {
      init(memory.narrow_full + stage, 32);
      init(memory.narrow_empty + stage, kConsumerWarps);
    }
    for (int stage = 0; stage < Memory::kChunks; ++stage) {
      init(memory.chunk_full + stage, 1);
      init(memory.chunk_empty + stage, kConsumerWarps);
    }
    fence_init();
  }
  __syncthreads();

  if (warp < 4) {
    give_registers<kProducerRegisters>();
    if (warp == 0) {
      scores_copies<key, by_query>(memory, own, other, wide_own, wide_other, n, chunks, mask, lse2, level, first,
                                   batch);
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4 - 1, lane = static_cast<int>(threadIdx.x % 32);
  const char* const own_tile = memory.own + group * 64 * kSlabRow;
  const char* const own_wide = memory.own_wide + group * 64 * kSlabRow;
  const int row = first + group * 64 + warp % 4 * 16 + lane / 4;
  float own_lse2[2], own_level[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool valid = is_valid(mask, row + 8 * half, n);
    own_lse2[half] = by_query && valid ? lse2[row + 8 * half] : infinity();
    own_level[half] = by_query && valid ? level[row + 8 * half] : 0.0f;
  }
  float sums[key / 2], s[32], product[32];
  unsigned gradient[4][4];
#pragma unroll
  for (int i = 0; i < key / 2; ++i) sums[i] = 0.0f;

  // In flight: the next tile's scores with this one's share of the sums, then chunk after chunk.
  wait(memory.own_full, 0);
  Place narrow, place;
  wait(memory.narrow_full, 0);
  clear_rows(memory.narrow(0), key / kSlab, memory.bits[0], group);
  fence(s, sums);
  multiply_scores<T, key>(s, own_tile, memory.narrow(0));
  commit();
  for (int tile = 0;; ++tile) {
    wait(memory.chunk_full + place.stage, place.parity);
    fence(product);
    multiply_chunk<T, true>(product, own_wide, memory.chunk(place.stage));
    commit();
    wait_products<1>(s, sums);
    if (tile > 0) release(memory.narrow_empty + (narrow.stage ^ 1));
    // While the chunk is multiplied.
    if (by_query) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = exp2_of(s[i] * problem.factor - own_lse2[i / 2 % 2]);
    } else {
      column_weights(s, memory.lse2 + narrow.stage * kTile, problem.factor);
    }
    int stage_before = place.stage;
    place.next(Memory::kChunks);
    for (int chunk = 1; chunk < chunks; ++chunk) {
      wait(memory.chunk_full + place.stage, place.parity);
      fence();
      multiply_chunk<T, false>(product, own_wide + chunk * Memory::kOwnChunk, memory.chunk(place.stage));
      commit();
      wait_products<1>();
      release(memory.chunk_empty + stage_before);
      stage_before = place.stage;
      place.next(Memory::kChunks);
    }
    wait_products<0>(product);
    release(memory.chunk_empty + stage_before);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 column = {0.0f, 0.0f};
      if (!by_query) {
        column = *reinterpret_cast<const float2*>(memory.level + narrow.stage * kTile + 8 * j + lane % 4 * 2);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 4 * j + 2 * half;
        s[i] *= problem.keep * product[i] - (by_query ? own_level[half] : column.x);
        s[i + 1] *= problem.keep * product[i + 1] - (by_query ? own_level[half] : column.y);
      }
    }
    // The wide rows of no state may hold anything.
    keep_bits(s, memory.bits[narrow.stage], 0.0f);
    operands<T>(gradient, s);
    if (tile + 1 == tiles) break;
    const char* const tile_before = memory.narrow(narrow.stage);
    narrow.next(Memory::kNarrowStages);
    wait(memory.narrow_full + narrow.stage, narrow.parity);
    clear_rows(memory.narrow(narrow.stage), key / kSlab, memory.bits[narrow.stage], group);
    fence(s, sums);
    multiply_scores<T, key>(s, own_tile, memory.narrow(narrow.stage));
    multiply_weights<T>(sums, gradient, tile_before);
    commit();
  }
  fence(sums);
  multiply_weights<T>(sums, gradient, memory.narrow(narrow.stage));
  commit();
  wait_products<0>(sums);

  const Rows<T> out = (by_query ? w.q_grad : w.k_grad).entry(batch);
  const Rows<float> added = (by_query ? w.q_sum : w.k_sum).entry(batch);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half;
    const bool valid = is_valid(mask, at, n);
#pragma unroll
    for (int i = 0; i < key / 2; ++i) {
      if (i / 2 % 2 == half) sums[i] = valid ? sums[i] * w.scale : 0.0f;
    }
    if (w.q_sum.at == nullptr) {
      store_row(at < n ? out.at + at * out.row : nullptr, sums, half, out.width);
      continue;
    }
#pragma unroll
    for (int i = 2 * half; i < key / 2; i += 4) {
      const int column = i / 4 * 8 + lane % 4 * 2;
      if (!valid || column >= added.width) continue;
      float* const to = added.at + at * added.row + column;
      to[0] += sums[i];
      to[1] += sums[i + 1];
    }
  }
}

}  // namespace random_walk::sm90
