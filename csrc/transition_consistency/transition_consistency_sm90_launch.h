// The kernels of transition_consistency_sm90.cuh on any launcher: csrc/common/sm90_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "common/sm90_maps.h"
#include "transition_consistency/transition_consistency_sm90.cuh"

namespace transition_consistency::sm90 {

// What the kernels take: d <= 128, a positive scale beside which hidden scores stay hidden, and rows that TMA can read.
template <class T>
bool takes(const Problem<T>& problem) {
  bool readable = true;
  for (const Rows<const T>* side : {&problem.q, &problem.k, &problem.q_target, &problem.k_target}) {
    readable = readable && is_readable(problem, *side);
  }
  return readable && problem.factor >= kLeastFactor && problem.q.width <= 128;
}

// A kernel whose blocks own q and walk over k, or with `by_query` false the other way round. Neither B nor n is 0, and
// there are fewer than 2^31 blocks.
template <int key, bool by_query, class T, class Launch, class Kernel, class Arguments>
void run(Launch&& launch, const Problem<T>& problem, Kernel kernel, const Arguments& all) {
  const auto &own = by_query ? problem.q : problem.k, &other = by_query ? problem.k : problem.q;
  const auto& own_target = by_query ? problem.q_target : problem.k_target;
  const auto& other_target = by_query ? problem.k_target : problem.q_target;
  const long long blocks = 1LL * parts_of(problem.n, kOwned) * problem.batch;
  launch.with_shared(dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), Memory<key>::kBytes, kernel,
                     map_of(launch, problem, own, kOwned), map_of(launch, problem, other, kTile),
                     map_of(launch, problem, own_target, kOwned), map_of(launch, problem, other_target, kTile), all);
}

template <class T, class Launch>
void run_rows(Launch&& launch, const Divergences<T>& all) {
  if (all.problem.q.width > 64) {
    run<128, true>(launch, all.problem, divergences<T, 128>, all);
  } else {
    run<64, true>(launch, all.problem, divergences<T, 64>, all);
  }
}

template <class T, int key, class Launch>
void run_gradients(Launch&& launch, const Scores<T>& all) {
  run<key, true>(launch, all.problem, scores<T, key, true>, all);
  run<key, false>(launch, all.problem, scores<T, key, false>, all);
}

template <class T, class Launch>
void run_gradients(Launch&& launch, const Scores<T>& all) {
  if (all.problem.q.width > 64) {
    run_gradients<T, 128>(launch, all);
  } else {
    run_gradients<T, 64>(launch, all);
  }
}

}  // namespace transition_consistency::sm90
