// Random walks from pixels to seeds, and the gradient of their weights; docs/kernels/random_walker.md has the method.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/instruction_sets.h"
#include "random_walker/problem.h"

namespace {

using namespace cc4s::random_walker;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if CC4S_X86
CC4S_PUSH_AVX2
namespace avx2 {
#include "random_walker/solve.inl"
}  // namespace avx2
CC4S_POP
#endif

namespace portable {
#include "random_walker/solve.inl"
}  // namespace portable

bool solve(const System& system, int lanes, const double* b, double* x) {
#if CC4S_X86
  if (cc4s::instruction_set() != cc4s::InstructionSet::kPortable) return avx2::solve_lanes(system, lanes, b, x);
#endif
  return portable::solve_lanes(system, lanes, b, x);
}

View view_of(const Tensor& t) {
  const bool planar = t.dim() == 4;
  return {t.stride(0), planar ? t.stride(1) : 0, t.stride(planar ? 2 : 1), t.stride(planar ? 3 : 2)};
}

// What both passes are called with: weight [B, 2, H, W] float64, seeds [B, H, W] int64, -1 = none.
struct Arguments {
  const Tensor &weight, &seeds;
  int64_t classes;

  void check() const {
    STD_TORCH_CHECK(seeds.dim() == 3 && seeds.scalar_type() == ScalarType::Long, "seeds: expected int64 (B, H, W)");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Double && weight.size(0) == seeds.size(0) &&
                        weight.size(1) == 2 && weight.size(2) == seeds.size(1) && weight.size(3) == seeds.size(2),
                    "weight: expected float64 (B, 2, H, W)");
  }
  int64_t batch() const { return seeds.size(0); }
  int64_t height() const { return seeds.size(1); }
  int64_t width() const { return seeds.size(2); }
};

// One image: its system, its seeds, and the classes that it has.
class Image {
 public:
  Image(const Arguments& arguments, int64_t b)
      : classes_(arguments.classes),
        system_(arguments.height(), arguments.width()),
        all_right_(system_.size, 0.0),
        all_down_(system_.size, 0.0),
        seed_(system_.size, -1),
        reached_(system_.size, 0) {
    read(arguments, b);
    flood();
    couple();
    system_.factorize();
  }

  // Writes prob [C, H, W], contiguous; false where the solver does not converge.
  bool forward(double* prob) {
    const int64_t pixels = system_.height * system_.width;
    std::fill(prob, prob + classes_ * pixels, 0.0);
    if (present_.empty()) return true;
    // The class that is left out has what the others leave: one system less.
    double* rest = prob + present_.back() * pixels;
    each_pixel([&](int64_t i, int64_t n) { rest[n] = reached_[i] ? 1.0 : 0.0; });
    const bool converged = each_group([&](int lanes, const int64_t* group, int used, std::vector<double>& b) {
      each_pixel([&](int64_t i, int64_t) {
        if (!system_.free[i]) return;
        const auto add = [&](int64_t j, double w) {
          for (int l = 0; l < used; ++l) {
            if (seed_[j] == group[l]) b[i * lanes + l] += w;
          }
        };
        add(i + 1, all_right_[i]);
        add(i - 1, all_right_[i - 1]);
        add(i + system_.stride, all_down_[i]);
        add(i - system_.stride, all_down_[i - system_.stride]);
      });
    }, [&](int lanes, const int64_t* group, int used, const std::vector<double>& x) {
      each_pixel([&](int64_t i, int64_t n) {
        for (int l = 0; l < used; ++l) {
          const double value = seed_[i] == group[l] ? 1.0 : std::clamp(x[i * lanes + l], 0.0, 1.0);
          prob[group[l] * pixels + n] = value;
          rest[n] -= value;
        }
      });
    });
    // Rounding, or a residual, may leave a little less than nothing.
    each_pixel([&](int64_t, int64_t n) { rest[n] = std::clamp(rest[n], 0.0, 1.0); });
    return converged;
  }

