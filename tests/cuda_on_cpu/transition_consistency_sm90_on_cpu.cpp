// The Hopper kernels of transition_consistency on a CPU, for tests; arguments as in transition_consistency_on_cpu.cpp.
#include "sm90_on_cpu.h"

#include "transition_consistency/transition_consistency_sm90_launch.h"

using mma_sm80::BFloat16;
using mma_sm80::Half;

extern "C" {

void divergences(const void* arguments, int type, unsigned seed) {
  const auto run = [&](auto t) {
    transition_consistency::sm90::run_rows(
        cuda_on_cpu::HopperLauncher(seed),
        *static_cast<const transition_consistency::Divergences<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

void scores(const void* arguments, int type, unsigned seed) {
  const auto run = [&](auto t) {
    transition_consistency::sm90::run_gradients(
        cuda_on_cpu::HopperLauncher(seed), *static_cast<const transition_consistency::Scores<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

// Of Divergences.
int takes(const void* arguments) {
  const auto& all = *static_cast<const transition_consistency::Divergences<BFloat16>*>(arguments);
  return transition_consistency::sm90::takes(all.problem);
}
}
