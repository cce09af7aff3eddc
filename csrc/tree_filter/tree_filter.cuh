// Minimum spanning trees of pixel grids and the filter on them, device code; docs/kernels/tree_filter.md says why the
// kernels are as they are, tree_filter_launch.h has their order.
#pragma once

#include "common/union_find.cuh"
#include "common/warp.cuh"

namespace tree_filter {

using Wide = unsigned long long;

constexpr int kThreads = 256;
// Channels that a block sweeps over the tree, and the places that it takes at a time.
constexpr int kWidth = 4;
constexpr int kPlaces = 128;
constexpr int kSweepThreads = kWidth * kPlaces;
constexpr Wide kNone = ~Wide{0};

// Edges are numbered: to the right [H, W - 1], then down [H - 1, W].
struct Problem {
  int height, width;
  int pixels, right;  // H W, and the number of edges to the right
  long long batch;
  int rounds;    // of Boruvka
  int channels;  // of values; one more is that of the normaliser
  int parts;     // ceil((C + 1) / kWidth)
};

// Where a matrix [B, N] is, in elements.
struct Rows {
  long long batch, step;
  __device__ __forceinline__ long long at(long long b, long long k) const { return b * batch + k * step; }
};

// Where [B, C, N] is.
struct Planes {
  long long batch, channel, step;
  __device__ __forceinline__ long long at(long long b, long long c, long long k) const {
    return b * batch + c * channel + k * step;
  }
};

// One thread for a pixel or place of an image; `of` is what the blocks of an image are one of: an image, or its part.
struct Own {
  long long of;
  int i;  // may be past the last
};

__device__ __forceinline__ Own own_of(const Problem& problem) {
  const unsigned blocks = (static_cast<unsigned>(problem.pixels) + kThreads - 1) / kThreads;
  return {blockIdx.x / blocks, static_cast<int>(blockIdx.x % blocks * kThreads + threadIdx.x)};
}

// ---- The tree: rounds in which each component takes the lightest edge that leaves it

// Directions of edges of the tree from a pixel, in the order in which `grow` takes them.
constexpr unsigned kUp = 1, kLeft = 2, kRight = 4, kDown = 8;

struct Forest {
  int* component;        // [B, N]: its root, as of the round before
  int* link;             // [B, N]: of a root the root that it joins in this round
  Wide* lowest;          // [B, N]: of a root the bits of the weight of its lightest edge; float64 alone
  Wide* best;            // [B, N]: of a root its lightest edge in the low 32 bits, of float32 below its weight's bits
  unsigned* directions;  // [B, N]
  int* open;             // [B, rounds]: whether components are left to be joined
};

// Integers in the order of weights; -0 is 0. By bits alone, as arithmetic may take the smallest numbers for 0.
__device__ __forceinline__ unsigned ordered(float weight) {
  constexpr unsigned kSign = 1u << 31;
  const unsigned bits = __float_as_uint(weight);
  return bits > kSign ? ~bits : bits | kSign;
}
__device__ __forceinline__ Wide ordered(double weight) {
  constexpr Wide kSign = Wide{1} << 63;
  const Wide bits = static_cast<Wide>(__double_as_longlong(weight));
  return bits > kSign ? ~bits : bits | kSign;
}

__global__ void __launch_bounds__(kThreads) prepare(Problem problem, Forest forest, bool wide) {
  const Own own = own_of(problem);
  if (own.i < problem.rounds) forest.open[own.of * problem.rounds + own.i] = 0;
  if (own.i >= problem.pixels) return;
  const long long at = own.of * problem.pixels + own.i;
  forest.component[at] = forest.link[at] = own.i;
  forest.best[at] = kNone;
  if (wide) forest.lowest[at] = kNone;
  forest.directions[at] = 0;
}

// Calls body(e, a, b) for the edges to the right and down from the own pixel that join components a and b.
template <class Body>
__device__ __forceinline__ void between_components(const Problem& problem, const Own& own, const int* component,
                                                   Body body) {
  const int a = component[own.i];
  const int y = own.i / problem.width, x = own.i % problem.width;
  if (x + 1 < problem.width) {
    const int b = component[own.i + 1];
    if (a != b) body(own.i - y, a, b);
  }
  if (y + 1 < problem.height) {
    const int b = component[own.i + problem.width];
    if (a != b) body(problem.right + own.i, a, b);
  }
}

// Most keys are no minimum: reading first spares their atomics.
__device__ __forceinline__ void offer(Wide* minimum, Wide key) {
  if (key < *static_cast<volatile Wide*>(minimum)) atomicMin(minimum, key);
}

// weight [B, E]. In float32 `best` is done; in float64 `lowest` is, and `find_edges` comes next.
template <class T>
__global__ void __launch_bounds__(kThreads)
    find_lightest(Problem problem, Forest forest, const T* __restrict__ weight, Rows weight_at, int round) {
  const Own own = own_of(problem);
  int* open = forest.open + own.of * problem.rounds + round;
  if (own.i >= problem.pixels || (round > 0 && open[-1] == 0)) return;
  const long long base = own.of * problem.pixels;
  between_components(problem, own, forest.component + base, [&](int e, int a, int b) {
    // All write the same.
    *open = 1;
    const auto bits = ordered(weight[weight_at.at(own.of, e)]);
    if constexpr (sizeof(T) == 4) {
      const Wide key = static_cast<Wide>(bits) << 32 | static_cast<unsigned>(e);
      offer(forest.best + base + a, key);
      offer(forest.best + base + b, key);
    } else {
      offer(forest.lowest + base + a, bits);
      offer(forest.lowest + base + b, bits);
    }
  });
}

// Of the edges with the lowest weight the one with the lowest number.
__global__ void __launch_bounds__(kThreads)
    find_edges(Problem problem, Forest forest, const double* __restrict__ weight, Rows weight_at, int round) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels || forest.open[own.of * problem.rounds + round] == 0) return;
  const long long base = own.of * problem.pixels;
  between_components(problem, own, forest.component + base, [&](int e, int a, int b) {
    const Wide bits = ordered(weight[weight_at.at(own.of, e)]);
    if (bits == forest.lowest[base + a]) offer(forest.best + base + a, static_cast<unsigned>(e));
    if (bits == forest.lowest[base + b]) offer(forest.best + base + b, static_cast<unsigned>(e));
  });
}

