// Minimum spanning trees of pixel grids and the filter on them; docs/kernels/tree_filter.md has the schedule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/image_rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- The tree

// The lowest pixel is the root of its set; paths are halved.
int32_t find(std::vector<int32_t>& parent, int32_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

// Edges to the right [H, W - 1], then edges down [H, W].
struct Grid {
  int64_t height, width;

  int64_t pixels() const { return height * width; }
  int64_t right() const { return height * (width - 1); }
  int64_t edges() const { return right() + (height - 1) * width; }
  std::pair<int32_t, int32_t> ends(int64_t e) const {
    if (e < right()) {
      const int64_t i = e / (width - 1) * width + e % (width - 1);
      return {static_cast<int32_t>(i), static_cast<int32_t>(i + 1)};
    }
    return {static_cast<int32_t>(e - right()), static_cast<int32_t>(e - right() + width)};
  }
};

// weight [E] -> pixels in an order in which parents come first, from pixel 0; the place of each one's parent, and the
// edge to it (-1 for the root).
template <typename T>
void span(const Grid& grid, const T* weight, int64_t step, int64_t* order, int64_t* parent, int64_t* edge) {
  std::vector<std::pair<T, int32_t>> sorted(static_cast<size_t>(grid.edges()));
  for (int64_t e = 0; e < grid.edges(); ++e) sorted[e] = {weight[e * step], static_cast<int32_t>(e)};
  // Ties by the number of the edge: one tree only.
  std::sort(sorted.begin(), sorted.end());
  std::vector<int32_t> sets(static_cast<size_t>(grid.pixels()));
  std::iota(sets.begin(), sets.end(), 0);
  std::vector<bool> chosen(static_cast<size_t>(grid.edges()));
  for (const auto& [w, e] : sorted) {
    const auto [i, j] = grid.ends(e);
    const int32_t a = find(sets, i), b = find(sets, j);
    if (a == b) continue;
    sets[std::max(a, b)] = std::min(a, b);
    chosen[e] = true;
  }
  int64_t count = 1;
  order[0] = parent[0] = 0;
  edge[0] = -1;
  for (int64_t place = 0; place < count; ++place) {
    const int64_t i = order[place], y = i / grid.width, x = i % grid.width;
    const auto visit = [&](int64_t e, int64_t j) {
      if (!chosen[e] || e == edge[place]) return;
      order[count] = j;
      parent[count] = place;
      edge[count++] = e;
    };
    if (y > 0) visit(grid.right() + i - grid.width, i - grid.width);
    if (x > 0) visit(y * (grid.width - 1) + x - 1, i - 1);
    if (x + 1 < grid.width) visit(y * (grid.width - 1) + x, i + 1);
    if (y + 1 < grid.height) visit(grid.right() + i, i + grid.width);
  }
}

// weight [B, E] -> order, parent, edge [B, H W] int64.
std::tuple<Tensor, Tensor, Tensor> trees(const Tensor& weight, int64_t height, int64_t width) {
  const Grid grid{height, width};
  const bool wide = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(height >= 1 && width >= 1 && grid.pixels() < (int64_t{1} << 30), "expected 1 to 2^30 - 1 pixels");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == grid.edges() &&
                      (wide || weight.scalar_type() == ScalarType::Float),
                  "weight: expected float32 or float64 (B, E)");
  const int64_t batch = weight.size(0), n = grid.pixels();
  Tensor order = torch::stable::empty({batch, n}, ScalarType::Long);
  Tensor parent = torch::stable::empty({batch, n}, ScalarType::Long);
  Tensor edge = torch::stable::empty({batch, n}, ScalarType::Long);
  const auto run = [&](const auto* from) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        span(grid, from + b * weight.stride(0), weight.stride(1), order.mutable_data_ptr<int64_t>() + b * n,
             parent.mutable_data_ptr<int64_t>() + b * n, edge.mutable_data_ptr<int64_t>() + b * n);
      }
    });
  };
  if (wide) {
    run(weight.const_data_ptr<double>());
  } else {
    run(weight.const_data_ptr<float>());
  }
  return {order, parent, edge};
}

// ---- The filter

// Channels that a task works on, beside the normaliser.
constexpr int kChannels = 8;

struct Line {
  const int64_t* data;
  int64_t step;
  int64_t operator[](int64_t i) const { return data[i * step]; }
};

// One image: places in the order of the tree.
template <typename T>
struct Tree {
  std::vector<int32_t> order, parent;
  std::vector<T> decay;  // to the parent, 0 for the root

  Tree(int64_t n, Line pixels, Line parents, const T* decays, int64_t step) : order(n), parent(n), decay(n) {
    for (int64_t k = 0; k < n; ++k) {
      const int64_t pixel = pixels[k], place = parents[k];
      // Without this, a wrong tree could lead out of memory.
      STD_TORCH_CHECK(pixel >= 0 && pixel < n && place >= 0 && place < std::max<int64_t>(k, 1), "tree: no such pixel");
      order[k] = static_cast<int32_t>(pixel);
      parent[k] = static_cast<int32_t>(place);
      decay[k] = k == 0 ? T{0} : decays[k * step];
    }
  }
  int64_t size() const { return static_cast<int64_t>(order.size()); }
};

