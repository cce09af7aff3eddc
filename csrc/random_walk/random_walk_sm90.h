// The kernels of `random_walk` for compute capability 9.0 (wgmma, TMA), as its launcher calls them.
#pragma once

#include <cuda_runtime.h>

#include "random_walk/random_walk_params.h"

namespace random_walk::sm90 {

// Whether these kernels take the call, on a device of compute capability 9.0; otherwise those of random_walk.cuh run.
template <class T>
bool can_run_step(const Step<T>& step);
template <class T>
bool can_run_transposed(const Step<T>& step);
template <class T>
bool can_run_scores(const Scores<T>& scores);

template <class T>
void run_step(const Step<T>& step, cudaStream_t stream);
template <class T>
void run_transposed(const Step<T>& step, cudaStream_t stream);
template <class T>
void run_scores(const Scores<T>& scores, cudaStream_t stream);

}  // namespace random_walk::sm90
