// The kernels of slic on a CPU, for tests.
#include "slic/slic_launch.h"

extern "C" {
long long slic_bytes(long long batch, long long height, long long width, long long num_segments) {
  return slic::layout_of(slic::problem_of(batch, height, width, num_segments, 0), nullptr).bytes;
}

// strides: of image (B, 3, H, W) and of mask (B, H, W).
void slic_run(const unsigned char* image, const bool* mask, const long long* strides, long long batch, long long height,
              long long width, long long num_segments, long long compactness, long long iterations, char* memory,
              int* labels, unsigned seed) {
  const slic::Problem problem = slic::problem_of(batch, height, width, num_segments, compactness);
  const Strides image_at{strides[0], strides[1], strides[2], strides[3]};
  const Strides mask_at{strides[4], 0, strides[5], strides[6]};
  slic::run(cuda_on_cpu::Launcher(seed), problem, slic::layout_of(problem, memory).scratch, image, image_at, mask,
            mask_at, iterations, labels);
}
}