  // gradient and prob [C, H, W] with strides -> out [2, H, W], contiguous: -(a_i - a_j) (x_i - x_j), a the adjoint.
  bool backward(const double* gradient, View g, const double* prob, View v, double* out) {
    const int64_t pixels = system_.height * system_.width;
    std::fill(out, out + 2 * pixels, 0.0);
    if (present_.size() < 2) return true;
    const int64_t rest = present_.back();
    const auto value = [](const double* data, View view, int64_t c, int64_t y, int64_t x) {
      return data[c * view.channel + y * view.row + x * view.column];
    };
    return each_group([&](int lanes, const int64_t* group, int used, std::vector<double>& b) {
      each_pixel([&](int64_t i, int64_t n) {
        if (!system_.free[i]) return;
        const int64_t y = n / system_.width, x = n % system_.width;
        for (int l = 0; l < used; ++l) {
          b[i * lanes + l] = value(gradient, g, group[l], y, x) - value(gradient, g, rest, y, x);
        }
      });
    }, [&](int lanes, const int64_t* group, int used, const std::vector<double>& adjoint) {
      each_pixel([&](int64_t i, int64_t n) {
        const int64_t y = n / system_.width, x = n % system_.width;
        const auto pair = [&](int64_t j, int64_t v_y, int64_t v_x) {
          double sum = 0;
          for (int l = 0; l < used; ++l) {
            sum += (adjoint[i * lanes + l] - adjoint[j * lanes + l]) *
                   (value(prob, v, group[l], y, x) - value(prob, v, group[l], v_y, v_x));
          }
          return sum;
        };
        if (x + 1 < system_.width) out[n] -= pair(i + 1, y, x + 1);
        if (y + 1 < system_.height) out[pixels + n] -= pair(i + system_.stride, y + 1, x);
      });
    });
  }

 private:
  // Calls function(index in the frame, index in the image) for every pixel.
  template <typename F>
  void each_pixel(F function) const {
    for (int64_t y = 0, n = 0; y < system_.height; ++y) {
      for (int64_t x = 0; x < system_.width; ++x, ++n) function(system_.at(y, x), n);
    }
  }

  // Solves for all classes but the last, up to four at a time: set(lanes, classes, used, b), then get(..., x).
  template <typename Set, typename Get>
  bool each_group(Set set, Get get) {
    bool converged = true;
    const int64_t solved = static_cast<int64_t>(present_.size()) - 1;
    for (int64_t first = 0; first < solved; first += 4) {
      const int used = static_cast<int>(std::min<int64_t>(4, solved - first));
      const int lanes = used == 3 ? 4 : used;
      std::vector<double> b(system_.size * lanes, 0.0), x(system_.size * lanes);
      set(lanes, present_.data() + first, used, b);
      converged = solve(system_, lanes, b.data(), x.data()) && converged;
      get(lanes, present_.data() + first, used, x);
    }
    return converged;
  }

  void read(const Arguments& arguments, int64_t b) {
    const View w = view_of(arguments.weight), s = view_of(arguments.seeds);
    const double* weight = arguments.weight.const_data_ptr<double>() + b * w.batch;
    const int64_t* seeds = arguments.seeds.const_data_ptr<int64_t>() + b * s.batch;
    std::vector<uint8_t> there(classes_, 0);
    each_pixel([&](int64_t i, int64_t n) {
      const int64_t y = n / system_.width, x = n % system_.width, place = y * w.row + x * w.column;
      if (x + 1 < system_.width) all_right_[i] = weight[place];
      if (y + 1 < system_.height) all_down_[i] = weight[w.channel + place];
      const int64_t seed = seeds[y * s.row + x * s.column];
      if (seed < 0 || seed >= classes_) return;
      seed_[i] = seed;
      there[seed] = 1;
    });
    for (int64_t c = 0; c < classes_; ++c) {
      if (there[c]) present_.push_back(c);
    }
  }

