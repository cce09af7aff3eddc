// Potts energies on superpixel graphs and pixel grids, and their gradients; docs/kernels/potts.md has the schedule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/instruction_sets.h"
#include "potts/problem.h"

namespace {

using namespace cc4s;
using namespace cc4s::potts;
using torch::stable::Tensor;

#define CC4S_VECTOR_CODE "potts/kernels.inl"
#include "common/foreach_instruction_set.h"

// Each task is worked on by one thread.
template <typename Problem>
void run_all(Problem& problem, int64_t tasks) {
  const cc4s::InstructionSet set = cc4s::instruction_set();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    switch (set) {
#if CC4S_X86
      case cc4s::InstructionSet::kAvx512:
        return avx512::run_tasks(problem, begin, end);
      case cc4s::InstructionSet::kAvx2:
        return avx2::run_tasks(problem, begin, end);
#endif
      default:
        return portable::run_tasks(problem, begin, end);
    }
  });
}

Relaxation relaxation_of(const std::string& name) {
  const char* const names[] = {"bilinear",
                               "quadratic",
                               "normalized_quadratic",
                               "collision_cross_entropy",
                               "collision_divergence",
                               "log_quadratic"};
  for (int i = 0; i < 6; ++i) {
    if (name == names[i]) return static_cast<Relaxation>(i);
  }
  STD_TORCH_CHECK(false, "relaxation: got '", name, "'");
}

Norm norm_of(const std::string& name) {
  STD_TORCH_CHECK(name == "sum" || name == "frobenius" || name == "none", "norm: got '", name, "'");
  return name == "sum" ? Norm::kSum : name == "frobenius" ? Norm::kFrobenius : Norm::kNone;
}

// What both passes are called with.
struct Arguments {
  const Tensor &prob, &weight;
  const std::optional<Tensor>& edge_index;  // [B, 2, E] on a graph; none on a grid
  Relaxation relaxation;
  Norm norm;

  void check() const {
    const auto fits = [&](const Tensor& t) { return t.size(0) == prob.size(0); };
    STD_TORCH_CHECK(is_floating(prob) && is_floating(weight), "prob, weight: expected float64, 32, 16 or bfloat16");
    if (edge_index.has_value()) {
      STD_TORCH_CHECK(prob.dim() == 3, "prob: expected (B, K, C)");
      STD_TORCH_CHECK(weight.dim() == 2 && fits(weight), "weight: expected (B, E)");
      STD_TORCH_CHECK(edge_index->dim() == 3 && fits(*edge_index) && edge_index->size(1) == 2 &&
                          edge_index->size(2) == weight.size(1) && edge_index->scalar_type() == ScalarType::Long,
                      "edge_index: expected int64 (B, 2, E)");
      check_nodes();
    } else {
      STD_TORCH_CHECK(prob.dim() == 4, "prob: expected (B, C, H, W)");
      STD_TORCH_CHECK(weight.dim() == 4 && (weight.size(0) == 1 || fits(weight)) &&
                          (weight.size(1) == 2 || weight.size(1) == 4) && weight.size(2) == prob.size(2) &&
                          weight.size(3) == prob.size(3),
                      "weight: expected (B or 1, 2 or 4, H, W)");
    }
  }

  // Without this, an edge could lead out of memory.
  void check_nodes() const {
    const int64_t* ends = edge_index->const_data_ptr<int64_t>();
    const int64_t nodes = prob.size(1);
    for (int64_t b = 0; b < edge_index->size(0); ++b) {
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t* line = ends + b * edge_index->stride(0) + side * edge_index->stride(1);
        for (int64_t e = 0; e < edge_index->size(2); ++e) {
          const int64_t node = line[e * edge_index->stride(2)];
          STD_TORCH_CHECK(node >= 0 && node < nodes, "edge_index: got node ", node, ", expected 0 to ", nodes - 1);
        }
      }
    }
  }

  template <typename T>
  GridProblem<T> grid() const {
    GridProblem<T> problem{};
    problem.relaxation = relaxation;
    problem.batch = prob.size(0);
    problem.classes = prob.size(1);
    problem.height = prob.size(2);
    problem.width = prob.size(3);
    problem.directions = weight.size(1);
    problem.weight_batch = weight.size(0);
    problem.prob = array_of(prob);
    problem.weight = array_of(weight);
    if (problem.width > 0) problem.strips = strips_of(problem.height);
    return problem;
  }

  template <typename T>
  GraphProblem<T> graph() const {
    GraphProblem<T> problem{};
    problem.relaxation = relaxation;
    problem.batch = prob.size(0);
    problem.nodes = prob.size(1);
    problem.classes = prob.size(2);
    problem.edges = weight.size(1);
    problem.prob = array_of(prob);
    problem.weight = array_of(weight);
    problem.ends = edge_index->const_data_ptr<int64_t>();
    for (int i = 0; i < 3; ++i) problem.end_strides[i] = edge_index->stride(i);
    return problem;
  }

  // Sums of each image.
  template <typename T>
  std::vector<Sums> sums() const {
    if (edge_index.has_value()) {
      GraphProblem<T> problem = graph<T>();
      problem.sums.resize(static_cast<size_t>(problem.batch));
      run_all(problem, problem.batch);
      return problem.sums;
    }
    GridProblem<T> problem = grid<T>();
    const size_t strips = problem.strips.size();
    problem.sums.resize(static_cast<size_t>(problem.tasks()));
    run_all(problem, problem.tasks());
    std::vector<Sums> images(static_cast<size_t>(problem.batch));
    // In the order of the strips, whichever thread computed them.
    for (size_t i = 0; i < problem.sums.size(); ++i) images[i / strips].add(problem.sums[i]);
    return images;
  }

  template <typename T>
  void gradients(std::vector<Factors<T>> factors, void* prob_gradient, void* weight_gradient) const {
    const auto run = [&](auto problem, auto tasks) {
      problem.factors = std::move(factors);
      problem.prob_gradient = prob_gradient;
      problem.weight_gradient = weight_gradient;
      run_all(problem, tasks(problem));
    };
    if (edge_index.has_value()) {
      run(graph<T>(), [](const auto& problem) { return problem.batch; });
    } else {
      run(grid<T>(), [](const auto& problem) { return problem.tasks(); });
    }
  }
};

