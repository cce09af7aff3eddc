// The kernels of color_affinity on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include "color_affinity/color_affinity.cuh"

namespace color_affinity {

struct Sizes {
  long long batch;
  int height, width, nodes;
  long long places;  // for edges

  long long rows() const { return batch * nodes; }
  long long bucket_places() const { return 2LL * height * width; }
};

// Memory that the kernels share, cut from one allocation; what each part holds stands at the kernel that fills it.
struct Scratch {
  unsigned long long* extremes;  // [B, 2]
  double* w;                     // [B, E]
  int* counters;                 // [B, K, 96]
  int* taken;                    // [B, K]
  int* bucket_starts;            // [B, K + 1]
  int* edge_starts;              // [B, K + 1]
  int* ranges;                   // [B, 2]
  int* buckets;                  // [B, 2 H W]; what the borders do not fill is never touched

  Scratch(char* memory, const Sizes& s) {
    bytes_ = 0;
    extremes = take<unsigned long long>(memory, 2 * s.batch);
    w = take<double>(memory, s.batch * s.places);
    counters = take<int>(memory, s.rows() * kCounters);
    taken = take<int>(memory, s.rows());
    bucket_starts = take<int>(memory, s.rows() + s.batch);
    edge_starts = take<int>(memory, s.rows() + s.batch);
    ranges = take<int>(memory, 2 * s.batch);
    buckets = take<int>(memory, s.batch * s.bucket_places());
  }

  static long long bytes(const Sizes& s) { return Scratch(nullptr, s).bytes_; }

 private:
  template <class T>
  T* take(char* memory, long long count) {
    T* const part = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes_);
    bytes_ += count * static_cast<long long>(sizeof(T));
    return part;
  }

  long long bytes_;
};

inline dim3 blocks_for(long long count, int per_block) {
  return dim3(static_cast<unsigned>((count + per_block - 1) / per_block));
}

// Fills counters (but for the pixels), and the buckets.
template <class Id, class Launch>
void run_counts(Launch&& launch, const Maps<Id>& maps, const Sizes& s, const Scratch& scratch) {
  // The parts to clear lie one after the other.
  const long long zeros = s.rows() * (kCounters + 2) + s.batch;
  constexpr long long kMostBlocks = 4096;
  const long long blocks = (zeros + kThreads - 1) / kThreads;
  launch(blocks_for(blocks < kMostBlocks ? blocks : kMostBlocks, 1), dim3(kThreads), clear, scratch.counters, zeros,
         scratch.ranges, scratch.extremes, s.batch);
  const dim3 tiles = blocks_for(s.batch * maps.tiles(), 1);
  launch(tiles, dim3(kThreads), measure<Id>, maps, scratch.ranges, scratch.bucket_starts);
  launch(blocks_for(s.batch, 1), dim3(kThreads), exclusive_sums, scratch.bucket_starts, s.nodes);
  launch(tiles, dim3(kThreads), count<Id>, maps, scratch.ranges, scratch.bucket_starts, scratch.taken, scratch.buckets,
         scratch.counters);
}

// edge_index [B, 2, E], weight [B, E], num_edges [B], counts [B, K], contiguous. None of B, H, W, K is 0.
template <class Id, class Launch>
void run(Launch&& launch, const Maps<Id>& maps, const Sizes& s, const Scratch& scratch, long long* edge_index,
         float* weight, long long* num_edges, long long* counts) {
  run_counts(launch, maps, s, scratch);
  const dim3 warps = blocks_for(s.rows(), kWarps);
  launch(warps, dim3(kThreads), count_edges, scratch.bucket_starts, scratch.buckets, s.bucket_places(), s.nodes,
         s.rows(), scratch.counters, scratch.edge_starts, counts);
  launch(blocks_for(s.batch, 1), dim3(kThreads), exclusive_sums, scratch.edge_starts, s.nodes);
  launch(warps, dim3(kThreads), place_edges, scratch.bucket_starts, scratch.buckets, s.bucket_places(),
         scratch.edge_starts, s.nodes, s.rows(), s.places, edge_index);
  // One block even without places: `finish` writes the number of edges.
  const long long places = s.places > 0 ? s.places : 1;
  const unsigned edge_blocks = blocks_for(places, kWarps).x, place_blocks = blocks_for(places, kThreads).x;
  launch(blocks_for(s.batch * edge_blocks, 1), dim3(kThreads), weigh, edge_index, scratch.edge_starts,
         scratch.counters, s.nodes, s.places, edge_blocks, scratch.w, scratch.extremes);
  launch(blocks_for(s.batch * place_blocks, 1), dim3(kThreads), finish, scratch.edge_starts, scratch.w,
         scratch.extremes, s.nodes, s.places, place_blocks, edge_index, weight, num_edges);
}

// The integers alone: color [B, K, 75], texture [B, K, 20], counts [B, K].
template <class Id, class Launch>
void run_histograms(Launch&& launch, const Maps<Id>& maps, const Sizes& s, const Scratch& scratch, long long* color,
                    long long* texture, long long* counts) {
  run_counts(launch, maps, s, scratch);
  launch(blocks_for(s.rows(), kWarps), dim3(kThreads), widen, scratch.counters, s.rows(), color, texture, counts);
}

}  // namespace color_affinity
