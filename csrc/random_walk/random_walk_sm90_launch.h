// The kernels of random_walk_sm90.cuh on any launcher: csrc/common/sm90_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "common/sm90_maps.h"
#include "random_walk/random_walk_sm90.cuh"

namespace random_walk::sm90 {

// What the kernels take: d <= 128, D <= 512, a positive scale, and rows that TMA can read.
template <class T>
bool takes(const Problem& problem, const Rows<const T>& q, const Rows<const T>& k, const Rows<const T>& x,
           const Rows<const T>& more) {
  bool readable = true;
  for (const Rows<const T>* matrix : {&q, &k, &x, &more}) readable = readable && is_readable(problem, *matrix);
  return readable && problem.factor > 0.0f && q.width <= 128 && x.width <= 512;
}

// None of B, n and D is 0, and there are fewer than 2^31 blocks.
template <class T, int key, int value, bool transposed, class Launch>
void run_walk(Launch&& launch, const Step<T>& step) {
  const Problem& problem = step.problem;
  const long long blocks = 1LL * parts_of(problem.n, kOwned) * parts_of(step.y.width, value) * problem.batch;
  launch.with_shared(dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), WalkMemory<key, value>::kBytes,
                     walk<T, key, value, transposed>, map_of(launch, problem, transposed ? step.k : step.q, kOwned),
                     map_of(launch, problem, transposed ? step.q : step.k, kTile),
                     map_of(launch, problem, step.x, kTile), step);
}

template <bool transposed, class T, class Launch>
void run_walk(Launch&& launch, const Step<T>& step) {
  if (step.q.width > 64) {
    run_walk<T, 128, 256, transposed>(launch, step);
  } else if (parts_of(step.y.width, 128) % 2 != 0) {
    // Parts of 128 columns leave less of the last one unused.
    run_walk<T, 64, 128, transposed>(launch, step);
  } else {
    run_walk<T, 64, 256, transposed>(launch, step);
  }
}

template <class T, int key, bool by_query, class Launch>
void run_gradient(Launch&& launch, const Scores<T>& all) {
  const Problem& problem = all.problem;
  const auto &own = by_query ? all.q : all.k, &other = by_query ? all.k : all.q;
  const auto &wide_own = by_query ? all.g : all.x, &wide_other = by_query ? all.x : all.g;
  const long long blocks = 1LL * parts_of(problem.n, kOwned) * problem.batch;
  launch.with_shared(dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), ScoresMemory<key>::kBytes,
                     scores<T, key, by_query>, map_of(launch, problem, own, kOwned),
                     map_of(launch, problem, other, kTile), map_of(launch, problem, wide_own, kOwned),
                     map_of(launch, problem, wide_other, kTile), all);
}

template <class T, class Launch>
void run_gradients(Launch&& launch, const Scores<T>& all) {
  if (all.q.width > 64) {
    run_gradient<T, 128, true>(launch, all);
    run_gradient<T, 128, false>(launch, all);
  } else {
    run_gradient<T, 64, true>(launch, all);
    run_gradient<T, 64, false>(launch, all);
  }
}

}  // namespace random_walk::sm90
