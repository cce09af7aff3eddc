// The Hopper kernels of random_walk on a CPU, for tests; arguments as in random_walk_on_cpu.cpp.
#include "sm90_on_cpu.h"

#include "random_walk/random_walk_launch.h"
#include "random_walk/random_walk_sm90_launch.h"

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

void step(const void* arguments, int type, int transposed, unsigned seed) {
  with_type(type, [&](auto t) {
    const auto& step = *static_cast<const random_walk::Step<decltype(t)>*>(arguments);
    cuda_on_cpu::HopperLauncher launch(seed);
    transposed != 0 ? random_walk::sm90::run_walk<true>(launch, step) : random_walk::sm90::run_walk<false>(launch, step);
  });
}

// The same on every chip.
void level(const void* arguments, int type, unsigned seed) {
  with_type(type, [&](auto t) {
    random_walk::run_level(cuda_on_cpu::Launcher(seed),
                           *static_cast<const random_walk::Level<decltype(t)>*>(arguments));
  });
}

void scores(const void* arguments, int type, int, unsigned seed) {
  with_type(type, [&](auto t) {
    random_walk::sm90::run_gradients(cuda_on_cpu::HopperLauncher(seed),
                                  *static_cast<const random_walk::Scores<decltype(t)>*>(arguments));
  });
}
}
