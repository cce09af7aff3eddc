// Tile code of the op that tests the vector exp.
#include "common/tile_engine.h"

template <class En>
void exp_of(const typename En::Scalar* in, typename En::Scalar* out, int64_t count) {
  using S = typename En::Scalar;
  constexpr int64_t W = kLanes<S>;
  for (int64_t i = 0; i < count; i += W) {
    S part[W] = {};
    const int64_t n = std::min(W, count - i);
    std::copy_n(in + i, n, part);
    store(part, vexp(load(part)));
    std::copy_n(part, n, out + i);
  }
}
