// Gated CRF energies and their gradient; docs/kernels/gated_crf.md has the schedule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/instruction_sets.h"
#include "common/strides_of.h"
#include "gated_crf/problem.h"

namespace {

using namespace cc4s;
using namespace cc4s::gated_crf;
using torch::stable::Tensor;

#define CC4S_VECTOR_CODE "gated_crf/kernels.inl"
#include "common/foreach_instruction_set.h"

// Each task is worked on by one thread.
template <typename T>
void run_all(Problem<T>& problem) {
  const InstructionSet set = instruction_set();
  torch::stable::parallel_for(0, problem.tasks(), 1, [&](int64_t begin, int64_t end) {
    switch (set) {
#if CC4S_X86
      case InstructionSet::kAvx512:
        return avx512::run_tasks(problem, begin, end);
      case InstructionSet::kAvx2:
        return avx2::run_tasks(problem, begin, end);
#endif
      default:
        return portable::run_tasks(problem, begin, end);
    }
  });
}

// What both passes are called with.
struct Arguments {
  const Tensor &prob, &color;
  const std::optional<Tensor>&source, &destination;
  int64_t radius;
  double sigma_xy;

  void check() const {
    STD_TORCH_CHECK(prob.dim() == 4 && is_floating(prob), "prob: expected (B, C, H, W), float64, 32, 16 or bfloat16");
    STD_TORCH_CHECK(color.dim() == 4 && is_floating(color) && color.size(0) == prob.size(0) &&
                        color.size(2) == prob.size(2) && color.size(3) == prob.size(3),
                    "color: expected floating (B, channels, H, W) of prob");
    for (const std::optional<Tensor>* gate : {&source, &destination}) {
      if (!gate->has_value()) continue;
      const Tensor& map = **gate;
      STD_TORCH_CHECK(map.dim() == 3 && map.scalar_type() == ScalarType::Bool && map.size(0) == prob.size(0) &&
                          map.size(1) == prob.size(2) && map.size(2) == prob.size(3),
                      "source, destination: expected bool (B, H, W) of prob");
    }
    STD_TORCH_CHECK(radius >= 1 && radius <= 1024, "radius: expected 1 to 1024");
    STD_TORCH_CHECK(sigma_xy > 0, "sigma_xy: expected more than 0");
  }

  static Gate gate_of(const std::optional<Tensor>& map) {
    if (!map.has_value()) return {};
    return {map->const_data_ptr<bool>(), strides_of(*map)};
  }

  template <typename T>
  Problem<T> problem() const {
    Problem<T> problem{};
    problem.batch = prob.size(0);
    problem.classes = prob.size(1);
    problem.channels = color.size(1);
    problem.height = prob.size(2);
    problem.width = prob.size(3);
    problem.radius = radius;
    problem.falloff = static_cast<T>(0.5 / (sigma_xy * sigma_xy));
    problem.prob = array_of(prob);
    problem.color = array_of(color);
    problem.source = gate_of(source);
    problem.destination = gate_of(destination);
    if (problem.width > 0) problem.strips = strips_of(problem.height);
    return problem;
  }
};

template <typename T>
Tensor forward(const Arguments& arguments) {
  Problem<T> problem = arguments.problem<T>();
  Tensor sums = torch::stable::empty({problem.batch}, scalar_type<T>());
  const int64_t strips = static_cast<int64_t>(problem.strips.size());
  problem.sums.assign(static_cast<size_t>(problem.tasks()), 0.0);
  run_all(problem);
  for (int64_t b = 0; b < problem.batch; ++b) {
    double sum = 0;
    // In the order of the strips, whichever thread computed them.
    for (int64_t i = 0; i < strips; ++i) sum += problem.sums[b * strips + i];
    sums.mutable_data_ptr<T>()[b] = static_cast<T>(sum);
  }
  return sums;
}

template <typename T>
Tensor backward(const Tensor& gradient, const Arguments& arguments) {
  Problem<T> problem = arguments.problem<T>();
  STD_TORCH_CHECK(gradient.dim() == 1 && gradient.size(0) == problem.batch && gradient.scalar_type() == scalar_type<T>(),
                  "gradient: expected (B,) in the dtype of the sums");
  const Tensor& prob = arguments.prob;
  Tensor out = torch::stable::empty({prob.size(0), prob.size(1), prob.size(2), prob.size(3)}, prob.scalar_type());
  problem.factors.resize(static_cast<size_t>(problem.batch));
  for (int64_t b = 0; b < problem.batch; ++b) {
    problem.factors[b] = gradient.const_data_ptr<T>()[b * gradient.stride(0)];
  }
  problem.gradient = out.mutable_data_ptr();
  run_all(problem);
  return out;
}

// prob [B, C, H, W], color [B, channels, H, W] divided by sigma_rgb, gates [B, H, W] -> for each image the sum over
// pairs of K (1 - p.q) (d_i s_j + d_j s_i).
Tensor pair_sums(const Tensor& prob, const Tensor& color, const std::optional<Tensor>& source,
                 const std::optional<Tensor>& destination, int64_t radius, double sigma_xy) {
  const Arguments arguments{prob, color, source, destination, radius, sigma_xy};
  arguments.check();
  return prob.scalar_type() == ScalarType::Double ? forward<double>(arguments) : forward<float>(arguments);
}

// gradient [B] of the sums -> gradient of prob.
Tensor pair_sums_backward(const Tensor& gradient, const Tensor& prob, const Tensor& color,
                          const std::optional<Tensor>& source, const std::optional<Tensor>& destination,
                          int64_t radius, double sigma_xy) {
  const Arguments arguments{prob, color, source, destination, radius, sigma_xy};
  arguments.check();
  return prob.scalar_type() == ScalarType::Double ? backward<double>(gradient, arguments)
                                                  : backward<float>(gradient, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("gated_crf", TORCH_BOX(&pair_sums));
  m.impl("gated_crf_backward", TORCH_BOX(&pair_sums_backward));
}
