// Kernels of `transition_consistency` on mma.sync and cp.async, for NVIDIA GPUs since Ampere; free of torch and std
// headers.
//
// docs/kernels/transition_consistency.md, "GPU (CUDA C++)", explains the tiles. A block owns 64 rows of one side and walks
// over tiles of 64 of the other, with the scores of both matrices at once; every warp owns 16 whole rows.
#pragma once

#include "common/mma_sm80.cuh"
#include "transition_consistency/transition_consistency_params.h"

namespace transition_consistency {

using namespace mma_sm80;

constexpr int kThreads = 128;
constexpr int kTile = 64;
constexpr int kStages = 2;
constexpr int kMostKeyPanels = 2;  // d <= 128
constexpr int kPanel = panel_bytes(kTile);
// One exponential in so many is a polynomial. Per pair the forward kernel has 10 other float32 operations and the
// gradients 5 to 7, on 128 lanes; the polynomial has 10.
constexpr int kDivergenceShare = 8, kScoresShare = 4;

// Owned rows and stages, both of image and target, and `numbers` for each of the others.
__host__ __device__ constexpr int shared_bytes(int key_panels, int numbers) {
  return (1 + kStages) * 2 * key_panels * kPanel + kStages * numbers * kTile * 4;
}

// The two sides of a block and what it copies. Own: a of the image, then of the target; a stage: the same of b.
template <class T>
struct Tiles {
  Rows<const T> a, b, a_target, b_target;  // of one entry of the batch
  const bool* mask;
  int n, key_panels;
  unsigned char* memory;

  __device__ __forceinline__ unsigned char* own(int side) const { return memory + side * key_panels * kPanel; }
  __device__ __forceinline__ unsigned char* stage(int tile, int side) const {
    return memory + ((1 + tile % kStages) * 2 + side) * key_panels * kPanel;
  }
  __device__ __forceinline__ float* numbers() const {
    return reinterpret_cast<float*>(memory + (1 + kStages) * 2 * key_panels * kPanel);
  }
  __device__ __forceinline__ void copy_own(int first) const {
    copy_rows_async<kTile, kThreads>(own(0), a, first, 0, key_panels, mask, n);
    copy_rows_async<kTile, kThreads>(own(1), a_target, first, 0, key_panels, mask, n);
  }
  __device__ __forceinline__ void copy_stage(int tile) const {
    copy_rows_async<kTile, kThreads>(stage(tile, 0), b, tile * kTile, 0, key_panels, mask, n);
    copy_rows_async<kTile, kThreads>(stage(tile, 1), b_target, tile * kTile, 0, key_panels, mask, n);
  }
  // [16, 64] of the image (side 0) or the target.
  __device__ __forceinline__ void multiply(float (&scores)[1][kTile / 8][4], int tile, int side, int own_row,
                                           int lane) const {
    for (int panel = 0; panel < key_panels; ++panel) {
      multiply_panels<T, 1, kTile>(scores, own(side) + panel * kPanel, own_row, stage(tile, side) + panel * kPanel,
                                   lane);
    }
  }
};

// One online softmax of the rows lane / 4 + 8 h; totals are of this lane's columns only.
struct Softmax {
  float peak[2] = {kHidden, kHidden}, total[2] = {};

  // Scores become weights; `decay` is the factor for what was summed before.
  __device__ __forceinline__ void add(float (&scores)[kTile / 8][4], float (&decay)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = peak[h];
#pragma unroll
      for (int c = 0; c < kTile / 8; ++c) highest = fmaxf(highest, fmaxf(scores[c][2 * h], scores[c][2 * h + 1]));
      highest = row_max(highest);
      decay[h] = exp2_of(peak[h] - highest);
      peak[h] = highest;
      total[h] *= decay[h];
#pragma unroll
      for (int c = 0; c < kTile / 8; ++c) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          scores[c][i] = exp2_shared<kDivergenceShare>(scores[c][i] - highest, 4 * c + i);
          total[h] += scores[c][i];
        }
      }
    }
  }
};