// Roots take their edges into the tree. Of two that take the same one the lower stays a root; as keys differ, there are
// no longer cycles.
__global__ void __launch_bounds__(kThreads) join(Problem problem, Forest forest, int round) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels || forest.open[own.of * problem.rounds + round] == 0) return;
  const long long base = own.of * problem.pixels;
  const int* component = forest.component + base;
  const Wide* best = forest.best + base;
  if (component[own.i] != own.i || best[own.i] == kNone) return;
  const int e = static_cast<int>(best[own.i] & 0xffffffffu);
  const bool across = e < problem.right;
  const int i = across ? e + e / (problem.width - 1) : e - problem.right;
  const int j = across ? i + 1 : i + problem.width;
  const int other = component[i] == own.i ? component[j] : component[i];
  atomicOr(forest.directions + base + i, across ? kRight : kDown);
  atomicOr(forest.directions + base + j, across ? kLeft : kUp);
  if (best[other] != best[own.i] || other < own.i) forest.link[base + own.i] = other;
}

// Components after the round; clears what the next one needs.
__global__ void __launch_bounds__(kThreads) relabel(Problem problem, Forest forest, int round, bool wide) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels || forest.open[own.of * problem.rounds + round] == 0) return;
  const long long base = own.of * problem.pixels;
  forest.component[base + own.i] = find(forest.link + base, forest.component[base + own.i]);
  forest.best[base + own.i] = kNone;
  if (wide) forest.lowest[base + own.i] = kNone;
}

// ---- The order: breadth first from pixel 0, as the CPU's

// The sum of `value` over the threads before this one; `total` becomes that over all. Called by all threads.
__device__ __forceinline__ int sum_before(int value, int& total) {
  __shared__ int warps[kThreads / 32];
  int sum = sum_up_to_lane(value);
  if (lane_index() == 31) warps[warp_index()] = sum;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp_index()) sum += warps[w];
    total += warps[w];
  }
  // The next call writes warps.
  __syncthreads();
  return sum - value;
}

