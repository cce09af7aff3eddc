// The kernels of slic on any launcher: csrc/common/cuda_launch.h, or that of tests/cuda_on_cpu.
#pragma once

#include <type_traits>

#include "slic/slic.cuh"

namespace slic {

// Sizes from 1; sides up to 2^20, fewer than 2^31 pixels; compactness in 1/256.
inline Problem problem_of(long long batch, long long height, long long width, long long num_segments,
                          long long compactness) {
  const cc4s::Cells cells = cc4s::cells_of(height, width, num_segments, compactness);
  Problem problem{};
  problem.height = static_cast<int>(height);
  problem.width = static_cast<int>(width);
  problem.num_segments = static_cast<int>(num_segments);
  problem.rows = static_cast<int>(cells.rows);
  problem.cols = static_cast<int>(cells.cols);
  problem.weight = cells.weight;
  // Wherever it begins, a tile of n pixels over cells of at least w touches no more than (n - 2) / w + 2 of them.
  const int narrowest = problem.width / problem.cols, tallest = (problem.height + problem.rows - 1) / problem.rows;
  const int widest_tile = (kTileCells - 1) * narrowest;
  problem.tile_width = widest_tile < kTileWidth ? widest_tile : kTileWidth;
  problem.tiles = (problem.width + problem.tile_width - 1) / problem.tile_width;
  problem.chunks = (tallest + kHalves * kRows - 1) / (kHalves * kRows);
  problem.pixels = height * width;
  problem.words = (problem.pixels + 31) / 32;
  // An image has fewer than 2 H W pairs of adjacent pixels: a fifth of the slots stays free.
  problem.table = problem.pixels * 5 / 2 + 1;
  problem.batch = batch;
  return problem;
}

// Blocks of the largest grid, to be below 2^31.
inline long long blocks_of(const Problem& problem) {
  const long long of_tiles = static_cast<long long>(problem.tiles) * problem.chunks * problem.rows;
  const long long of_pixels = (problem.pixels + kPixelThreads - 1) / kPixelThreads;
  return problem.batch * (of_tiles < of_pixels ? of_pixels : of_tiles);
}

// Places in memory of `bytes`, of which nothing need be set.
struct Layout {
  Scratch scratch;
  long long bytes;
};

// memory: aligned to 256 bytes, or null to get the number of bytes.
inline Layout layout_of(const Problem& problem, char* memory) {
  Layout layout{};
  const auto take = [&](auto*& pointer, long long count) {
    using Value = std::remove_reference_t<decltype(*pointer)>;
    pointer = memory == nullptr ? nullptr : reinterpret_cast<Value*>(memory + layout.bytes);
    layout.bytes += (count * static_cast<long long>(sizeof(Value)) + 255) / 256 * 256;
  };
  Scratch& scratch = layout.scratch;
  const long long pixels = problem.batch * problem.pixels, slots = problem.batch * problem.table;
  take(scratch.sums, 3 * problem.batch * problem.rows * problem.cols * kSums);
  take(scratch.parent, pixels);
  take(scratch.size, pixels);
  take(scratch.choice, pixels);
  take(scratch.border, slots);
  take(scratch.length, slots);
  take(scratch.list_border, 2 * pixels);
  take(scratch.list_length, 2 * pixels);
  take(scratch.roots, problem.batch * problem.words);
  take(scratch.rank, problem.batch * problem.words);
  take(scratch.regions, problem.batch);
  // Colours are gone before the first list is written.
  scratch.colors = reinterpret_cast<int2*>(scratch.list_border);
  return layout;
}

// image [B, 3, H, W] with strides, mask [B, H, W] with strides or null, labels [B, H, W] contiguous.
template <class Launch>
void run(Launch&& launch, const Problem& problem, const Scratch& scratch, const unsigned char* image, Strides image_at,
         const bool* mask, Strides mask_at, long long iterations, int* labels) {
  const dim3 tiles(static_cast<unsigned>(problem.batch * problem.tiles * problem.chunks * problem.rows));
  const dim3 pixels(
      static_cast<unsigned>(problem.batch * ((problem.pixels + kPixelThreads - 1) / kPixelThreads)));
  launch(pixels, dim3(kPixelThreads), prepare, problem, scratch);
  launch(tiles, dim3(kTileThreads), begin, problem, scratch, image, image_at, mask, mask_at, iterations == 0, labels);
  for (long long round = 0; round < iterations; ++round) {
    const bool last = round + 1 == iterations;
    launch(tiles, dim3(kTileThreads), assign, problem, scratch, static_cast<int>(round % 3), last, labels);
  }
  launch(pixels, dim3(kPixelThreads), unite_runs, problem, scratch, labels);
  launch(pixels, dim3(kPixelThreads), find_roots, problem, scratch);
  launch(pixels, dim3(kPixelThreads), clear_borders, problem, scratch);
  launch(pixels, dim3(kPixelThreads), find_borders, problem, scratch);
  // Whole warps, a thread for 64 pixels.
  const long long warps = problem.pixels / (64 * 32) + 1;
  const dim3 threads(warps < kMaxMergeThreads / 32 ? static_cast<unsigned>(warps) * 32 : kMaxMergeThreads);
  const dim3 images(static_cast<unsigned>(problem.batch));
  launch(images, threads, merge, problem, scratch, static_cast<int>(iterations % 3));
  launch(pixels, dim3(kPixelThreads), number, problem, scratch, labels);
}

}  // namespace slic
