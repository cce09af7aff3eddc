"""Torch ops and backends of `transition_matrix`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, _triton, backends
from cc4s_kernels.ops.transition_matrix import cpu as cpu
from cc4s_kernels.ops.transition_matrix import reference

backends.register("transition_matrix", "reference", reference.transition_matrix)

# ---- triton: tensors are (B, N, d), the matrix is (B, N, N), lse2 (B, N).

_library.LIBRARY.define(
    "transition_matrix_triton(Tensor q, Tensor k, float scale, str normalize) -> (Tensor matrix, Tensor lse2)"
)
_library.LIBRARY.define(
    "transition_matrix_triton_backward(Tensor q, Tensor k, Tensor lse2, Tensor matrix_grad, float scale,"
    " str normalize) -> (Tensor q_grad, Tensor k_grad)"
)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from cc4s_kernels.ops.transition_matrix import triton

    return triton.forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from cc4s_kernels.ops.transition_matrix import triton

    return triton.backward(*args)


def _fake_forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, n, _ = q.shape
    return q.new_empty((batch, n, n)), q.new_empty((batch, n), dtype=torch.float32)


def _fake_backward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, *ctx.options = inputs
    ctx.save_for_backward(q, k, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, matrix_grad: Tensor | None, lse2_grad: None) -> tuple[Any, ...]:
    if matrix_grad is None:
        return (None, None, None, None)
    q_grad, k_grad = torch.ops.cc4s_kernels.transition_matrix_triton_backward(
        *ctx.saved_tensors, matrix_grad, *ctx.options
    )
    needed = ctx.needs_input_grad
    return (q_grad if needed[0] else None, k_grad if needed[1] else None, None, None)


_library.register("transition_matrix_triton", _forward, _fake_forward, _gradients, _save)
_library.register(
    "transition_matrix_triton_backward", _backward, _fake_backward, _library.no_second_derivative("triton")
)


def _triton_transition_matrix(q: Tensor, k: Tensor, *, scale: float = 1.0, normalize: str = "row") -> Tensor:
    flat = [_triton.flatten_leading(x, 2) for x in (q, k)]
    matrix, _ = torch.ops.cc4s_kernels.transition_matrix_triton(*flat, scale, normalize)
    return matrix.reshape(*q.shape[:-1], q.shape[-2])


def _triton_refuses(q: Tensor, *args: Any, **options: Any) -> str | None:
    if q.shape[-1] > 256:
        return f"d = {q.shape[-1]}: the Triton kernels take d <= 256"
    return _triton.refuses(q, "q")


backends.register("transition_matrix", "triton", _triton_transition_matrix, _triton_refuses)