// The energies [B], and the norms [B] that they were divided by, 0 where there was no weight.
template <typename T>
std::tuple<Tensor, Tensor> forward(const Arguments& arguments) {
  const int64_t batch = arguments.prob.size(0);
  Tensor energy = torch::stable::empty({batch}, scalar_type<T>());
  Tensor scale = torch::stable::empty({batch}, scalar_type<T>());
  if (batch == 0) return {energy, scale};
  const std::vector<Sums> sums = arguments.sums<T>();
  for (int64_t b = 0; b < batch; ++b) {
    // Over ordered pairs: twice the sums over pairs.
    const double norm = arguments.norm == Norm::kSum         ? 2 * sums[b].weight
                        : arguments.norm == Norm::kFrobenius ? std::sqrt(2 * sums[b].square)
                                                             : 1.0;
    // NaN weights stay NaN.
    energy.mutable_data_ptr<T>()[b] = static_cast<T>(4 * sums[b].energy / (norm == 0 ? 1.0 : norm));
    scale.mutable_data_ptr<T>()[b] = static_cast<T>(norm);
  }
  return {energy, scale};
}

template <typename T>
std::vector<Factors<T>> factors_of(const Tensor& gradient, const Tensor& energy, const Tensor& scale, Norm norm) {
  std::vector<Factors<T>> factors(static_cast<size_t>(gradient.size(0)));
  for (size_t b = 0; b < factors.size(); ++b) {
    const auto at = [&](const Tensor& line) {
      return static_cast<double>(line.const_data_ptr<T>()[static_cast<int64_t>(b) * line.stride(0)]);
    };
    const double s = at(scale), divisor = s == 0 ? 1.0 : s;
    factors[b].slope = static_cast<T>(4 * at(gradient) / divisor);
    if (s == 0) continue;
    // d norm / d w = 2, or 2 w / norm.
    const double shift = 2 * at(gradient) * at(energy) / s;
    if (norm == Norm::kSum) factors[b].shift = static_cast<T>(shift);
    if (norm == Norm::kFrobenius) factors[b].shift_by_weight = static_cast<T>(shift / s);
  }
  return factors;
}

Tensor empty_as(const Tensor& like, bool needed) {
  std::vector<int64_t> shape{0};
  if (needed) {
    shape.clear();
    for (int64_t i = 0; i < like.dim(); ++i) shape.push_back(like.size(i));
  }
  return torch::stable::empty(shape, like.scalar_type());
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& gradient, const Tensor& energy, const Tensor& scale,
                                    const Arguments& arguments, bool prob_needed, bool weight_needed) {
  const int64_t batch = arguments.prob.size(0);
  for (const Tensor* line : {&gradient, &energy, &scale}) {
    STD_TORCH_CHECK(line->dim() == 1 && line->size(0) == batch && line->scalar_type() == scalar_type<T>(),
                    "gradient, energy, scale: expected (B,) in the dtype of the energy");
  }
  Tensor prob_gradient = empty_as(arguments.prob, prob_needed);
  Tensor weight_gradient = empty_as(arguments.weight, weight_needed);
  if (batch == 0) return {prob_gradient, torch::stable::zero_(weight_gradient)};
  arguments.gradients<T>(factors_of<T>(gradient, energy, scale, arguments.norm),
                         prob_needed ? prob_gradient.mutable_data_ptr() : nullptr,
                         weight_needed ? weight_gradient.mutable_data_ptr() : nullptr);
  return {prob_gradient, weight_gradient};
}

// prob [B, K, C] with weight [B, E] and edge_index [B, 2, E] int64, or prob [B, C, H, W] with weight [B or 1, D, H, W].
std::tuple<Tensor, Tensor> energies(const Tensor& prob, const Tensor& weight, const std::optional<Tensor>& edge_index,
                                    const std::string& relaxation, const std::string& norm) {
  const Arguments arguments{prob, weight, edge_index, relaxation_of(relaxation), norm_of(norm)};
  arguments.check();
  return prob.scalar_type() == ScalarType::Double ? forward<double>(arguments) : forward<float>(arguments);
}

// gradient [B] of the energy -> gradients of prob and weight, empty where they are not needed.
std::tuple<Tensor, Tensor> energies_backward(const Tensor& gradient, const Tensor& energy, const Tensor& scale,
                                             const Tensor& prob, const Tensor& weight,
                                             const std::optional<Tensor>& edge_index, const std::string& relaxation,
                                             const std::string& norm, bool prob_needed, bool weight_needed) {
  const Arguments arguments{prob, weight, edge_index, relaxation_of(relaxation), norm_of(norm)};
  arguments.check();
  return prob.scalar_type() == ScalarType::Double
             ? backward<double>(gradient, energy, scale, arguments, prob_needed, weight_needed)
             : backward<float>(gradient, energy, scale, arguments, prob_needed, weight_needed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("potts", TORCH_BOX(&energies));
  m.impl("potts_backward", TORCH_BOX(&energies_backward));
}
