// Kernels of `random_walk` on mma.sync and cp.async, for NVIDIA GPUs since Ampere; free of torch and std headers.
//
// docs/kernels/random_walk.md, "GPU (CUDA C++)", explains the tiles. A block owns rows of one side (queries, or keys where
// it is transposed) and walks over tiles of the other. Every warp owns whole rows, so that its weights go from one product
// to the next in registers.
#pragma once

#include "common/mma_sm80.cuh"
#include "random_walk/random_walk_params.h"

namespace random_walk {

using namespace mma_sm80;

constexpr int kThreads = 128;
constexpr int kMostKeyPanels = 2;  // d <= 128

// ---- One step, and its transpose

constexpr int kWalkRows = 128, kWalkOthers = 32, kWalkColumns = 128, kWalkStages = 2;

__host__ __device__ constexpr int walk_stage_bytes(int key_panels) {
  return panel_bytes(kWalkOthers) * (key_panels + kWalkColumns / kPanelColumns);
}
__host__ __device__ constexpr int walk_shared_bytes(int key_panels) {
  return panel_bytes(kWalkRows) * key_panels + kWalkStages * (walk_stage_bytes(key_panels) + kWalkOthers * 4);
}

// Rows first .. first + 127 and 128 value columns. Splits of the columns compute the scores again: a 128 x 512 accumulator
// is all registers of an SM.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads) walk(Step<T> step) {
  constexpr int kRowTiles = kWalkRows / (kThreads / 32) / 16, kOthers = kWalkOthers;
  constexpr int kPanels = kWalkColumns / kPanelColumns;
  CC4S_DYNAMIC_SHARED(memory);
  const Problem problem = step.problem;
  const int n = problem.n, lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16 * kRowTiles;
  const unsigned blocks = (n + kWalkRows - 1) / kWalkRows, splits = (step.x.width + kWalkColumns - 1) / kWalkColumns;
  const int first = blockIdx.x % blocks * kWalkRows, column = blockIdx.x / blocks % splits * kWalkColumns;
  const int batch = blockIdx.x / blocks / splits;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + static_cast<long long>(batch) * n;
  float* const lse2 = step.lse2 + static_cast<long long>(batch) * n;
  const Rows<const T> own = (kTransposed ? step.k : step.q).entry(batch), x = step.x.entry(batch);
  const Rows<const T> other = (kTransposed ? step.q : step.k).entry(batch);

  const int key_panels = panels_of(own.width), stage_bytes = walk_stage_bytes(key_panels);
  unsigned char* const stages = memory + panel_bytes(kWalkRows) * key_panels;
  // What is added to each column of scores: 0 or -lse2, or kHidden.
  float* const offsets = reinterpret_cast<float*>(stages + kWalkStages * stage_bytes);

  const auto copy_stage = [&](int tile) {
    unsigned char* const stage = stages + tile % kWalkStages * stage_bytes;
    copy_rows_async<kOthers, kThreads>(stage, other, tile * kOthers, 0, key_panels, mask, n);
    copy_rows_async<kOthers, kThreads>(stage + key_panels * panel_bytes(kOthers), x, tile * kOthers, column, kPanels,
                                       mask, n);
  };
  const auto offset_of = [&](int tile) {
    const int position = tile * kOthers + threadIdx.x;
    if (threadIdx.x >= kOthers || !is_valid(mask, position, n)) return kHidden;
    return kTransposed ? -lse2[position] : 0.0f;
  };

  copy_rows_async<kWalkRows, kThreads>(memory, own, first, 0, key_panels, mask, n);
  copy_stage(0);
  commit_copies();
  if (threadIdx.x < kOthers) offsets[threadIdx.x] = offset_of(0);

  float sums[kPanels][kRowTiles][8][4] = {};
  // Of the rows lane / 4 + 8 h of tile r; totals are of this lane's columns only.
  float peak[kRowTiles][2], total[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    peak[r][0] = peak[r][1] = kHidden;
    total[r][0] = total[r][1] = 0.0f;
  }

