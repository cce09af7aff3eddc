// transition_consistency on the CPU, forward and backward, in O(N) memory. See
// docs/kernels/transition_consistency.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "transition_consistency/transition_consistency.h"

#define CC4S_TILE_CODE "transition_consistency/transition_consistency_tiles.h"
#include "common/foreach_isa.h"

namespace {

using namespace cc4s;

template <class E>
ConsistencyInput<E, ScalarFor<E>> consistency_input(const Tensor& q, const Tensor& k, const Tensor& q_target,
                                                    const Tensor& k_target, const Valid& valid, double scale) {
  const Shape shape(q);
  return {shape.batch,
          shape.n,
          matrix<const E>(q),
          matrix<const E>(k),
          matrix<const E>(q_target),
          matrix<const E>(k_target),
          &valid,
          static_cast<ScalarFor<E>>(scale)};
}

template <class E>
void run(const ConsistencyInput<E, ScalarFor<E>>& in, const ConsistencyOutput<ScalarFor<E>>& out) {
  CC4S_FOR_CURRENT_ISA(E, consistency_forward, in, out);
}

template <class E>
void run(const ConsistencyInput<E, ScalarFor<E>>& in, const ConsistencyBackward<E, ScalarFor<E>>& out) {
  CC4S_FOR_CURRENT_ISA(E, consistency_backward, in, out);
}

// Sums over the valid positions of each image, in order.
template <class S>
void sum_rows(const Valid& valid, int64_t batch, int64_t n, const S* values, S* sums) {
  for (int64_t b = 0; b < batch; ++b) {
    const Positions at = valid[b];
    double sum = 0;
    for (int64_t i = 0; i < at.count; ++i) sum += values[b * n + at[i]];
    sums[b] = static_cast<S>(sum);
  }
}

// -> kl, trace, trace_target; lse, lse_target and the diagonal of P, which the backward pass reads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transition_consistency(
    const Tensor& q_in, const Tensor& k_in, const Tensor& q_target_in, const Tensor& k_target_in,
    const std::optional<Tensor>& mask, double scale) {
  const Shape shape(q_in);
  const ScalarType dtype = element_of(q_in.scalar_type()), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype);
  const Tensor q_target = contiguous_as(q_target_in, dtype), k_target = contiguous_as(k_target_in, dtype);
  Tensor kl = new_tensor(shape.with({shape.n}), scalar);
  Tensor lse = torch::stable::empty_like(kl), lse_target = torch::stable::empty_like(kl);
  Tensor diagonal = torch::stable::empty_like(kl), diagonal_target = torch::stable::empty_like(kl);
  Tensor trace = new_tensor(shape.leading, scalar), trace_target = torch::stable::empty_like(trace);
  const Valid valid(mask, shape.batch, shape.n);
  if (valid.masked()) {
    for (Tensor* x : {&kl, &lse, &lse_target, &diagonal}) torch::stable::zero_(*x);
  }
  with_element(dtype, [&](auto tag) {
    using E = decltype(tag);
    using S = ScalarFor<E>;
    const auto data = [](const Tensor& x) { return static_cast<S*>(x.mutable_data_ptr()); };
    if (kl.numel() > 0) {
      run<E>(consistency_input<E>(q, k, q_target, k_target, valid, scale),
             ConsistencyOutput<S>{data(kl), data(lse), data(lse_target), data(diagonal), data(diagonal_target)});
    }
    sum_rows<S>(valid, shape.batch, shape.n, data(diagonal), data(trace));
    sum_rows<S>(valid, shape.batch, shape.n, data(diagonal_target), data(trace_target));
  });
  return {kl, trace, trace_target, lse, lse_target, diagonal};
}

std::tuple<Tensor, Tensor> transition_consistency_backward(
    const std::optional<Tensor>& grad_kl_in, const std::optional<Tensor>& grad_trace_in, const Tensor& q_in,
    const Tensor& k_in, const Tensor& q_target_in, const Tensor& k_target_in, const Tensor& lse_in,
    const Tensor& lse_target_in, const Tensor& diagonal_in, const std::optional<Tensor>& mask, double scale) {
  const Shape shape(q_in);
  const ScalarType dtype = element_of(q_in.scalar_type()), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype);
  const Tensor q_target = contiguous_as(q_target_in, dtype), k_target = contiguous_as(k_target_in, dtype);
  const Tensor lse = contiguous_as(lse_in, scalar), lse_target = contiguous_as(lse_target_in, scalar);
  const Tensor diagonal = contiguous_as(diagonal_in, scalar);
  const std::optional<Tensor> grad_kl = contiguous_as(grad_kl_in, scalar);
  const std::optional<Tensor> grad_trace = contiguous_as(grad_trace_in, scalar);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
  const Valid valid(mask, shape.batch, shape.n);
  if (valid.masked()) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
  }
  if (lse.numel() > 0) {
    with_element(dtype, [&](auto tag) {
      using E = decltype(tag);
      using S = ScalarFor<E>;
      const auto data = [](const Tensor& x) { return static_cast<const S*>(x.const_data_ptr()); };
      run<E>(consistency_input<E>(q, k, q_target, k_target, valid, scale),
             ConsistencyBackward<E, S>{data(lse), data(lse_target), data(diagonal),
                                       grad_kl.has_value() ? data(*grad_kl) : nullptr,
                                       grad_trace.has_value() ? data(*grad_trace) : nullptr, matrix<E>(grad_q),
                                       matrix<E>(grad_k)});
    });
  }
  return {cast_to(grad_q, q_in.scalar_type()), cast_to(grad_k, k_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("transition_consistency", TORCH_BOX(&transition_consistency));
  m.impl("transition_consistency_backward", TORCH_BOX(&transition_consistency_backward));
}