// [N, width] of one image in the order of its tree.
template <typename T, int width>
struct Field {
  std::vector<T> values;
  explicit Field(int64_t n) : values(static_cast<size_t>(n * width)) {}
  T* at(int64_t k) { return values.data() + k * width; }

  // From the leaves to the root: the sum over the pixels below each, as it arrives there.
  void gather(const Tree<T>& tree) {
    for (int64_t k = tree.size() - 1; k > 0; --k) {
      const T s = tree.decay[k];
      T *to = at(tree.parent[k]), *from = at(k);
      for (int c = 0; c < width; ++c) to[c] += s * from[c];
    }
  }

  // From the root to the leaves: what was gathered becomes the sum over all pixels.
  void spread(const Tree<T>& tree) {
    for (int64_t k = 1; k < tree.size(); ++k) {
      const T s = tree.decay[k], rest = T{1} - s * s;
      T *to = at(k), *from = at(tree.parent[k]);
      for (int c = 0; c < width; ++c) to[c] = s * from[c] + rest * to[c];
    }
  }
};

struct Arguments {
  const Tensor &values, &decay, &order, &parent;

  int64_t batch() const { return values.size(0); }
  int64_t channels() const { return values.size(1); }
  int64_t pixels() const { return values.size(2); }
  int64_t parts() const { return (channels() + kChannels - 1) / kChannels; }

  void check() const {
    const ScalarType type = values.scalar_type();
    STD_TORCH_CHECK(values.dim() == 3 && (type == ScalarType::Double || type == ScalarType::Float),
                    "values: expected float32 or float64 (B, C, N)");
    STD_TORCH_CHECK(pixels() < (int64_t{1} << 30), "values: expected fewer than 2^30 pixels");
    for (const Tensor* t : {&decay, &order, &parent}) {
      STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == batch() && t->size(1) == pixels(), "tree: expected (B, N)");
      STD_TORCH_CHECK(t->scalar_type() == (t == &decay ? type : ScalarType::Long), "tree: a wrong dtype");
    }
  }

  template <typename T>
  Tree<T> tree(int64_t b) const {
    return Tree<T>(pixels(), {order.const_data_ptr<int64_t>() + b * order.stride(0), order.stride(1)},
                   {parent.const_data_ptr<int64_t>() + b * parent.stride(0), parent.stride(1)},
                   decay.const_data_ptr<T>() + b * decay.stride(0), decay.stride(1));
  }

  // Channels of a part, in the order of the tree, zeros behind the last.
  template <typename T>
  void read(const Tensor& from, const Tree<T>& tree, int64_t b, int64_t part, Field<T, kChannels>& to) const {
    const int64_t count = std::min<int64_t>(kChannels, channels() - part * kChannels);
    const int64_t channel = from.stride(1), pixel = from.stride(2);
    const T* image = from.const_data_ptr<T>() + b * from.stride(0) + part * kChannels * channel;
    for (int64_t k = 0; k < pixels(); ++k) {
      const T* line = image + tree.order[k] * pixel;
      for (int64_t c = 0; c < kChannels; ++c) to.at(k)[c] = c < count ? line[c * channel] : T{0};
    }
  }

  template <typename T>
  void write(const Tree<T>& tree, int64_t b, int64_t part, Field<T, kChannels>& from, Tensor& to) const {
    const int64_t count = std::min<int64_t>(kChannels, channels() - part * kChannels);
    T* image = to.mutable_data_ptr<T>() + (b * channels() + part * kChannels) * pixels();
    for (int64_t k = 0; k < pixels(); ++k) {
      for (int64_t c = 0; c < count; ++c) image[c * pixels() + tree.order[k]] = from.at(k)[c];
    }
  }
};

template <typename T>
Field<T, 1> ones(int64_t n) {
  Field<T, 1> field(n);
  std::fill(field.values.begin(), field.values.end(), T{1});
  return field;
}

template <typename T>
void filter_part(const Arguments& arguments, int64_t b, int64_t part, Tensor& out) {
  const int64_t n = arguments.pixels();
  const Tree<T> tree = arguments.tree<T>(b);
  Field<T, kChannels> field(n);
  Field<T, 1> norm = ones<T>(n);
  arguments.read(arguments.values, tree, b, part, field);
  field.gather(tree);
  field.spread(tree);
  norm.gather(tree);
  norm.spread(tree);
  for (int64_t k = 0; k < n; ++k) {
    for (int c = 0; c < kChannels; ++c) field.at(k)[c] /= *norm.at(k);
  }
  arguments.write(tree, b, part, field, out);
}