// One block for an image: level by level. order, parent, edge [B, N].
__global__ void __launch_bounds__(kThreads)
    grow(Problem problem, Forest forest, long long* order, long long* parent, long long* edge) {
  const long long base = static_cast<long long>(blockIdx.x) * problem.pixels;
  unsigned* directions = forest.directions + base;
  order += base;
  parent += base;
  edge += base;
  if (threadIdx.x == 0) {
    order[0] = parent[0] = 0;
    edge[0] = -1;
  }
  __syncthreads();
  for (int begin = 0, end = 1; begin < end;) {
    int next = end;
    for (int first = begin; first < end; first += kThreads) {
      const int place = first + static_cast<int>(threadIdx.x);
      const int i = place < end ? static_cast<int>(order[place]) : 0;
      const unsigned ways = place < end ? directions[i] : 0;
      int total;
      int child = next + sum_before(__popc(ways), total);
      next += total;
      const auto visit = [&](unsigned way, unsigned back, int j, int e) {
        if ((ways & way) == 0) return;
        // No other pixel leads there, so that nobody else writes it.
        directions[j] &= ~back;
        order[child] = j;
        parent[child] = place;
        edge[child++] = e;
      };
      const int across = i - i / problem.width;
      visit(kUp, kDown, i - problem.width, problem.right + i - problem.width);
      visit(kLeft, kRight, i - 1, across - 1);
      visit(kRight, kLeft, i + 1, across);
      visit(kDown, kUp, i + problem.width, problem.right + i);
    }
    __syncthreads();
    begin = end;
    end = next;
  }
}

// ---- The filter

// The tree as the sweeps read it. Places are those of `grow`: breadth first, so that parents ascend, and the children
// of a place stand together.
template <class T>
struct Tree {
  int* place;   // [B, N]: of a pixel
  int* parent;  // [B, N]
  int* start;   // [B, N + 1]: of a place its first child; those of the next one follow
  const T* decay;
  Rows decay_at;
};

// Channels of one place; field [B, parts, N].
template <class T>
struct alignas(kWidth * sizeof(T)) Line {
  T at[kWidth];
};

// order, parent [B, N].
__global__ void __launch_bounds__(kThreads)
    arrange(Problem problem, const long long* __restrict__ order, Rows order_at, const long long* __restrict__ parent,
            Rows parent_at, int* __restrict__ place, int* __restrict__ parent_out, int* __restrict__ start) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels) return;
  const long long base = own.of * problem.pixels;
  place[base + order[order_at.at(own.of, own.i)]] = own.i;
  parent_out[base + own.i] = static_cast<int>(parent[parent_at.at(own.of, own.i)]);
  // The first place but the root whose parent is not before the own one.
  int low = 1, high = problem.pixels;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (parent[parent_at.at(own.of, middle)] < own.i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int* starts = start + own.of * (problem.pixels + 1LL);
  starts[own.i] = low;
  if (own.i == problem.pixels - 1) starts[problem.pixels] = problem.pixels;
}

// values [B, C, N] in the order of the tree, ones behind the last channel and then zeros. A thread for a pixel and a
// part.
template <class T>
__global__ void __launch_bounds__(kThreads) read(Problem problem, const int* __restrict__ place,
                                                 const T* __restrict__ values, Planes values_at, Line<T>* field) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels) return;
  const long long image = own.of / problem.parts;
  const int first = static_cast<int>(own.of % problem.parts) * kWidth;
  Line<T> line;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const int channel = first + c;
    line.at[c] = channel < problem.channels ? values[values_at.at(image, channel, own.i)]
                                            : static_cast<T>(channel == problem.channels);
  }
  field[own.of * problem.pixels + place[image * problem.pixels + own.i]] = line;
}

// below [B, parts, N]: from the leaves to the root, sums over the pixels below each, as they arrive there; all: from
// the root to the leaves, sums over all pixels. One block for a part; `all` may be `below`.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) sweep(Problem problem, Tree<T> tree, Line<T>* below, Line<T>* all) {
  const long long image = blockIdx.x / problem.parts;
  const int n = problem.pixels;
  const int* __restrict__ parent = tree.parent + image * n;
  const int* __restrict__ start = tree.start + image * (n + 1LL);
  const T* __restrict__ decay = tree.decay + tree.decay_at.at(image, 0);
  const long long step = tree.decay_at.step;
  below += static_cast<long long>(blockIdx.x) * n;
  all += static_cast<long long>(blockIdx.x) * n;
  const int c = static_cast<int>(threadIdx.x) % kWidth, own = static_cast<int>(threadIdx.x) / kWidth;
  // What stands behind the parent of the last place has all its children behind that place: no two of these are one
  // below the other.
  for (int end = n; end > 0;) {
    const int begin = end > 1 ? parent[end - 1] + 1 : 0;
    for (int k = begin + own; k < end; k += kPlaces) {
      const int first = start[k];
      int child = start[k + 1] - 1;
      if (child < first) continue;
      T sum = below[k].at[c];
      for (; child >= first; --child) sum += decay[child * step] * below[child].at[c];
      below[k].at[c] = sum;
    }
    __syncthreads();
    end = begin;
  }
  if (own == 0) all[0].at[c] = below[0].at[c];
  __syncthreads();
  // What stands before the first child of the first place has its parent before that place.
  for (int begin = 1; begin < n;) {
    const int end = start[begin];
    for (int k = begin + own; k < end; k += kPlaces) {
      const T s = decay[k * step];
      all[k].at[c] = s * all[parent[k]].at[c] + (T{1} - s * s) * below[k].at[c];
    }
    __syncthreads();
    begin = end;
  }
}

