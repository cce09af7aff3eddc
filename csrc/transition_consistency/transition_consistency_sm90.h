// The kernels of `transition_consistency` for compute capability 9.0 (wgmma, TMA), as its launcher calls them.
#pragma once

#include <cuda_runtime.h>

#include "transition_consistency/transition_consistency_params.h"

namespace transition_consistency::sm90 {

// Whether these kernels take the call, on a device of compute capability 9.0; otherwise those of
// transition_consistency.cuh run.
template <class T>
bool can_run_divergences(const Divergences<T>& divergences);
template <class T>
bool can_run_scores(const Scores<T>& scores);

template <class T>
void run_divergences(const Divergences<T>& divergences, cudaStream_t stream);
template <class T>
void run_scores(const Scores<T>& scores, cudaStream_t stream);

}  // namespace transition_consistency::sm90
