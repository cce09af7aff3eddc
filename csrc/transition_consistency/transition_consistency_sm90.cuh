// transition_consistency on Hopper: wgmma products of tiles that TMA copies. docs/kernels/transition_consistency.md, "Deep
// dive: Hopper". csrc/common/score_tiles_sm90.cuh says how a block works; here it owns positions of two matrices, image and
// target, and a tile is of two as well.
#pragma once

#include "common/score_tiles_sm90.cuh"
#include "transition_consistency/transition_consistency_params.h"

namespace transition_consistency::sm90 {

using namespace hopper;
using mma_sm80::exp2_shared;
using mma_sm80::kHidden;

// One exponential in so many is a polynomial: 10 instructions for one that occupies its unit for 8 cycles of a scheduler.
// With 8 of a thread's 64, both take about the same time; docs count the instructions.
constexpr int kShare = 8;
// Of scores in units of log 2, before a key was seen: above that of a hidden key, below all others.
constexpr float kUnseen = -1e20f, kLeastFactor = 1e-6f;

// Shared memory: the owned tiles, the ring of tiles, then numbers of their positions, bits of each buffer, and the barriers.
template <int key>
struct Memory {
  static constexpr int kNumbers = 4, kStages = 4;
  static constexpr int kOwnBytes = kOwned * key * 2, kOtherBytes = kTile * key * 2, kStageBytes = 2 * kOtherBytes;
  static constexpr int kBytes = 2 * kOwnBytes + kStages * (kStageBytes + kNumbers * kTile * 4) + 1024;
  static_assert(kBytes <= kSharedBytes);

  char *own_tiles, *stages;
  float* numbers_ring;       // [stages, numbers, 64]
  unsigned long long* bits;  // [stages]
  Barrier *own_full, *full, *empty;

  __device__ __forceinline__ explicit Memory(char* memory) {
    own_tiles = memory;
    stages = own_tiles + 2 * kOwnBytes;
    numbers_ring = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    bits = reinterpret_cast<unsigned long long*>(numbers_ring + kStages * kNumbers * kTile);
    own_full = bits + kStages;
    full = own_full + 1;
    empty = full + kStages;
  }
  // Of the image (side 0) or the target.
  __device__ __forceinline__ char* own(int side) const { return own_tiles + side * kOwnBytes; }
  __device__ __forceinline__ char* other(int stage, int side) const {
    return stages + stage * kStageBytes + side * kOtherBytes;
  }
  __device__ __forceinline__ float* numbers(int stage) const { return numbers_ring + stage * kNumbers * kTile; }

  __device__ __forceinline__ void set_up() const {
    if (threadIdx.x == 0) {
      init(own_full, 1);
      for (int stage = 0; stage < kStages; ++stage) {
        init(full + stage, 32);
        init(empty + stage, kConsumerWarps);
      }
      fence_init();
    }
    __syncthreads();
  }
};

// Copies the owned tiles, and tile after tile of the other side; one warp. read(numbers, position): the `count` numbers
// of a state; those of what is no state are 0.
template <int key, int count, class Read>
__device__ __forceinline__ void copies(const Memory<key>& memory, const TensorMap& own, const TensorMap& other,
                                       const TensorMap& own_target, const TensorMap& other_target, const bool* mask,
                                       int n, int first, int batch, const Read& read) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) {
    arrive_expect(memory.own_full, 2 * Memory<key>::kOwnBytes);
#pragma unroll
    for (int slab = 0; slab < key / kSlab; ++slab) {
      load(own, memory.own(0) + slab * kOwned * kSlabRow, memory.own_full, slab * kSlab, first, batch);
      load(own_target, memory.own(1) + slab * kOwned * kSlabRow, memory.own_full, slab * kSlab, first, batch);
    }
  }
  Place place;
  for (int position = 0; position < n; position += kTile) {
    // From global memory before the wait for a buffer.
    const unsigned long long bits = valid_positions(mask, position, n);
    float low[count + 1] = {}, high[count + 1] = {};
    if (count > 0) {
      if (bits >> lane & 1) read(low, position + lane);
      if (bits >> (lane + 32) & 1) read(high, position + lane + 32);
    }
    Barrier* const full = memory.full + place.stage;
    wait(memory.empty + place.stage, place.parity ^ 1);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      memory.numbers(place.stage)[i * kTile + lane] = low[i];
      memory.numbers(place.stage)[i * kTile + lane + 32] = high[i];
    }
    if (lane == 0) {
      memory.bits[place.stage] = bits;
      arrive_expect(full, Memory<key>::kStageBytes);
#pragma unroll
      for (int slab = 0; slab < key / kSlab; ++slab) {
        load(other, memory.other(place.stage, 0) + slab * kTile * kSlabRow, full, slab * kSlab, position, batch);
        load(other_target, memory.other(place.stage, 1) + slab * kTile * kSlabRow, full, slab * kSlab, position, batch);
      }
    } else {
      arrive(full);
    }
    place.next(Memory<key>::kStages);
  }
}