  // Marks what positive weights join to a seed.
  void flood() {
    std::vector<int64_t> open;
    const auto visit = [&](int64_t i) {
      if (reached_[i]) return;
      reached_[i] = 1;
      open.push_back(i);
    };
    each_pixel([&](int64_t i, int64_t) {
      if (seed_[i] >= 0) visit(i);
    });
    while (!open.empty()) {
      const int64_t i = open.back();
      open.pop_back();
      if (all_right_[i] > 0) visit(i + 1);
      if (all_right_[i - 1] > 0) visit(i - 1);
      if (all_down_[i] > 0) visit(i + system_.stride);
      if (all_down_[i - system_.stride] > 0) visit(i - system_.stride);
    }
  }

  void couple() {
    System& s = system_;
    each_pixel([&](int64_t i, int64_t) { s.free[i] = reached_[i] && seed_[i] < 0; });
    each_pixel([&](int64_t i, int64_t) {
      if (!s.free[i]) return;
      s.diagonal[i] = all_right_[i] + all_right_[i - 1] + all_down_[i] + all_down_[i - s.stride];
      if (s.free[i + 1]) s.right[i] = all_right_[i];
      if (s.free[i + s.stride]) s.down[i] = all_down_[i];
    });
  }

  const int64_t classes_;
  System system_;
  std::vector<double> all_right_, all_down_;  // of all pairs, in the frame of the system
  std::vector<int64_t> seed_;
  std::vector<uint8_t> reached_;
  std::vector<int64_t> present_;  // classes with a seed, ascending
};

// Each image is worked on by one thread: results are the same for every number of them.
template <typename F>
void each_image(int64_t batch, F function) {
  std::vector<uint8_t> converged(batch, 1);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) converged[b] = function(b);
  });
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(converged[b], "random_walker: no convergence in ", kMaxIterations,
                    " steps; a smaller beta makes it easier");
  }
}

Tensor random_walker(const Tensor& weight, const Tensor& seeds, int64_t num_classes) {
  const Arguments arguments{weight, seeds, num_classes};
  arguments.check();
  const int64_t pixels = arguments.height() * arguments.width();
  Tensor prob = torch::stable::empty({arguments.batch(), num_classes, arguments.height(), arguments.width()},
                                     ScalarType::Double);
  if (prob.numel() == 0) return prob;
  double* to = prob.mutable_data_ptr<double>();
  each_image(arguments.batch(),
             [&](int64_t b) { return Image(arguments, b).forward(to + b * num_classes * pixels); });
  return prob;
}

Tensor random_walker_backward(const Tensor& gradient, const Tensor& prob, const Tensor& weight, const Tensor& seeds) {
  const Arguments arguments{weight, seeds, prob.size(1)};
  arguments.check();
  for (const Tensor* t : {&gradient, &prob}) {
    STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == ScalarType::Double && t->size(0) == arguments.batch() &&
                        t->size(1) == arguments.classes && t->size(2) == arguments.height() &&
                        t->size(3) == arguments.width(),
                    "gradient, prob: expected float64 (B, C, H, W)");
  }
  Tensor out = torch::stable::empty({arguments.batch(), 2, arguments.height(), arguments.width()}, ScalarType::Double);
  if (out.numel() == 0) return out;
  const int64_t pixels = arguments.height() * arguments.width();
  const View g = view_of(gradient), v = view_of(prob);
  const double *from = gradient.const_data_ptr<double>(), *values = prob.const_data_ptr<double>();
  double* to = out.mutable_data_ptr<double>();
  each_image(arguments.batch(), [&](int64_t b) {
    return Image(arguments, b).backward(from + b * g.batch, g, values + b * v.batch, v, to + b * 2 * pixels);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("random_walker", TORCH_BOX(&random_walker));
  m.impl("random_walker_backward", TORCH_BOX(&random_walker_backward));
}