  const int tiles = (n + kOthers - 1) / kOthers;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    // All see this stage, and none still reads the other.
    __syncthreads();
    const unsigned char* const stage = stages + tile % kWalkStages * stage_bytes;
    const bool more = tile + 1 < tiles;
    float next_offset = 0.0f;
    if (more) {
      copy_stage(tile + 1);
      next_offset = offset_of(tile + 1);
    }
    commit_copies();

    float scores[kRowTiles][kOthers / 8][4] = {};
    for (int panel = 0; panel < key_panels; ++panel) {
      multiply_panels<T, kRowTiles, kOthers>(scores, memory + panel * panel_bytes(kWalkRows), own_row,
                                             stage + panel * panel_bytes(kOthers), lane);
    }
    const float* const offset = offsets + tile % kWalkStages * kOthers;
#pragma unroll
    for (int c = 0; c < kOthers / 8; ++c) {
      const float low = offset[8 * c + 2 * (lane % 4)], high = offset[8 * c + 2 * (lane % 4) + 1];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scores[r][c][2 * h] = fmaf(scores[r][c][2 * h], problem.factor, low);
          scores[r][c][2 * h + 1] = fmaf(scores[r][c][2 * h + 1], problem.factor, high);
        }
      }
    }

    if (!kTransposed) {
      float decay[kRowTiles][2];
      bool rescale = false;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float highest = peak[r][h];
#pragma unroll
          for (int c = 0; c < kOthers / 8; ++c) {
            highest = fmaxf(highest, fmaxf(scores[r][c][2 * h], scores[r][c][2 * h + 1]));
          }
          const float now = row_max(highest);
          decay[r][h] = exp2_of(peak[r][h] - now);
          rescale = rescale || now != peak[r][h];
          peak[r][h] = now;
          total[r][h] *= decay[r][h];
#pragma unroll
          for (int c = 0; c < kOthers / 8; ++c) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
              scores[r][c][i] = exp2_of(scores[r][c][i] - now);
              total[r][h] += scores[r][c][i];
            }
          }
        }
      }
      // Rare after the first tiles; a factor of 1 changes nothing.
      if (__any_sync(kWarp, rescale)) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[panel][r][c][i] *= decay[r][i / 2];
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < kOthers / 8; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[r][c][i] = exp2_of(scores[r][c][i]);
        }
      }
    }

    unsigned weights[kRowTiles][kOthers / 16][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int k = 0; k < kOthers / 16; ++k) left_of<T>(weights[r][k], scores[r][2 * k], scores[r][2 * k + 1]);
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      accumulate_panel<T, kRowTiles, kOthers>(sums[panel], weights, stage + (key_panels + panel) * panel_bytes(kOthers),
                                              lane);
    }
    if (more && threadIdx.x < kOthers) offsets[(tile + 1) % kWalkStages * kOthers + threadIdx.x] = next_offset;
  }

  const Rows<const T> start = step.start.entry(batch);
  const Rows<T> y = step.y.entry(batch);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = first + own_row + 16 * r + 8 * h + lane / 4;
      const float all = kTransposed ? 1.0f : row_sum(total[r][h]);
      if (position >= n) continue;
      const bool valid = is_valid(mask, position, n);
      if (!kTransposed && column == 0 && lane % 4 == 0) lse2[position] = valid ? peak[r][h] + log2_of(all) : 0.0f;
      const float share = problem.keep / (valid ? all : 1.0f);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int at = column + panel * kPanelColumns + 8 * c + 2 * (lane % 4);
          if (at >= y.width) continue;
          float low = sums[panel][r][c][2 * h] * share, high = sums[panel][r][c][2 * h + 1] * share;
          if (problem.restart != 0.0f && valid) {
            const T* const from = start.at + position * start.row + at;
            low += problem.restart * widen(from[0]);
            high += problem.restart * widen(from[1]);
          }
          *reinterpret_cast<unsigned*>(y.at + position * y.row + at) = valid ? pack<T>(low, high) : 0u;
        }
      }
    }
  }
}

// ---- Gradients of the scores

constexpr int kLevelRows = kThreads / 32;