// Scores of both matrices [64, 64]; own_row: the first of the warpgroup.
template <class T, int key>
__device__ __forceinline__ void multiply_both(float (&s)[32], float (&target)[32], const Memory<key>& memory,
                                              int own_row, int stage) {
  multiply_scores<T, key>(s, memory.own(0) + own_row * kSlabRow, memory.other(stage, 0));
  multiply_scores<T, key>(target, memory.own(1) + own_row * kSlabRow, memory.other(stage, 1));
}

// ---- both softmaxes and the mean gap

// Of the two rows of a thread; totals and excess are the thread's share of the row's. Gaps are of products, without `factor`.
struct Divergence {
  float shift[2] = {kUnseen, kUnseen}, total[2] = {};
  float shift_target[2] = {kUnseen, kUnseen}, total_target[2] = {}, excess[2] = {};

  __device__ __forceinline__ static float highest(const float (&s)[32], int half) {
    float most = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
    for (int j = 1; j < 8; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    return row_max(most);
  }

  __device__ __forceinline__ void add(const float (&s)[32], const float (&target)[32], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = shift[half], before_target = shift_target[half];
      shift[half] = fmaxf(before, highest(s, half) * factor);
      shift_target[half] = fmaxf(before_target, highest(target, half) * factor);
      const float decay_target = exp2_of(before_target - shift_target[half]);
      total[half] *= exp2_of(before - shift[half]);
      total_target[half] *= decay_target;
      excess[half] *= decay_target;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; ++i) {
          const float weight = exp2_shared<kShare>(fmaf(s[i], factor, -shift[half]), i);
          const float weight_target = exp2_shared<kShare>(fmaf(target[i], factor, -shift_target[half]), i);
          total[half] += weight;
          total_target[half] += weight_target;
          excess[half] = fmaf(weight_target, target[i] - s[i], excess[half]);
        }
      }
    }
  }
};