// Of the channel behind the last one.
template <class T>
__device__ __forceinline__ T normaliser(const Problem& problem, const Line<T>* field, long long image, int place) {
  const long long part = image * problem.parts + problem.channels / kWidth;
  return field[part * problem.pixels + place].at[problem.channels % kWidth];
}

// out [B, C, N] in the order of pixels, divided by the normaliser where that is asked for. A thread for a pixel and a
// part.
template <class T>
__global__ void __launch_bounds__(kThreads)
    write(Problem problem, const int* __restrict__ place, const Line<T>* __restrict__ field, bool divide,
          T* __restrict__ out) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels) return;
  const long long image = own.of / problem.parts;
  const int first = static_cast<int>(own.of % problem.parts) * kWidth;
  const int k = place[image * problem.pixels + own.i];
  const Line<T> line = field[own.of * problem.pixels + k];
  const T norm = divide ? normaliser(problem, field, image, k) : T{1};
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const int channel = first + c;
    if (channel >= problem.channels) continue;
    out[(image * problem.channels + channel) * problem.pixels + own.i] = line.at[c] / norm;
  }
}

// y = u / z: the gradient of u is g / z, that of z is -g y / z. gradient [B, C, N], all: u and z; a thread for a pixel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    read_gradient(Problem problem, const int* __restrict__ place, const T* __restrict__ gradient, Planes gradient_at,
                  const Line<T>* __restrict__ all, Line<T>* __restrict__ field) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels) return;
  const int k = place[own.of * problem.pixels + own.i];
  const T norm = normaliser(problem, all, own.of, k);
  T sum = 0;
  for (int part = 0; part < problem.parts; ++part) {
    const long long at = (own.of * problem.parts + part) * problem.pixels + k;
    const Line<T> u = all[at];
    Line<T> line;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const int channel = part * kWidth + c;
      line.at[c] = T{0};
      if (channel < problem.channels) {
        line.at[c] = gradient[gradient_at.at(own.of, channel, own.i)] / norm;
        sum += line.at[c] * u.at[c];
      } else if (channel == problem.channels) {
        line.at[c] = -sum / norm;
      }
    }
    field[at] = line;
  }
}

// An edge with decay s lies between the pixels below it and all others: its gradient is what g gathers on the one side
// times what v gathers on the other, both as they arrive at the edge, and the reverse. out [B, N]; a thread for a
// place.
template <class T>
__global__ void __launch_bounds__(kThreads)
    decay_gradient(Problem problem, Tree<T> tree, const Line<T>* __restrict__ below_v,
                   const Line<T>* __restrict__ all_v, const Line<T>* __restrict__ below_g,
                   const Line<T>* __restrict__ all_g, T* __restrict__ out) {
  const Own own = own_of(problem);
  if (own.i >= problem.pixels) return;
  const T s = tree.decay[tree.decay_at.at(own.of, own.i)];
  const int above = tree.parent[own.of * problem.pixels + own.i];
  T sum = 0;
  for (int part = 0; own.i > 0 && part < problem.parts; ++part) {
    const long long base = (own.of * problem.parts + part) * problem.pixels;
    const Line<T> v = below_v[base + own.i], g = below_g[base + own.i];
    const Line<T> v_above = all_v[base + above], g_above = all_g[base + above];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      sum += g.at[c] * (v_above.at[c] - s * v.at[c]) + v.at[c] * (g_above.at[c] - s * g.at[c]);
    }
  }
  out[own.of * problem.pixels + own.i] = sum;
}

}  // namespace tree_filter
