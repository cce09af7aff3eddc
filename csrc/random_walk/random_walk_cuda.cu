// random_walk on NVIDIA GPUs: one torch op for each kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>

#include "common/cuda_launch.h"
#include "common/rows_of.h"
#include "random_walk/random_walk_launch.h"

// The wgmma kernels are not compiled at run time.
#ifdef __CUDACC__
#include "random_walk/random_walk_sm90.h"
#endif

namespace {

using random_walk::Problem;
using torch::stable::Tensor;

// q [B, n, width], mask [B, n].
Problem problem_of(const Tensor& q, const std::optional<Tensor>& mask, double scale, double keep, double restart) {
  const int64_t batch = q.size(0), n = q.size(1);
  // Blocks have at least four positions, or 128 and an eighth of the columns.
  STD_TORCH_CHECK(n < (int64_t{1} << 31) - 128 && batch * (n / 4 + 8) < (int64_t{1} << 31),
                  "q: too many positions for one grid");
  return {static_cast<int>(batch), static_cast<int>(n), values_of<bool>(mask, q, "mask"),
          static_cast<float>(scale / std::log(2.0)), static_cast<float>(keep), static_cast<float>(restart)};
}

bool is_empty(const Tensor& x) { return x.numel() == 0; }

void step(const Tensor& q, const Tensor& k, const Tensor& x, const Tensor& start, const std::optional<Tensor>& mask,
          Tensor& y, Tensor& lse2, double scale, double keep, double restart, bool transposed) {
  if (is_empty(y)) return;
  const Problem problem = problem_of(q, mask, scale, keep, restart);
  STD_TORCH_CHECK(q.size(2) <= 128, "q: expected at most 128 columns");
  const StreamLauncher launch(q);
  with_half_type(q, [&](auto t) {
    using T = decltype(t);
    const random_walk::Step<T> all{problem,
                                   rows_of<const T>(q, q, "q"),
                                   rows_of<const T>(k, q, "k"),
                                   rows_of<const T>(x, q, "x"),
                                   rows_of<const T>(start, x, "start"),
                                   rows_of<T>(y, x, "y"),
                                   values_of<float>(lse2, q, "lse2")};
#ifdef __CUDACC__
    if (launch.is_sm90() && !transposed && random_walk::sm90::can_run_step(all)) {
      random_walk::sm90::run_step(all, launch.stream());
      return;
    }
    if (launch.is_sm90() && transposed && random_walk::sm90::can_run_transposed(all)) {
      random_walk::sm90::run_transposed(all, launch.stream());
      return;
    }
#endif
    random_walk::run_step(launch, all, transposed);
  });
}

void level(const Tensor& g, const Tensor& y, const Tensor& start, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& lse_grad, Tensor& level, double restart) {
  if (is_empty(g)) return;
  const Problem problem = problem_of(g, mask, 1.0, 1.0 - restart, restart);
  const StreamLauncher launch(g);
  with_half_type(g, [&](auto t) {
    using T = decltype(t);
    const random_walk::Level<T> all{problem,
                                    rows_of<const T>(g, g, "g"),
                                    rows_of<const T>(y, g, "y"),
                                    rows_of<const T>(start, g, "start"),
                                    values_of<float>(lse_grad, g, "lse_grad"),
                                    values_of<float>(level, g, "level")};
    random_walk::run_level(launch, all);
  });
}

void scores(const Tensor& q, const Tensor& k, const Tensor& g, const Tensor& x, const std::optional<Tensor>& mask,
            const Tensor& lse2, const Tensor& level, Tensor& q_grad, Tensor& k_grad, double scale, double keep) {
  if (is_empty(q)) return;
  const Problem problem = problem_of(q, mask, scale, keep, 1.0 - keep);
  STD_TORCH_CHECK(q.size(2) <= 128, "q: expected at most 128 columns");
  const StreamLauncher launch(q);
  with_half_type(q, [&](auto t) {
    using T = decltype(t);
    // Sums of several steps are float32.
    const bool sums = q_grad.scalar_type() != q.scalar_type();
    const random_walk::Scores<T> all{problem,
                                     static_cast<float>(scale),
                                     rows_of<const T>(q, q, "q"),
                                     rows_of<const T>(k, q, "k"),
                                     rows_of<const T>(g, q, "g"),
                                     rows_of<const T>(x, g, "x"),
                                     values_of<float>(lse2, q, "lse2"),
                                     values_of<float>(level, q, "level"),
                                     sums ? Rows<T>{} : rows_of<T>(q_grad, q, "q_grad"),
                                     sums ? Rows<T>{} : rows_of<T>(k_grad, q, "k_grad"),
                                     sums ? rows_of<float>(q_grad, q, "q_grad") : Rows<float>{},
                                     sums ? rows_of<float>(k_grad, q, "k_grad") : Rows<float>{}};
#ifdef __CUDACC__
    if (launch.is_sm90() && random_walk::sm90::can_run_scores(all)) {
      random_walk::sm90::run_scores(all, launch.stream());
      return;
    }
#endif
    random_walk::run_scores(launch, all);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CUDA, m) {
  m.impl("random_walk_cuda_step", TORCH_BOX(&step));
  m.impl("random_walk_cuda_level", TORCH_BOX(&level));
  m.impl("random_walk_cuda_scores", TORCH_BOX(&scores));
}