// 128 rows of kl, P_ii, P'_ii and both logsumexps. own in boxes of 128 rows: q; other in boxes of 64: k.
template <class T, int key>
__global__ void __launch_bounds__(kBlockThreads, 1)
    divergences(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
                const __grid_constant__ TensorMap own_target, const __grid_constant__ TensorMap other_target,
                const Divergences<T> all) {
  const Memory<key> memory(shared_memory());
  const Problem<T>& problem = all.problem;
  const int n = problem.n, blocks = (n + kOwned - 1) / kOwned, tiles = (n + kTile - 1) / kTile;
  const int first = static_cast<int>(blockIdx.x) % blocks * kOwned, batch = static_cast<int>(blockIdx.x) / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + start;
  const int warp = warp_of_block();
  memory.set_up();

  if (warp < 4) {
    give_registers<kProducerRegisters>();
    if (warp == 0) {
      copies<key, 0>(memory, own, other, own_target, other_target, mask, n, first, batch, [](float*, int) {});
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4 - 1, lane = static_cast<int>(threadIdx.x % 32);
  // Of the warpgroup's rows, and the tile on their diagonal.
  const int row = warp % 4 * 16 + lane / 4, own_tile = first / kTile + group;
  Divergence sums;
  float diagonal[2] = {}, diagonal_target[2] = {};

  Place started, ended;
  // The products of the next tile run while this one's exponentials are computed.
  const auto issue = [&](float (&s)[32], float (&target)[32]) {
    wait(memory.full + started.stage, started.parity);
    const unsigned long long bits = memory.bits[started.stage];
    fence(s, target);
    multiply_both<T, key>(s, target, memory, group * 64, started.stage);
    commit();
    started.next(Memory<key>::kStages);
    return bits;
  };
  const auto take = [&](float (&s)[32], float (&target)[32], unsigned long long bits, int tile) {
    release(memory.empty + ended.stage);
    ended.next(Memory<key>::kStages);
    // The same in both: gaps of 0.
    keep_bits(s, bits, kHidden);
    keep_bits(target, bits, kHidden);
    sums.add(s, target, problem.factor);
    // Afterwards: the branch keeps ptxas from moving exponentials behind the wait for the next products.
    if (tile == own_tile) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 != row + i / 2 % 2 * 8) continue;
        diagonal[i / 2 % 2] = s[i];
        diagonal_target[i / 2 % 2] = target[i];
      }
    }
  };
  float s[32], target[32], s_next[32], target_next[32];
  wait(memory.own_full, 0);
  int tile = 0;
  for (; tile + 1 < tiles; tile += 2) {
    const unsigned long long bits = issue(s, target), bits_next = issue(s_next, target_next);
    wait_products<1>(s, target);
    take(s, target, bits, tile);
    wait_products<0>(s_next, target_next);
    take(s_next, target_next, bits_next, tile + 1);
  }
  if (tile < tiles) {
    const unsigned long long bits = issue(s, target);
    wait_products<0>(s, target);
    take(s, target, bits, tile);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = row_sum(sums.total[half]), total_target = row_sum(sums.total_target[half]);
    const float excess = row_sum(sums.excess[half]) * problem.factor;
    const float same = row_sum(diagonal[half]), same_target = row_sum(diagonal_target[half]);
    const int position = first + group * 64 + row + 8 * half;
    if (position >= n || lane % 4 != 0) continue;
    const bool valid = is_valid(mask, position, n);
    const float log_total = log2_of(total), log_total_target = log2_of(total_target);
    const float lse = sums.shift[half] + log_total, lse_target = sums.shift_target[half] + log_total_target;
    // Shifts first: they nearly cancel the mean gap where few keys have all the weight.
    const float divergence =
        excess / total_target - (sums.shift_target[half] - sums.shift[half]) - (log_total_target - log_total);
    const long long at = start + position;
    all.kl[at] = valid ? divergence * 0.693147180559945f : 0.0f;  // ln 2
    all.diagonal[at] = valid ? exp2_of(fmaf(same, problem.factor, -lse)) : 0.0f;
    all.diagonal_target[at] = valid ? exp2_of(fmaf(same_target, problem.factor, -lse_target)) : 0.0f;
    all.lse2[at] = valid ? lse : 0.0f;
    all.lse2_target[at] = valid ? lse_target : 0.0f;
  }
}

// ---- gradients of Q and K

