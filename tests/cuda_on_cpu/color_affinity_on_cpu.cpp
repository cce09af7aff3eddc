// The kernels of color_affinity on a CPU, for tests.
#include "color_affinity/color_affinity_launch.h"

using color_affinity::Maps;
using color_affinity::Scratch;
using color_affinity::Sizes;

extern "C" {

// What all functions take: image [B, 3, H, W] and ids [B, H, W] with strides, and sizes.
struct Problem {
  const unsigned char* image;
  Strides image_strides;
  const void* ids;
  Strides id_strides;
  Sizes sizes;
  int wide_ids;
};

long long scratch_bytes(const Problem* problem) { return Scratch::bytes(problem->sizes); }
}

template <class Body>
static void with_maps(const Problem& p, Body body) {
  const auto call = [&](auto id) {
    using Id = decltype(id);
    body(Maps<Id>{p.image, p.image_strides, static_cast<const Id*>(p.ids), p.id_strides, p.sizes.height, p.sizes.width,
                  p.sizes.nodes});
  };
  if (p.wide_ids) {
    call(0LL);
  } else {
    call(int{});
  }
}

extern "C" {

void affinity(const Problem* problem, char* memory, long long* edge_index, float* weight, long long* num_edges,
              long long* counts, unsigned seed) {
  with_maps(*problem, [&](const auto& maps) {
    color_affinity::run(cuda_on_cpu::Launcher(seed), maps, problem->sizes, Scratch(memory, problem->sizes), edge_index,
                        weight, num_edges, counts);
  });
}

void histograms(const Problem* problem, char* memory, long long* color, long long* texture, long long* counts,
                unsigned seed) {
  with_maps(*problem, [&](const auto& maps) {
    color_affinity::run_histograms(cuda_on_cpu::Launcher(seed), maps, problem->sizes,
                                   Scratch(memory, problem->sizes), color, texture, counts);
  });
}
}
