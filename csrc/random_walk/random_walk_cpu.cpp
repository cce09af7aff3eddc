// random_walk on the CPU, forward and backward, in O(N) memory. See docs/kernels/random_walk.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "random_walk/random_walk.h"

#define CC4S_TILE_CODE "random_walk/random_walk_tiles.h"
#include "common/foreach_isa.h"

namespace {

using namespace cc4s;

// The dtype that is computed in: steps after the first read float, since rounding in between would add up.
ScalarType compute_dtype(const Tensor& q, int64_t steps) {
  return steps == 1 ? element_of(q.scalar_type()) : scalar_of(q.scalar_type());
}

template <class E>
WalkInput<E, ScalarFor<E>> walk_input(const Tensor& q, const Tensor& k, const Valid& valid, double scale,
                                      double restart) {
  using S = ScalarFor<E>;
  const Shape shape(q);
  return {shape.batch, shape.n, matrix<const E>(q), matrix<const E>(k), &valid, static_cast<S>(scale),
          static_cast<S>(1 - restart)};
}

template <class E>
void run(const WalkInput<E, ScalarFor<E>>& in, const WalkStep<E, ScalarFor<E>>& step) {
  CC4S_FOR_CURRENT_ISA(E, walk_forward, in, step);
}

template <class E>
void run(const WalkInput<E, ScalarFor<E>>& in, const WalkBackward<E, ScalarFor<E>>& out) {
  CC4S_FOR_CURRENT_ISA(E, walk_backward, in, out);
}

// -> Y, lse and Y_1 .. Y_{steps-1} (in the dtype of the computation; empty for one step).
std::tuple<Tensor, Tensor, Tensor> random_walk(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                               const std::optional<Tensor>& mask, double scale, int64_t steps,
                                               double restart) {
  const Shape shape(v_in);
  const ScalarType dtype = compute_dtype(q_in, steps), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype), v = contiguous_as(v_in, dtype);
  Tensor y = new_tensor(shape.with({shape.n, shape.width}), dtype);
  Tensor lse = new_tensor(shape.with({shape.n}), scalar);
  std::vector<int64_t> sizes = shape.with({shape.n, shape.width});
  sizes.insert(sizes.begin(), steps - 1);
  Tensor states = new_tensor(sizes, scalar);
  const Valid valid(mask, shape.batch, shape.n);
  if (valid.masked()) {
    torch::stable::zero_(y);
    torch::stable::zero_(lse);
    torch::stable::zero_(states);
  }
  if (lse.numel() > 0) {
    with_element(dtype, [&](auto tag) {
      using E = decltype(tag);
      using S = ScalarFor<E>;
      const auto in = walk_input<E>(q, k, valid, scale, restart);
      WalkStep<E, S> step{matrix<const E>(v), matrix<const E>(v), {}, static_cast<S*>(lse.mutable_data_ptr())};
      for (int64_t i = 0; i < steps; ++i) {
        step.y = matrix<E>(y);
        if constexpr (std::is_same_v<E, S>) {
          if (i + 1 < steps) step.y.data = static_cast<E*>(states.mutable_data_ptr()) + i * v.numel();
        }
        run<E>(in, step);
        step.x = {step.y.data, step.y.n, step.y.width};
      }
    });
  }
  return {cast_to(y, v_in.scalar_type()), lse, states};
}

std::tuple<Tensor, Tensor, Tensor> random_walk_backward(const std::optional<Tensor>& grad_y_in,
                                                        const std::optional<Tensor>& grad_lse_in, const Tensor& q_in,
                                                        const Tensor& k_in, const Tensor& v_in, const Tensor& y_in,
                                                        const Tensor& lse_in, const Tensor& states_in,
                                                        const std::optional<Tensor>& mask, double scale, int64_t steps,
                                                        double restart) {
  const Shape shape(v_in);
  const ScalarType dtype = compute_dtype(q_in, steps), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype), v = contiguous_as(v_in, dtype);
  const Tensor y = contiguous_as(y_in, dtype), lse = contiguous_as(lse_in, scalar);
  const Tensor states = contiguous_as(states_in, scalar);
  const std::optional<Tensor> grad_y = contiguous_as(grad_y_in, dtype), grad_lse = contiguous_as(grad_lse_in, scalar);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
  Tensor grad_v = torch::stable::empty_like(v);
  const Valid valid(mask, shape.batch, shape.n);
  if (valid.masked()) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
  }
  if (valid.masked() || !grad_y.has_value()) torch::stable::zero_(grad_v);
  if (lse.numel() > 0) {
    with_element(dtype, [&](auto tag) {
      using E = decltype(tag);
      using S = ScalarFor<E>;
      WalkBackward<E, S> out{};
      out.states.push_back(matrix<const E>(v));
      for (int64_t i = 0; i + 1 < steps; ++i) {
        out.states.push_back(matrix<const E>(v));
        out.states.back().data = static_cast<const E*>(states.const_data_ptr()) + i * v.numel();
      }
      out.states.push_back(matrix<const E>(y));
      out.lse = static_cast<const S*>(lse.const_data_ptr());
      if (grad_y.has_value()) out.grad_y = matrix<const E>(*grad_y);
      if (grad_lse.has_value()) out.grad_lse = static_cast<const S*>(grad_lse->const_data_ptr());
      Buffer<S> carry(steps > 1 ? 2 * v.numel() : 0);
      for (int i = 0; i < 2; ++i) out.carry[i] = {carry + i * v.numel(), shape.n, shape.width};
      out.grad_q = matrix<E>(grad_q);
      out.grad_k = matrix<E>(grad_k);
      out.grad_v = matrix<E>(grad_v);
      run<E>(walk_input<E>(q, k, valid, scale, restart), out);
    });
  }
  return {cast_to(grad_q, q_in.scalar_type()), cast_to(grad_k, k_in.scalar_type()),
          cast_to(grad_v, v_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("random_walk", TORCH_BOX(&random_walk));
  m.impl("random_walk_backward", TORCH_BOX(&random_walk_backward));
}
