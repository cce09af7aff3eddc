// The kernels of random_walk.cuh on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "random_walk/random_walk.cuh"

namespace random_walk {

inline long long tiles_of(long long length, int tile) { return (length + tile - 1) / tile; }

// None of B, n and D is 0, d is at most 128, and there are fewer than 2^31 blocks.
template <class T, class Launch>
void run_step(Launch&& launch, const Step<T>& step, bool transposed) {
  const long long blocks =
      tiles_of(step.problem.n, kWalkRows) * tiles_of(step.x.width, kWalkColumns) * step.problem.batch;
  const int shared = walk_shared_bytes(panels_of(step.q.width));
  launch.with_shared(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared,
                     transposed ? walk<T, true> : walk<T, false>, step);
}

template <class T, class Launch>
void run_level(Launch&& launch, const Level<T>& all) {
  const long long blocks = tiles_of(all.problem.n, kLevelRows) * all.problem.batch;
  launch(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), level<T>, all);
}

// dQ and dK. Owned rows stay in shared memory where it is large enough.
template <class T, class Launch>
void run_scores(Launch&& launch, const Scores<T>& all) {
  const int key_panels = panels_of(all.q.width), value_panels = panels_of(all.x.width);
  const bool resident = scores_shared_bytes(key_panels, value_panels, true) <= launch.most_shared();
  const long long blocks = tiles_of(all.problem.n, kScoreRows) * all.problem.batch;
  for (const bool by_query : {true, false}) {
    launch.with_shared(dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                       scores_shared_bytes(key_panels, value_panels, resident), scores<T>, all, by_query, resident);
  }
}

}  // namespace random_walk