// One warp for each position.
template <class T>
__global__ void __launch_bounds__(kThreads) level(Level<T> all) {
  const Problem problem = all.problem;
  const unsigned blocks = (problem.n + kLevelRows - 1) / kLevelRows;
  const int lane = threadIdx.x % 32, position = blockIdx.x % blocks * kLevelRows + threadIdx.x / 32;
  const int batch = blockIdx.x / blocks;
  if (position >= problem.n) return;
  const long long place = static_cast<long long>(batch) * problem.n + position;
  float sum = 0.0f;
  if (problem.mask == nullptr || problem.mask[place]) {
    const T* const g = all.g.at + batch * all.g.batch + position * all.g.row;
    const T* const y = all.y.at + batch * all.y.batch + position * all.y.row;
    const T* const start = all.start.at + batch * all.start.batch + position * all.start.row;
    for (int column = lane; column < all.g.width; column += 32) {
      float moved = widen(y[column]);
      if (problem.restart != 0.0f) moved -= problem.restart * widen(start[column]);
      sum = fmaf(widen(g[column]), moved, sum);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
    if (all.lse_grad != nullptr) sum -= all.lse_grad[place];
  }
  if (lane == 0) all.level[place] = sum;
}

constexpr int kScoreRows = 64, kScoreOthers = 64, kScoreStages = 3;

// Shared memory of `scores`: owned rows (their wide part only where `resident`), a ring of wide panels (two of each side
// where not), the others' narrow rows, and two numbers for each of these.
__host__ __device__ constexpr int scores_shared_bytes(int key_panels, int value_panels, bool resident) {
  return panel_bytes(kScoreRows) * (2 * key_panels + (resident ? value_panels : 0)) +
         kScoreStages * panel_bytes(kScoreRows) * (resident ? 1 : 2) + 2 * kScoreOthers * 4;
}

// dQ (by_query) or dK: 64 rows of one side, summed over the other; P and <g, x> are computed again.
//
// The 64 x 64 product <g_i, x_j> is made of 64 columns at a time, which come through a ring of three stages. `resident`: the
// owned rows of g or x stay in shared memory, which halves what is read; otherwise they come through the ring too.
template <class T>
__global__ void __launch_bounds__(kThreads) scores(Scores<T> all, bool by_query, bool resident) {
  constexpr int kOthers = kScoreOthers, kStages = kScoreStages, kPanel = panel_bytes(kScoreRows);
  CC4S_DYNAMIC_SHARED(memory);
  const Problem problem = all.problem;
  const int n = problem.n, lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16;
  const unsigned blocks = (n + kScoreRows - 1) / kScoreRows;
  const int first = blockIdx.x % blocks * kScoreRows, batch = blockIdx.x / blocks;
  const long long start = static_cast<long long>(batch) * n;
  const bool* const mask = problem.mask == nullptr ? nullptr : problem.mask + start;
  const float *const lse2 = all.lse2 + start, *const levels = all.level + start;
  const Rows<const T> a = (by_query ? all.q : all.k).entry(batch), b = (by_query ? all.k : all.q).entry(batch);
  const Rows<const T> wide_a = (by_query ? all.g : all.x).entry(batch), wide_b = (by_query ? all.x : all.g).entry(batch);

  const int key_panels = panels_of(a.width), value_panels = panels_of(wide_a.width);
  unsigned char* const own = memory;
  unsigned char* const other = own + key_panels * kPanel;
  unsigned char* const ring = other + key_panels * kPanel;
  const int stage_bytes = resident ? kPanel : 2 * kPanel;
  unsigned char* const own_wide = ring + kStages * stage_bytes;
  // Added to scores and to products of each column.
  float* const offsets = reinterpret_cast<float*>(own_wide + (resident ? value_panels : 0) * kPanel);

  const int tiles = (n + kOthers - 1) / kOthers, steps = tiles * value_panels;
  const auto copy_step = [&](int step) {
    const int tile = step / value_panels, column = step % value_panels * kPanelColumns;
    unsigned char* const stage = ring + step % kStages * stage_bytes;
    copy_rows_async<kOthers, kThreads>(stage, wide_b, tile * kOthers, column, 1, mask, n);
    if (!resident) copy_rows_async<kScoreRows, kThreads>(stage + kPanel, wide_a, first, column, 1, mask, n);
  };

  copy_rows_async<kScoreRows, kThreads>(own, a, first, 0, key_panels, mask, n);
  if (resident) copy_rows_async<kScoreRows, kThreads>(own_wide, wide_a, first, 0, value_panels, mask, n);
  copy_step(0);
  commit_copies();
  if (steps > 1) copy_step(1);
  commit_copies();

  // Added to scores and products of this lane's two rows.
  float own_offset[2] = {}, own_level[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int position = first + own_row + 8 * h + lane / 4;
    if (!by_query || !is_valid(mask, position, n)) continue;
    own_offset[h] = -lse2[position];
    own_level[h] = -levels[position];
  }

  float sums[kMostKeyPanels][1][8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    float products[1][kOthers / 8][4] = {}, offset = kHidden, level = 0.0f;
    for (int panel = 0; panel < value_panels; ++panel) {
      const int step = tile * value_panels + panel;
      wait_for_copies<1>();
      // All see this stage, and none still reads the one before, nor the tile before.
      __syncthreads();
      if (panel == 0) {
        copy_rows_async<kOthers, kThreads>(other, b, tile * kOthers, 0, key_panels, mask, n);
        const int position = tile * kOthers + threadIdx.x;
        if (threadIdx.x < kOthers && is_valid(mask, position, n)) {
          offset = by_query ? 0.0f : -lse2[position];
          level = by_query ? 0.0f : -levels[position];
        }
      }
      if (step + 2 < steps) copy_step(step + 2);
      commit_copies();
      const unsigned char* const stage = ring + step % kStages * stage_bytes;
      multiply_panels<T, 1, kOthers>(products, resident ? own_wide + panel * kPanel : stage + kPanel, own_row, stage,
                                     lane);
      if (panel == 0 && threadIdx.x < kOthers) {
        offsets[threadIdx.x] = offset;
        offsets[kOthers + threadIdx.x] = level;
      }
    }
    // The others' narrow rows were copied with the first panel: since the third they are here.
    if (value_panels < 3) {
      wait_for_copies<0>();
      __syncthreads();
    }

    float weights[1][kOthers / 8][4] = {};
    for (int panel = 0; panel < key_panels; ++panel) {
      multiply_panels<T, 1, kOthers>(weights, own + panel * kPanel, own_row, other + panel * kPanel, lane);
    }
#pragma unroll
    for (int c = 0; c < kOthers / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 8 * c + 2 * (lane % 4) + i % 2;
        const float p = exp2_of(fmaf(weights[0][c][i], problem.factor, own_offset[i / 2] + offsets[j]));
        weights[0][c][i] = p * fmaf(problem.keep, products[0][c][i], own_level[i / 2] + offsets[kOthers + j]);
      }
    }
    unsigned rounded[1][kOthers / 16][4];
#pragma unroll
    for (int k = 0; k < kOthers / 16; ++k) left_of<T>(rounded[0][k], weights[0][2 * k], weights[0][2 * k + 1]);
#pragma unroll
    for (int panel = 0; panel < kMostKeyPanels; ++panel) {
      if (panel < key_panels) accumulate_panel<T, 1, kOthers>(sums[panel], rounded, other + panel * kPanel, lane);
    }
  }

  const Rows<T> out = (by_query ? all.q_grad : all.k_grad).entry(batch);
  const Rows<float> sum = (by_query ? all.q_sum : all.k_sum).entry(batch);
#pragma unroll
  for (int panel = 0; panel < kMostKeyPanels; ++panel) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = first + own_row + 8 * h + lane / 4, at = panel * kPanelColumns + 8 * c + 2 * (lane % 4);
        if (position >= n || at >= a.width) continue;
        const bool valid = is_valid(mask, position, n);
        const float low = valid ? all.scale * sums[panel][0][c][2 * h] : 0.0f;
        const float high = valid ? all.scale * sums[panel][0][c][2 * h + 1] : 0.0f;
        if (sum.at == nullptr) {
          *reinterpret_cast<unsigned*>(out.at + position * out.row + at) = pack<T>(low, high);
        } else {
          float* const to = sum.at + position * sum.row + at;
          to[0] += low;
          to[1] += high;
        }
      }
    }
  }
}

}  // namespace random_walk
