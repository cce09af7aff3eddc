// transition_consistency on NVIDIA GPUs: one torch op for each pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/rows_of.h"
#include "transition_consistency/transition_consistency_launch.h"

// The wgmma kernels are not compiled at run time.
#ifdef __CUDACC__
#include "transition_consistency/transition_consistency_sm90.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using transition_consistency::Problem;

template <class T>
Problem<T> problem_of(const Tensor& q, const Tensor& k, const Tensor& q_target, const Tensor& k_target,
                      const std::optional<Tensor>& mask, double scale) {
  const int64_t batch = q.size(0), n = q.size(1);
  STD_TORCH_CHECK(n < (int64_t{1} << 31) - 64 && batch * (n / transition_consistency::kTile + 1) < (int64_t{1} << 31),
                  "q: too many positions for one grid");
  STD_TORCH_CHECK(q.size(2) <= 128, "q: expected at most 128 columns");
  return {static_cast<int>(batch),
          static_cast<int>(n),
          values_of<bool>(mask, q, "mask"),
          static_cast<float>(scale / std::log(2.0)),
          rows_of<const T>(q, q, "q"),
          rows_of<const T>(k, q, "k"),
          rows_of<const T>(q_target, q, "q_target"),
          rows_of<const T>(k_target, q, "k_target")};
}

// q, k, q_target, k_target [B, N, d], mask [B, N] -> kl, P_ii, P'_ii, lse2, lse2 of the target, all [B, N] float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> divergences(const Tensor& q, const Tensor& k,
                                                               const Tensor& q_target, const Tensor& k_target,
                                                               const std::optional<Tensor>& mask, double scale) {
  const auto vector = [&] { return torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float); };
  Tensor kl = vector(), diagonal = vector(), diagonal_target = vector(), lse2 = vector(), lse2_target = vector();
  if (kl.numel() == 0) return {kl, diagonal, diagonal_target, lse2, lse2_target};
  const StreamLauncher launch(q);
  with_half_type(q, [&](auto t) {
    using T = decltype(t);
    const transition_consistency::Divergences<T> all{
        problem_of<T>(q, k, q_target, k_target, mask, scale), kl.mutable_data_ptr<float>(),
        diagonal.mutable_data_ptr<float>(), diagonal_target.mutable_data_ptr<float>(),
        lse2.mutable_data_ptr<float>(), lse2_target.mutable_data_ptr<float>()};
#ifdef __CUDACC__
    if (launch.is_sm90() && transition_consistency::sm90::can_run_divergences(all)) {
      transition_consistency::sm90::run_divergences(all, launch.stream());
      return;
    }
#endif
    transition_consistency::run_divergences(launch, all);
  });
  return {kl, diagonal, diagonal_target, lse2, lse2_target};
}

// Gradients of q and k [B, N, d]; kl_grad and trace_grad [B, N] in units of `unit` [1].
void scores(const Tensor& q, const Tensor& k, const Tensor& q_target, const Tensor& k_target,
            const std::optional<Tensor>& mask, const Tensor& lse2, const Tensor& lse2_target, const Tensor& kl_grad,
            const Tensor& trace_grad, const Tensor& unit, Tensor& q_grad, Tensor& k_grad, double scale) {
  if (q.numel() == 0) return;
  STD_TORCH_CHECK(unit.numel() == 1 && unit.scalar_type() == ScalarType::Float, "unit: expected one float32");
  const StreamLauncher launch(q);
  with_half_type(q, [&](auto t) {
    using T = decltype(t);
    const transition_consistency::Scores<T> all{problem_of<T>(q, k, q_target, k_target, mask, scale),
                                                static_cast<float>(scale),
                                                values_of<float>(lse2, q, "lse2"),
                                                values_of<float>(lse2_target, q, "lse2_target"),
                                                values_of<float>(kl_grad, q, "kl_grad"),
                                                values_of<float>(trace_grad, q, "trace_grad"),
                                                unit.const_data_ptr<float>(),
                                                rows_of<T>(q_grad, q, "q_grad"),
                                                rows_of<T>(k_grad, q, "k_grad")};
#ifdef __CUDACC__
    if (launch.is_sm90() && transition_consistency::sm90::can_run_scores(all)) {
      transition_consistency::sm90::run_scores(all, launch.stream());
      return;
    }
#endif
    transition_consistency::run_scores(launch, all);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) {
  m.impl("transition_consistency_cuda_divergences", TORCH_BOX(&divergences));
  m.impl("transition_consistency_cuda_scores", TORCH_BOX(&scores));
}
