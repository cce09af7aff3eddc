// The Hopper kernels of random_walk on a CPU, for tests.
#include "sm90_on_cpu.h"

#include "random_walk/random_walk_sm90_launch.h"

namespace {

using namespace random_walk::hopper;

struct Options {
  float scale, keep, restart;
  int bfloat16;
  unsigned seed;
};

constexpr float kLog2E = 1.4426950408889634f;

template <class T>
Matrix<T> matrix(const void* data, const Sizes& s, int columns) {
  return {static_cast<const T*>(data), static_cast<long long>(s.n) * columns, columns, columns};
}

template <class T, bool transposed>
void run(const Sizes& s, const Options& o, const void* own, const void* other, const void* wide, const void* start,
         const bool* mask, float* lse2, void* out) {
  const Walk<T> w{mask, lse2, static_cast<T*>(out), static_cast<const T*>(start), static_cast<long long>(s.n) * s.value,
                  s.value, 0, 0, 0, o.scale * kLog2E, o.keep, o.restart};
  run_walk<T, transposed>(cuda_on_cpu::HopperLauncher(o.seed), s, matrix<T>(own, s, s.key), matrix<T>(other, s, s.key),
                          matrix<T>(wide, s, s.value), w);
}

}  // namespace

extern "C" {
// Contiguous [B, N, columns]; own, other: q, k, or, transposed, k, q.
void walk(const Sizes* s, const Options* o, int transposed, const void* own, const void* other, const void* wide,
          const void* start, const bool* mask, float* lse2, void* out) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    transposed ? run<T, true>(*s, *o, own, other, wide, start, mask, lse2, out)
               : run<T, false>(*s, *o, own, other, wide, start, mask, lse2, out);
  };
  o->bfloat16 ? call(sm90::Bfloat16{}) : call(sm90::Float16{});
}
}