// An edge with decay s lies between the pixels below it and all others: d sum_i g_i (sum_j S_ij v_j) / d s is what g
// gathers on the one side times what v gathers on the other, both as they arrive at the edge, and the reverse.
template <typename T, int width>
void add_decay_gradient(const Tree<T>& tree, Field<T, width>& below_v, Field<T, width>& all_v, Field<T, width>& below_g,
                        Field<T, width>& all_g, T* out) {
  for (int64_t k = 1; k < tree.size(); ++k) {
    const T s = tree.decay[k];
    const int64_t p = tree.parent[k];
    T sum = 0;
    for (int c = 0; c < width; ++c) {
      const T v = below_v.at(k)[c], g = below_g.at(k)[c];
      sum += g * (all_v.at(p)[c] - s * v) + v * (all_g.at(p)[c] - s * g);
    }
    out[k] += sum;
  }
}

// decay_gradient: [N] of this part.
template <typename T>
void backward_part(const Arguments& arguments, const Tensor& gradient, int64_t b, int64_t part, Tensor& values_gradient,
                   T* decay_gradient) {
  const int64_t n = arguments.pixels();
  const Tree<T> tree = arguments.tree<T>(b);
  Field<T, kChannels> below_v(n), below_g(n);
  Field<T, 1> below_one = ones<T>(n), below_norm_g(n);
  arguments.read(arguments.values, tree, b, part, below_v);
  arguments.read(gradient, tree, b, part, below_g);
  below_v.gather(tree);
  below_one.gather(tree);
  Field<T, kChannels> all_v = below_v;
  Field<T, 1> all_one = below_one;
  all_v.spread(tree);
  all_one.spread(tree);
  // y = u / z: the gradient of u is g / z, that of z is -g y / z.
  for (int64_t k = 0; k < n; ++k) {
    const T norm = *all_one.at(k);
    T sum = 0;
    for (int c = 0; c < kChannels; ++c) {
      below_g.at(k)[c] /= norm;
      sum -= below_g.at(k)[c] * all_v.at(k)[c] / norm;
    }
    *below_norm_g.at(k) = sum;
  }
  below_g.gather(tree);
  below_norm_g.gather(tree);
  Field<T, kChannels> all_g = below_g;
  Field<T, 1> all_norm_g = below_norm_g;
  all_g.spread(tree);
  all_norm_g.spread(tree);
  arguments.write(tree, b, part, all_g, values_gradient);
  add_decay_gradient(tree, below_v, all_v, below_g, all_g, decay_gradient);
  add_decay_gradient(tree, below_one, all_one, below_norm_g, all_norm_g, decay_gradient);
}

template <typename T>
Tensor forward(const Arguments& arguments) {
  Tensor out = torch::stable::empty({arguments.batch(), arguments.channels(), arguments.pixels()},
                                    arguments.values.scalar_type());
  const int64_t parts = arguments.parts();
  torch::stable::parallel_for(0, arguments.batch() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) filter_part<T>(arguments, i / parts, i % parts, out);
  });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& gradient, const Arguments& arguments) {
  const int64_t batch = arguments.batch(), n = arguments.pixels(), parts = arguments.parts();
  const ScalarType type = arguments.values.scalar_type();
  Tensor values_gradient = torch::stable::empty({batch, arguments.channels(), n}, type);
  Tensor decay_gradient = torch::stable::empty({batch, n}, type);
  std::vector<T> partial(static_cast<size_t>(batch * parts * n));
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      backward_part<T>(arguments, gradient, i / parts, i % parts, values_gradient, partial.data() + i * n);
    }
  });
  // In the order of the parts, whichever thread computed them.
  T* out = decay_gradient.mutable_data_ptr<T>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < n; ++k) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[(b * parts + part) * n + k];
      out[b * n + k] = sum;
    }
  }
  return {values_gradient, decay_gradient};
}

// values [B, C, N], decay [B, N] to the parent of each place, order and parent [B, N] of `trees` -> [B, C, N].
Tensor filtered(const Tensor& values, const Tensor& decay, const Tensor& order, const Tensor& parent) {
  const Arguments arguments{values, decay, order, parent};
  arguments.check();
  return values.scalar_type() == ScalarType::Double ? forward<double>(arguments) : forward<float>(arguments);
}

// gradient [B, C, N] -> gradients of values and decay.
std::tuple<Tensor, Tensor> filtered_backward(const Tensor& gradient, const Tensor& values, const Tensor& decay,
                                             const Tensor& order, const Tensor& parent) {
  const Arguments arguments{values, decay, order, parent};
  arguments.check();
  STD_TORCH_CHECK(gradient.dim() == 3 && gradient.size(0) == arguments.batch() &&
                      gradient.size(1) == arguments.channels() && gradient.size(2) == arguments.pixels() &&
                      gradient.scalar_type() == values.scalar_type(),
                  "gradient: expected the shape and dtype of values");
  return values.scalar_type() == ScalarType::Double ? backward<double>(gradient, arguments)
                                                    : backward<float>(gradient, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("tree_filter_trees", TORCH_BOX(&trees));
  m.impl("tree_filter", TORCH_BOX(&filtered));
  m.impl("tree_filter_backward", TORCH_BOX(&filtered_backward));
}
