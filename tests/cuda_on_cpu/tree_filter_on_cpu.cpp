// The kernels of tree_filter on a CPU, for tests.
#include "tree_filter/tree_filter_launch.h"

using namespace tree_filter;

template <class T>
static void trees(const T* weight, const long long* strides, long long batch, long long height, long long width,
                  char* memory, long long* order, long long* parent, long long* edge, unsigned seed) {
  const Problem problem = problem_of(batch, height, width, 0);
  Cutter cutter(memory);
  const Forest forest = forest_of(problem, sizeof(T) == 8, cutter);
  grow_trees(cuda_on_cpu::Launcher(seed), problem, forest, weight, {strides[0], strides[1]}, order, parent, edge);
}

// strides: of values, decay, order, parent, and of gradient. decay_out: null, then `out` is the filtered values; else it
// is the gradient of decay, and `out` that of values.
template <class T>
static void run(const T* values, const T* decay, const long long* order, const long long* parent, const T* gradient,
                const long long* strides, long long batch, long long channels, long long pixels, char* memory, T* out,
                T* decay_out, unsigned seed) {
  const Problem problem = problem_of(batch, 1, pixels, channels);
  const Planes values_at{strides[0], strides[1], strides[2]};
  const Rows decay_at{strides[3], strides[4]}, order_at{strides[5], strides[6]}, parent_at{strides[7], strides[8]};
  Cutter cutter(memory);
  const Fields<T> fields = fields_of(problem, decay, decay_at, decay_out != nullptr, cutter);
  cuda_on_cpu::Launcher launch(seed);
  if (decay_out == nullptr) {
    filter(launch, problem, fields, order, order_at, parent, parent_at, values, values_at, out);
  } else {
    filter_backward(launch, problem, fields, order, order_at, parent, parent_at, values, values_at, gradient,
                    {strides[9], strides[10], strides[11]}, out, decay_out);
  }
}

extern "C" {
long long trees_bytes(long long batch, long long height, long long width, bool wide) {
  Cutter cutter(nullptr);
  forest_of(problem_of(batch, height, width, 0), wide, cutter);
  return cutter.bytes();
}
long long filter_bytes(long long batch, long long channels, long long pixels, bool wide, bool backward) {
  const Problem problem = problem_of(batch, 1, pixels, channels);
  Cutter cutter(nullptr);
  if (wide) {
    fields_of<double>(problem, nullptr, {}, backward, cutter);
  } else {
    fields_of<float>(problem, nullptr, {}, backward, cutter);
  }
  return cutter.bytes();
}
void trees_float32(const float* weight, const long long* strides, long long batch, long long height, long long width,
                   char* memory, long long* order, long long* parent, long long* edge, unsigned seed) {
  trees(weight, strides, batch, height, width, memory, order, parent, edge, seed);
}
void trees_float64(const double* weight, const long long* strides, long long batch, long long height, long long width,
                   char* memory, long long* order, long long* parent, long long* edge, unsigned seed) {
  trees(weight, strides, batch, height, width, memory, order, parent, edge, seed);
}
void filter_float32(const float* values, const float* decay, const long long* order, const long long* parent,
                    const float* gradient, const long long* strides, long long batch, long long channels,
                    long long pixels, char* memory, float* out, float* decay_out, unsigned seed) {
  run(values, decay, order, parent, gradient, strides, batch, channels, pixels, memory, out, decay_out, seed);
}
void filter_float64(const double* values, const double* decay, const long long* order, const long long* parent,
                    const double* gradient, const long long* strides, long long batch, long long channels,
                    long long pixels, char* memory, double* out, double* decay_out, unsigned seed) {
  run(values, decay, order, parent, gradient, strides, batch, channels, pixels, memory, out, decay_out, seed);
}
}
