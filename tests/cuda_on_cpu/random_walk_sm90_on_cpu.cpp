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

template <class T, bool by_query>
void run_gradient(const Sizes& s, const Options& o, const void* own, const void* other, const void* wide_own,
                  const void* wide_other, const bool* mask, const float* lse2, const float* level, void* out,
                  float* sums) {
  const Scores<T> w{mask, lse2, level, static_cast<T*>(out), sums, 0, 0, 0, o.scale * kLog2E, o.keep, o.scale};
  run_scores<T, by_query>(cuda_on_cpu::HopperLauncher(o.seed), s, matrix<T>(own, s, s.key), matrix<T>(other, s, s.key),
                          matrix<T>(wide_own, s, s.value), matrix<T>(wide_other, s, s.value), w);
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

void level(const Sizes* s, const Options* o, const void* g, const void* y, const void* start, const bool* mask,
           const float* lse_grad, float* out) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    run_level<T>(cuda_on_cpu::HopperLauncher(o->seed), *s, matrix<T>(g, *s, s->value), matrix<T>(y, *s, s->value),
                 matrix<T>(start, *s, s->value), o->restart, mask, lse_grad, out);
  };
  o->bfloat16 ? call(sm90::Bfloat16{}) : call(sm90::Float16{});
}

// own, other, wide_own, wide_other: q, k, g, state (by_query) or k, q, state, g.
void scores(const Sizes* s, const Options* o, int by_query, const void* own, const void* other, const void* wide_own,
            const void* wide_other, const bool* mask, const float* lse2, const float* level, void* out, float* sums) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    by_query ? run_gradient<T, true>(*s, *o, own, other, wide_own, wide_other, mask, lse2, level, out, sums)
             : run_gradient<T, false>(*s, *o, own, other, wide_own, wide_other, mask, lse2, level, out, sums);
  };
  o->bfloat16 ? call(sm90::Bfloat16{}) : call(sm90::Float16{});
}
}
