// The kernels of random_walk on a CPU, for tests.
#include "random_walk/random_walk_launch.h"

using mma_sm80::BFloat16;
using mma_sm80::Half;

extern "C" {

// arguments: Step, Level or Scores; type 0 is bfloat16, 1 float16.
void step(const void* arguments, int type, int transposed, unsigned seed) {
  const auto run = [&](auto t) {
    random_walk::run_step(cuda_on_cpu::Launcher(seed), *static_cast<const random_walk::Step<decltype(t)>*>(arguments),
                          transposed != 0);
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

void level(const void* arguments, int type, unsigned seed) {
  const auto run = [&](auto t) {
    random_walk::run_level(cuda_on_cpu::Launcher(seed),
                           *static_cast<const random_walk::Level<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}

void scores(const void* arguments, int type, int most_shared, unsigned seed) {
  const auto run = [&](auto t) {
    random_walk::run_scores(cuda_on_cpu::Launcher(seed, most_shared),
                            *static_cast<const random_walk::Scores<decltype(t)>*>(arguments));
  };
  type == 0 ? run(BFloat16{}) : run(Half{});
}
}