// 128 rows of the gradient of q (by_query) or of k. own in boxes of 128 rows and other in boxes of 64: q and k, or k and q.
template <class T, int key, bool by_query>
__global__ void __launch_bounds__(kBlockThreads, 1)
    scores(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
           const __grid_constant__ TensorMap own_target, const __grid_constant__ TensorMap other_target,
           const Scores<T> all) {
  const Memory<key> memory(shared_memory());
  const Problem<T>& problem = all.problem;
  const int n = problem.n, blocks = (n + kOwned - 1) / kOwned, tiles = (n + kTile - 1) / kTile;
  const int first = static_cast<int>(blockIdx.x) % blocks * kOwned, batch = static_cast<int>(blockIdx.x) / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + start;
  const int warp = warp_of_block();
  memory.set_up();

  // Of a query: lse2, lse2_target, kl_grad, trace_grad.
  const auto read = [&](float* to, int position) {
    to[0] = all.lse2[start + position];
    to[1] = all.lse2_target[start + position];
    to[2] = all.kl_grad[start + position];
    to[3] = all.trace_grad[start + position];
  };
  if (warp < 4) {
    give_registers<kProducerRegisters>();
    if (warp == 0) {
      copies<key, by_query ? 0 : 4>(memory, own, other, own_target, other_target, mask, n, first, batch, read);
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4 - 1, lane = static_cast<int>(threadIdx.x % 32);
  const int row = first + group * 64 + warp % 4 * 16 + lane / 4;
  float numbers[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (by_query && is_valid(mask, row + 8 * half, n)) read(numbers[half], row + 8 * half);
  }
  float sums[key / 2], s[32], target[32];
  unsigned gradient[4][4];
#pragma unroll
  for (int i = 0; i < key / 2; ++i) sums[i] = 0.0f;

  // Products s and target become the gradient of the scores, in s.
  const auto differentiate = [&](int stage) {
    const float* const other_numbers = memory.numbers(stage) + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float column[4][2] = {};
      if (!by_query) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 both = *reinterpret_cast<const float2*>(other_numbers + k * kTile + 8 * j);
          column[k][0] = both.x;
          column[k][1] = both.y;
        }
      }
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        float query[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) query[k] = by_query ? numbers[i / 2 % 2][k] : column[k][i % 2];
        const float p = exp2_shared<kShare>(fmaf(s[i], problem.factor, -query[0]), i);
        const float p_target = exp2_shared<kShare>(fmaf(target[i], problem.factor, -query[1]), i);
        s[i] = fmaf(query[2], p - p_target, -query[3] * p);
      }
    }
    // What is no state may hold anything.
    keep_bits(s, memory.bits[stage], 0.0f);
  };

  // As in `walk`: group 0 issues its products first, then the groups take turns, so that one computes exponentials while
  // the other's products run; and each its own while the last tile is added to its sums.
  const int my_turn = kTurnBarrier + group, other_turn = kTurnBarrier + 1 - group;
  if (group == 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait(memory.own_full, 0);
  Place now, before;
  wait(memory.full, 0);
  clear_rows(memory.other(0, 0), key / kSlab, memory.bits[0], group);
  named_sync(my_turn, 2 * kWarpgroup);
  fence(s, target);
  multiply_both<T, key>(s, target, memory, group * 64, 0);
  commit();
  if (group == 0 || tiles > 1) named_arrive(other_turn, 2 * kWarpgroup);
  wait_products<0>(s, target);
  differentiate(0);
  operands<T>(gradient, s);
  now.next(Memory<key>::kStages);
  for (int tile = 1; tile < tiles; ++tile) {
    wait(memory.full + now.stage, now.parity);
    clear_rows(memory.other(now.stage, 0), key / kSlab, memory.bits[now.stage], group);
    named_sync(my_turn, 2 * kWarpgroup);
    fence(s, target, sums);
    multiply_both<T, key>(s, target, memory, group * 64, now.stage);
    commit();
    multiply_weights<T>(sums, gradient, memory.other(before.stage, 0));
    commit();
    if (group == 0 || tile + 1 < tiles) named_arrive(other_turn, 2 * kWarpgroup);
    wait_products<1>(s, target);
    differentiate(now.stage);
    wait_products<0>(sums);
    release(memory.empty + before.stage);
    operands<T>(gradient, s);
    before = now;
    now.next(Memory<key>::kStages);
  }
  fence(sums);
  multiply_weights<T>(sums, gradient, memory.other(before.stage, 0));
  commit();
  wait_products<0>(sums);

  const Rows<T> out = (by_query ? all.q_grad : all.k_grad).entry(batch);
  const Rows<const T> diagonal = (by_query ? problem.k : problem.q).entry(batch);
  const float unit = all.scale * *all.unit;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = row + 8 * half;
    const bool valid = is_valid(mask, position, n);
    // trace_grad on the diagonal, as the tiles round it: with one key both cancel.
    const float trace = valid ? all.trace_grad[start + position] : 0.0f;
    const float rounded = widen(T{static_cast<unsigned short>(pack<T>(trace, 0.0f))});
    const T* const same = diagonal.at + position * diagonal.row;
#pragma unroll
    for (int i = 2 * half; i < key / 2; i += 4) {
      const int column = i / 4 * 8 + lane % 4 * 2;
      float low = 0.0f, high = 0.0f;
      if (valid && column < out.width) unpack<T>(*reinterpret_cast<const unsigned*>(same + column), low, high);
      sums[i] = valid ? unit * fmaf(rounded, low, sums[i]) : 0.0f;
      sums[i + 1] = valid ? unit * fmaf(rounded, high, sums[i + 1]) : 0.0f;
    }
    store_row(position < n ? out.at + position * out.row : nullptr, sums, half, out.width);
  }
}

}  // namespace transition_consistency::sm90