// Rows first .. first + 63: both softmaxes and sum_j exp2(S'_ij) (S'_ij - S_ij), in one pass over the keys.
template <class T>
__global__ void __launch_bounds__(kThreads) divergences(Divergences<T> all) {
  CC4S_DYNAMIC_SHARED(memory);
  const Problem<T>& problem = all.problem;
  const int n = problem.n, lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16;
  const unsigned blocks = (n + kTile - 1) / kTile;
  const int own_tile = blockIdx.x % blocks, first = own_tile * kTile, batch = blockIdx.x / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const Tiles<T> tiles{problem.q.entry(batch),
                       problem.k.entry(batch),
                       problem.q_target.entry(batch),
                       problem.k_target.entry(batch),
                       problem.mask == nullptr ? nullptr : problem.mask + start,
                       n,
                       panels_of(problem.q.width),
                       memory};
  float* const offsets = tiles.numbers();  // added to each column: 0 or kHidden
  const auto offset_of = [&](int tile) {
    return threadIdx.x < kTile && is_valid(tiles.mask, tile * kTile + threadIdx.x, n) ? 0.0f : kHidden;
  };

  tiles.copy_own(first);
  tiles.copy_stage(0);
  commit_copies();
  if (threadIdx.x < kTile) offsets[threadIdx.x] = offset_of(0);

  Softmax own, target;
  float excess[2] = {}, diagonal[2] = {}, diagonal_target[2] = {};
  const int count = static_cast<int>(blocks);
  for (int tile = 0; tile < count; ++tile) {
    wait_for_copies<0>();
    // All see this stage, and none still reads the other.
    __syncthreads();
    const bool more = tile + 1 < count;
    float next_offset = 0.0f;
    if (more) {
      tiles.copy_stage(tile + 1);
      next_offset = offset_of(tile + 1);
    }
    commit_copies();

    float scores[1][kTile / 8][4] = {}, scores_target[1][kTile / 8][4] = {};
    tiles.multiply(scores, tile, 0, own_row, lane);
    tiles.multiply(scores_target, tile, 1, own_row, lane);
    float gaps[kTile / 8][4];
    const float* const offset = offsets + tile % kStages * kTile;
#pragma unroll
    for (int c = 0; c < kTile / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float added = offset[8 * c + 2 * (lane % 4) + i % 2];
        scores[0][c][i] = fmaf(scores[0][c][i], problem.factor, added);
        scores_target[0][c][i] = fmaf(scores_target[0][c][i], problem.factor, added);
        gaps[c][i] = scores_target[0][c][i] - scores[0][c][i];
      }
    }
    if (tile == own_tile) {
#pragma unroll
      for (int c = 0; c < kTile / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * c + 2 * (lane % 4) + i % 2 != own_row + lane / 4 + i / 2 * 8) continue;
          diagonal[i / 2] = scores[0][c][i];
          diagonal_target[i / 2] = scores_target[0][c][i];
        }
      }
    }
    float decay[2];
    own.add(scores[0], decay);
    target.add(scores_target[0], decay);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      excess[h] *= decay[h];
#pragma unroll
      for (int c = 0; c < kTile / 8; ++c) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) excess[h] = fmaf(scores_target[0][c][i], gaps[c][i], excess[h]);
      }
    }
    if (more && threadIdx.x < kTile) offsets[(tile + 1) % kStages * kTile + threadIdx.x] = next_offset;
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = row_sum(own.total[h]), total_target = row_sum(target.total[h]), sum = row_sum(excess[h]);
    const float same = row_sum(diagonal[h]), same_target = row_sum(diagonal_target[h]);
    const int position = first + own_row + 8 * h + lane / 4;
    if (position >= n || lane % 4 != 0) continue;
    const bool valid = is_valid(tiles.mask, position, n);
    const float log_total = log2_of(total), log_total_target = log2_of(total_target);
    const float lse = own.peak[h] + log_total, lse_target = target.peak[h] + log_total_target;
    // Peaks first: they nearly cancel the mean gap where few keys have all the weight.
    const float divergence = sum / total_target - (target.peak[h] - own.peak[h]) - (log_total_target - log_total);
    const long long at = start + position;
    all.kl[at] = valid ? divergence * 0.693147180559945f : 0.0f;  // ln 2
    all.diagonal[at] = valid ? exp2_of(same - lse) : 0.0f;
    all.diagonal_target[at] = valid ? exp2_of(same_target - lse_target) : 0.0f;
    all.lse2[at] = valid ? lse : 0.0f;
    all.lse2_target[at] = valid ? lse_target : 0.0f;
  }
}

