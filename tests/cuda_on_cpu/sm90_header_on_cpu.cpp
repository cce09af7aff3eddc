// Small kernels that show what sm90_on_cpu.h does; expected values stand in test_sm90_header.py.
#include "sm90_on_cpu.h"

#include "common/score_tiles_sm90.cuh"
#include "common/sm90_maps.h"

using namespace hopper;
using mma_sm80::Half;

enum Mistake { kNone, kNoFence, kNoWait, kNoCopy };

// out [64, 64] = a b^T b of one warpgroup, a [128, 64] (its first rows) and b [64, 64].
template <int mistake>
__global__ void products(const TensorMap a, const TensorMap b, float* out) {
  char* const own = shared_memory();
  char* const tile = own + kOwned * kSlabRow;
  Barrier* const full = reinterpret_cast<Barrier*>(tile + kTile * kSlabRow);
  if (threadIdx.x == 0) {
    init(full, 1);
    fence_init();
    arrive_expect(full, (kOwned + kTile) * kSlabRow);
    load(a, own, full, 0, 0, 0);
    if (mistake != kNoCopy) load(b, tile, full, 0, 0, 0);
  }
  __syncthreads();
  wait(full, 0);
  float s[32], sums[32];
  unsigned weights[4][4];
  if (mistake != kNoFence) fence(s);
  multiply_scores<Half, 64>(s, own, tile);
  commit();
  if (mistake != kNoWait) wait_products<0>(s);
  operands<Half>(weights, s);
  for (float& sum : sums) sum = 0.0f;
  fence(sums);
  multiply_weights<Half>(sums, weights, tile);
  commit();
  wait_products<0>(sums);
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = sums[i];
}

struct Sizes {
  int batch, n;
};

template <int mistake>
static void run(const Half* a, const Half* b, int rows, float* out, unsigned seed) {
  cuda_on_cpu::HopperLauncher launch(seed);
  const Sizes sizes{1, rows};
  launch.with_shared(dim3(1), dim3(kWarpgroup), (kOwned + kTile) * kSlabRow + 8, products<mistake>,
                     map_of(launch, sizes, Rows<const Half>{a, rows * 64, 64, 64}, kOwned),
                     map_of(launch, sizes, Rows<const Half>{b, rows * 64, 64, 64}, kTile), out);
}

extern "C" {
// a, b [rows, 64]; rows beyond the end are zeros.
void run_products(const Half* a, const Half* b, int rows, float* out, unsigned seed) {
  run<kNone>(a, b, rows, out, seed);
}
void run_no_wait(const Half* a, const Half* b, int rows, float* out, unsigned seed) {
  run<kNoWait>(a, b, rows, out, seed);
}
void run_no_fence() {
  alignas(16) static Half a[128 * 64], b[128 * 64];
  static float out[64 * 64];
  run<kNoFence>(a, b, 128, out, 0);
}
void run_no_copy() {
  alignas(16) static Half a[128 * 64], b[128 * 64];
  static float out[64 * 64];
  run<kNoCopy>(a, b, 128, out, 0);
}
}
