// transition_matrix on the CPU, forward and backward. See docs/kernels/transition_matrix.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "transition_matrix/transition_matrix.h"

#define CC4S_TILE_CODE "transition_matrix/transition_matrix_tiles.h"
#include "common/foreach_isa.h"

namespace {

using namespace cc4s;

template <class E>
MatrixInput<E, ScalarFor<E>> matrix_input(const Tensor& q, const Tensor& k, const Valid& valid, double scale,
                                          Normalize normalize) {
  const Shape shape(q);
  return {shape.batch,
          shape.n,
          matrix<const E>(q),
          matrix<const E>(k),
          &valid,
          static_cast<ScalarFor<E>>(scale),
          normalize};
}

template <class E>
void run(const MatrixInput<E, ScalarFor<E>>& in, const MatrixOutput<E, ScalarFor<E>>& out) {
  CC4S_FOR_CURRENT_ISA(E, matrix_forward, in, out);
}

template <class E>
void run(const MatrixInput<E, ScalarFor<E>>& in, const MatrixBackward<E, ScalarFor<E>>& out) {
  CC4S_FOR_CURRENT_ISA(E, matrix_backward, in, out);
}

// normalize: 0 row, 1 column, 2 symmetric. -> matrix and the normaliser of its rows (columns).
std::tuple<Tensor, Tensor> transition_matrix(const Tensor& q_in, const Tensor& k_in, double scale, int64_t normalize) {
  const Shape shape(q_in);
  const ScalarType dtype = element_of(q_in.scalar_type()), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype);
  Tensor result = new_tensor(shape.with({shape.n, shape.n}), dtype);
  Tensor lse = new_tensor(shape.with({shape.n}), scalar);
  const Valid valid(std::nullopt, shape.batch, shape.n);
  if (lse.numel() > 0) {
    with_element(dtype, [&](auto tag) {
      using E = decltype(tag);
      run<E>(matrix_input<E>(q, k, valid, scale, static_cast<Normalize>(normalize)),
             MatrixOutput<E, ScalarFor<E>>{static_cast<E*>(result.mutable_data_ptr()),
                                           static_cast<ScalarFor<E>*>(lse.mutable_data_ptr())});
    });
  }
  return {cast_to(result, q_in.scalar_type()), lse};
}

std::tuple<Tensor, Tensor> transition_matrix_backward(const Tensor& grad_in, const Tensor& q_in, const Tensor& k_in,
                                                      const Tensor& lse_in, double scale, int64_t normalize) {
  const Shape shape(q_in);
  const ScalarType dtype = element_of(q_in.scalar_type()), scalar = scalar_of(dtype);
  const Tensor q = contiguous_as(q_in, dtype), k = contiguous_as(k_in, dtype);
  const Tensor grad = contiguous_as(grad_in, dtype), lse = contiguous_as(lse_in, scalar);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
  const Valid valid(std::nullopt, shape.batch, shape.n);
  if (lse.numel() > 0) {
    with_element(dtype, [&](auto tag) {
      using E = decltype(tag);
      using S = ScalarFor<E>;
      const bool swap = static_cast<Normalize>(normalize) == Normalize::column;
      const MatrixBackward<E, S> out{static_cast<const E*>(grad.const_data_ptr()), swap,
                                     static_cast<const S*>(lse.const_data_ptr()), matrix<E>(swap ? grad_k : grad_q),
                                     matrix<E>(swap ? grad_q : grad_k)};
      run<E>(matrix_input<E>(swap ? k : q, swap ? q : k, valid, scale,
                             swap ? Normalize::row : static_cast<Normalize>(normalize)),
             out);
    });
  }
  return {cast_to(grad_q, q_in.scalar_type()), cast_to(grad_k, k_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("transition_matrix", TORCH_BOX(&transition_matrix));
  m.impl("transition_matrix_backward", TORCH_BOX(&transition_matrix_backward));
}
