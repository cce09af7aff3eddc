// The kernels of transition_consistency.cuh on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "transition_consistency/transition_consistency.cuh"

namespace transition_consistency {

template <class T>
dim3 blocks_of(const Problem<T>& problem) {
  return dim3(static_cast<unsigned>((static_cast<long long>(problem.n) + kTile - 1) / kTile * problem.batch));
}

// Neither B nor n is 0, d is at most 128, and there are fewer than 2^31 blocks.
template <class T, class Launch>
void run_divergences(Launch&& launch, const Divergences<T>& all) {
  launch.with_shared(blocks_of(all.problem), dim3(kThreads), shared_bytes(panels_of(all.problem.q.width), 1),
                     divergences<T>, all);
}

// dQ and dK.
template <class T, class Launch>
void run_scores(Launch&& launch, const Scores<T>& all) {
  const int shared = shared_bytes(panels_of(all.problem.q.width), 4);
  launch.with_shared(blocks_of(all.problem), dim3(kThreads), shared, scores<T, true>, all);
  launch.with_shared(blocks_of(all.problem), dim3(kThreads), shared, scores<T, false>, all);
}

}  // namespace transition_consistency
