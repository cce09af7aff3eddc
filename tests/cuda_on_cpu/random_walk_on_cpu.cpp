// The kernels of random_walk on a CPU, for tests.
#include "random_walk/random_walk_launch.h"

using mma_sm80::BFloat16;
using mma_sm80::Half;

// Calls body with the type of the tensors: 0 bfloat16, 1 float16.
template <class Body>
static void with_type(int type, Body body) {
  if (type == 0) {
    body(BFloat16{});
  } else {
    body(Half{});
  }
}

extern "C" {

// As random_walk::Problem and, for each kernel, its own struct; every type has the same layout.
void step(const void* arguments, int type, int transposed, unsigned seed) {
  with_type(type, [&](auto t) {
    random_walk::run_step(cuda_on_cpu::Launcher(seed), *static_cast<const random_walk::Step<decltype(t)>*>(arguments),
                          transposed != 0);
  });
}

void level(const void* arguments, int type, unsigned seed) {
  with_type(type, [&](auto t) {
    random_walk::run_level(cuda_on_cpu::Launcher(seed),
                           *static_cast<const random_walk::Level<decltype(t)>*>(arguments));
  });
}

void scores(const void* arguments, int type, int most_shared, unsigned seed) {
  with_type(type, [&](auto t) {
    random_walk::run_scores(cuda_on_cpu::Launcher(seed, most_shared),
                            *static_cast<const random_walk::Scores<decltype(t)>*>(arguments));
  });
}
}
