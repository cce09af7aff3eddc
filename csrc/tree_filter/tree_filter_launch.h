// The kernels of tree_filter on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "tree_filter/tree_filter.cuh"

namespace tree_filter {

// Fewer than 2^30 pixels, at least one.
inline Problem problem_of(long long batch, long long height, long long width, long long channels) {
  Problem problem{};
  problem.height = static_cast<int>(height);
  problem.width = static_cast<int>(width);
  problem.pixels = static_cast<int>(height * width);
  problem.right = static_cast<int>(height * (width - 1));
  problem.batch = batch;
  // Each round leaves at most half of the components.
  while (problem.pixels > 1LL << problem.rounds) ++problem.rounds;
  problem.channels = static_cast<int>(channels);
  problem.parts = problem.channels / kWidth + 1;
  return problem;
}

// Blocks of the largest grid, to be below 2^31.
inline long long blocks_of(const Problem& problem) {
  return problem.batch * problem.parts * ((problem.pixels + kThreads - 1) / kThreads);
}

// Cuts memory that is aligned to 256 bytes, or, from null, says how many bytes it takes; nothing need be set there.
class Cutter {
 public:
  explicit Cutter(char* memory) : memory_(memory) {}

  template <class T>
  T* take(long long count) {
    T* const part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * static_cast<long long>(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  long long bytes() const { return bytes_; }

 private:
  char* memory_;
  long long bytes_ = 0;
};

// wide: weights are float64.
inline Forest forest_of(const Problem& problem, bool wide, Cutter& cutter) {
  const long long pixels = problem.batch * problem.pixels;
  Forest forest{};
  forest.component = cutter.take<int>(pixels);
  forest.link = cutter.take<int>(pixels);
  forest.lowest = cutter.take<Wide>(wide ? pixels : 0);
  forest.best = cutter.take<Wide>(pixels);
  forest.directions = cutter.take<unsigned>(pixels);
  forest.open = cutter.take<int>(problem.batch * problem.rounds);
  return forest;
}

template <class T>
struct Fields {
  Tree<T> tree;
  Line<T>*below_v, *all_v, *below_g, *all_g;
};

// backward: all four fields; forward one.
template <class T>
Fields<T> fields_of(const Problem& problem, const T* decay, Rows decay_at, bool backward, Cutter& cutter) {
  const long long pixels = problem.batch * problem.pixels;
  Fields<T> fields{};
  fields.tree.place = cutter.take<int>(pixels);
  fields.tree.parent = cutter.take<int>(pixels);
  fields.tree.start = cutter.take<int>(pixels + problem.batch);
  fields.tree.decay = decay;
  fields.tree.decay_at = decay_at;
  fields.below_v = fields.all_v = cutter.take<Line<T>>(pixels * problem.parts);
  if (!backward) return fields;
  fields.all_v = cutter.take<Line<T>>(pixels * problem.parts);
  fields.below_g = cutter.take<Line<T>>(pixels * problem.parts);
  fields.all_g = cutter.take<Line<T>>(pixels * problem.parts);
  return fields;
}

inline dim3 grid_of(const Problem& problem, long long of) {
  return dim3(static_cast<unsigned>(of * ((problem.pixels + kThreads - 1) / kThreads)));
}

// weight [B, E] -> order, parent, edge [B, N].
template <class T, class Launch>
void grow_trees(Launch&& launch, const Problem& problem, const Forest& forest, const T* weight, Rows weight_at,
                long long* order, long long* parent, long long* edge) {
  constexpr bool kWide = sizeof(T) == 8;
  const dim3 pixels = grid_of(problem, problem.batch), threads(kThreads);
  launch(pixels, threads, prepare, problem, forest, kWide);
  for (int round = 0; round < problem.rounds; ++round) {
    launch(pixels, threads, find_lightest<T>, problem, forest, weight, weight_at, round);
    if constexpr (kWide) launch(pixels, threads, find_edges, problem, forest, weight, weight_at, round);
    launch(pixels, threads, join, problem, forest, round);
    launch(pixels, threads, relabel, problem, forest, round, kWide);
  }
  launch(dim3(static_cast<unsigned>(problem.batch)), threads, grow, problem, forest, order, parent, edge);
}

template <class T, class Launch>
void sweep_values(Launch&& launch, const Problem& problem, const Fields<T>& fields, const long long* order,
                  Rows order_at, const long long* parent, Rows parent_at, const T* values, Planes values_at) {
  const dim3 threads(kThreads);
  launch(grid_of(problem, problem.batch), threads, arrange, problem, order, order_at, parent, parent_at,
         fields.tree.place, fields.tree.parent, fields.tree.start);
  launch(grid_of(problem, problem.batch * problem.parts), threads, read<T>, problem, fields.tree.place, values,
         values_at, fields.below_v);
  launch(dim3(static_cast<unsigned>(problem.batch * problem.parts)), dim3(kSweepThreads), sweep<T>, problem,
         fields.tree, fields.below_v, fields.all_v);
}

// values [B, C, N], order and parent [B, N] as of `grow_trees` -> out [B, C, N] contiguous.
template <class T, class Launch>
void filter(Launch&& launch, const Problem& problem, const Fields<T>& fields, const long long* order, Rows order_at,
            const long long* parent, Rows parent_at, const T* values, Planes values_at, T* out) {
  sweep_values(launch, problem, fields, order, order_at, parent, parent_at, values, values_at);
  launch(grid_of(problem, problem.batch * problem.parts), dim3(kThreads), write<T>, problem, fields.tree.place,
         fields.all_v, true, out);
}

// gradient [B, C, N] -> of values [B, C, N] and of decay [B, N], contiguous.
template <class T, class Launch>
void filter_backward(Launch&& launch, const Problem& problem, const Fields<T>& fields, const long long* order,
                     Rows order_at, const long long* parent, Rows parent_at, const T* values, Planes values_at,
                     const T* gradient, Planes gradient_at, T* values_out, T* decay_out) {
  const dim3 threads(kThreads), pixels = grid_of(problem, problem.batch);
  sweep_values(launch, problem, fields, order, order_at, parent, parent_at, values, values_at);
  launch(pixels, threads, read_gradient<T>, problem, fields.tree.place, gradient, gradient_at, fields.all_v,
         fields.below_g);
  launch(dim3(static_cast<unsigned>(problem.batch * problem.parts)), dim3(kSweepThreads), sweep<T>, problem,
         fields.tree, fields.below_g, fields.all_g);
  launch(grid_of(problem, problem.batch * problem.parts), threads, write<T>, problem, fields.tree.place, fields.all_g,
         false, values_out);
  launch(pixels, threads, decay_gradient<T>, problem, fields.tree, fields.below_v, fields.all_v, fields.below_g,
         fields.all_g, decay_out);
}

}  // namespace tree_filter
