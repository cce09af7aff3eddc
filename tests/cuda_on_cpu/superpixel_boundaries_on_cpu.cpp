// The kernels of superpixel_boundaries on a CPU, for tests.
#include "superpixel_boundaries/superpixel_boundaries_launch.h"

template <class Id>
static void run(const Id* ids, const long long* strides, long long batch, int height, int width, unsigned char* out,
                unsigned seed) {
  const Strides at{strides[0], 0, strides[1], strides[2]};
  superpixel_boundaries::run(cuda_on_cpu::Launcher(seed), ids, at, batch, height, width, out);
}

extern "C" {
void boundaries_int16(const short* ids, const long long* strides, long long batch, int height, int width,
                      unsigned char* out, unsigned seed) {
  run(ids, strides, batch, height, width, out, seed);
}
void boundaries_int32(const int* ids, const long long* strides, long long batch, int height, int width,
                      unsigned char* out, unsigned seed) {
  run(ids, strides, batch, height, width, out, seed);
}
void boundaries_int64(const long long* ids, const long long* strides, long long batch, int height, int width,
                      unsigned char* out, unsigned seed) {
  run(ids, strides, batch, height, width, out, seed);
}
}