// dQ (kByQuery) or dK: 64 rows of one side, summed over the other; P and P' from their logsumexps.
template <class T, bool kByQuery>
__global__ void __launch_bounds__(kThreads) scores(Scores<T> all) {
  // Of each query: -lse2, -lse2_target, kl_grad, trace_grad.
  constexpr int kNumbers = 4;
  CC4S_DYNAMIC_SHARED(memory);
  const Problem<T>& problem = all.problem;
  const int n = problem.n, lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16;
  const unsigned blocks = (n + kTile - 1) / kTile;
  const int first = blockIdx.x % blocks * kTile, batch = blockIdx.x / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const Tiles<T> tiles{(kByQuery ? problem.q : problem.k).entry(batch),
                       (kByQuery ? problem.k : problem.q).entry(batch),
                       (kByQuery ? problem.q_target : problem.k_target).entry(batch),
                       (kByQuery ? problem.k_target : problem.q_target).entry(batch),
                       problem.mask == nullptr ? nullptr : problem.mask + start,
                       n,
                       panels_of(problem.q.width),
                       memory};
  const auto read = [&](float (&to)[kNumbers], int position, bool valid) {
    to[0] = valid ? -all.lse2[start + position] : kHidden;
    to[1] = valid ? -all.lse2_target[start + position] : kHidden;
    to[2] = valid ? all.kl_grad[start + position] : 0.0f;
    to[3] = valid ? all.trace_grad[start + position] : 0.0f;
  };
  // By query only the first of them is needed: 0 or kHidden.
  float* const numbers = tiles.numbers();
  float next[kNumbers] = {};
  const auto read_tile = [&](int tile) {
    const int position = tile * kTile + threadIdx.x;
    if (threadIdx.x >= kTile) return;
    const bool valid = is_valid(tiles.mask, position, n);
    if (kByQuery) {
      next[0] = valid ? 0.0f : kHidden;
    } else {
      read(next, position, valid);
    }
  };
  const auto write_tile = [&](int tile) {
    if (threadIdx.x >= kTile) return;
#pragma unroll
    for (int i = 0; i < (kByQuery ? 1 : kNumbers); ++i) {
      numbers[(tile % kStages * kNumbers + i) * kTile + threadIdx.x] = next[i];
    }
  };

  tiles.copy_own(first);
  tiles.copy_stage(0);
  commit_copies();
  read_tile(0);
  write_tile(0);
  float own[2][kNumbers], own_trace[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int position = first + own_row + 8 * h + lane / 4;
    read(own[h], position, is_valid(tiles.mask, position, n));
    // As the tiles round it: with one key both cancel.
    own_trace[h] = widen(T{static_cast<unsigned short>(pack<T>(own[h][3], 0.0f))});
  }

  float sums[kMostKeyPanels][1][8][4] = {};
  const int count = static_cast<int>(blocks);
  for (int tile = 0; tile < count; ++tile) {
    wait_for_copies<0>();
    // All see this stage, and none still reads the other.
    __syncthreads();
    const bool more = tile + 1 < count;
    if (more) {
      tiles.copy_stage(tile + 1);
      read_tile(tile + 1);
    }
    commit_copies();

    float weights[1][kTile / 8][4] = {}, target[1][kTile / 8][4] = {};
    tiles.multiply(weights, tile, 0, own_row, lane);
    tiles.multiply(target, tile, 1, own_row, lane);
    const float* const number = numbers + tile % kStages * kNumbers * kTile;
#pragma unroll
    for (int c = 0; c < kTile / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 8 * c + 2 * (lane % 4) + i % 2, h = i / 2;
        const float offset = kByQuery ? own[h][0] + number[j] : number[j];
        const float offset_target = kByQuery ? own[h][1] + number[j] : number[kTile + j];
        const float kl_grad = kByQuery ? own[h][2] : number[2 * kTile + j];
        const float trace_grad = kByQuery ? own[h][3] : number[3 * kTile + j];
        const float p = exp2_shared<kScoresShare>(fmaf(weights[0][c][i], problem.factor, offset), 4 * c + i);
        const float p_target =
            exp2_shared<kScoresShare>(fmaf(target[0][c][i], problem.factor, offset_target), 4 * c + i);
        weights[0][c][i] = fmaf(kl_grad, p - p_target, -trace_grad * p);
      }
    }
    unsigned rounded[1][kTile / 16][4];
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) left_of<T>(rounded[0][k], weights[0][2 * k], weights[0][2 * k + 1]);
#pragma unroll
    for (int panel = 0; panel < kMostKeyPanels; ++panel) {
      if (panel < tiles.key_panels) {
        accumulate_panel<T, 1, kTile>(sums[panel], rounded, tiles.stage(tile, 0) + panel * kPanel, lane);
      }
    }
    if (more) write_tile(tile + 1);
  }

  const Rows<T> out = (kByQuery ? all.q_grad : all.k_grad).entry(batch);
  const float unit = all.scale * *all.unit;
#pragma unroll
  for (int panel = 0; panel < kMostKeyPanels; ++panel) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = first + own_row + 8 * h + lane / 4, at = panel * kPanelColumns + 8 * c + 2 * (lane % 4);
        if (position >= n || at >= out.width) continue;
        float low = 0.0f, high = 0.0f;
        if (is_valid(tiles.mask, position, n)) {
          // trace_grad on the diagonal.
          const T* const same = tiles.b.at + position * tiles.b.row + at;
          low = unit * fmaf(own_trace[h], widen(same[0]), sums[panel][0][c][2 * h]);
          high = unit * fmaf(own_trace[h], widen(same[1]), sums[panel][0][c][2 * h + 1]);
        }
        *reinterpret_cast<unsigned*>(out.at + position * out.row + at) = pack<T>(low, high);
      }
    }
  }
}

}  // namespace transition_consistency
