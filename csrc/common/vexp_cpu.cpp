// The exp of the tile engine as an op of its own, for its test only.
#include <torch/csrc/stable/library.h>

#include "common/pairwise.h"

#define CC4S_TILE_CODE "common/vexp_tiles.h"
#include "common/foreach_isa.h"

namespace {

using namespace cc4s;

void run(const float* in, float* out, int64_t count) { CC4S_FOR_CURRENT_ISA(float, exp_of, in, out, count); }

Tensor tile_exp(const Tensor& x_in) {
  const Tensor x = contiguous_as(x_in, ScalarType::Float);
  Tensor y = torch::stable::empty_like(x);
  run(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) { m.impl("tile_exp", TORCH_BOX(&tile_exp)); }
