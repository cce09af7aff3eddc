// The kernels of transition_consistency on a CPU, for tests.
#include "transition_consistency/transition_consistency_launch.h"

using mma_sm80::BFloat16;
using mma_sm80::Half;

extern "C" {

// arguments: Divergences or Scores; type 0 is bfloat16, 1 float16.
void divergences(const void* arguments, int type, unsigned seed) {
  const auto run = [&](auto t) {
    transition_consistency::run_divergences(
        cuda_on_cpu::Launcher(seed), *static_cast<const transition_consistency::Divergences<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

void scores(const void* arguments, int type, unsigned seed) {
  const auto run = [&](auto t) {
    transition_consistency::run_scores(
        cuda_on_cpu::Launcher(seed), *static_cast<const transition_consistency::Scores<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

void exp2_values(const float* x, float* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = mma_sm80::exp2_polynomial(x[i]);
}
}
