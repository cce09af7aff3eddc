"""Torch ops and backends of `transition_consistency`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, _triton, backends
from cc4s_kernels.ops.transition_consistency import cpu as cpu
from cc4s_kernels.ops.transition_consistency import cuda, passes, reference
from cc4s_kernels.ops.transition_consistency.reference import TransitionConsistency

backends.register("transition_consistency", "reference", reference.transition_consistency)

# ---- triton and cuda: tensors are (B, N, d), rows are normalised; all that is not q_grad or k_grad is (B, N) float32.


def _fake_forward(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(5))


def _fake_backward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    _, diagonal, diagonal_target, lse2, lse2_target = output
    ctx.save_for_backward(*tensors, diagonal, lse2, lse2_target)
    ctx.mark_non_differentiable(diagonal_target, lse2, lse2_target)
    ctx.set_materialize_grads(False)


def _define(backend: str, kernels: Callable[[], passes.Kernels]) -> Callable[..., TransitionConsistency]:
    """The ops `transition_consistency_<backend>` and its backward on `kernels()`, and the public function on them."""
    name = f"transition_consistency_{backend}"
    _library.LIBRARY.define(
        f"{name}(Tensor q, Tensor k, Tensor q_target, Tensor k_target, Tensor? mask, float scale)"
        " -> (Tensor kl, Tensor diagonal, Tensor diagonal_target, Tensor lse2, Tensor lse2_target)"
    )
    _library.LIBRARY.define(
        f"{name}_backward(Tensor q, Tensor k, Tensor q_target, Tensor k_target, Tensor? mask, Tensor diagonal,"
        " Tensor lse2, Tensor lse2_target, Tensor? kl_grad, Tensor? diagonal_grad, float scale)"
        " -> (Tensor q_grad, Tensor k_grad)"
    )

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return passes.forward(kernels(), *args)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return passes.backward(kernels(), *args)

    def gradients(ctx: Any, kl_grad: Tensor | None, diagonal_grad: Tensor | None, *rest: None) -> tuple[Any, ...]:
        q_grad, k_grad = getattr(torch.ops.cc4s_kernels, f"{name}_backward")(
            *ctx.saved_tensors, kl_grad, diagonal_grad, ctx.scale
        )
        needed = ctx.needs_input_grad
        return (q_grad if needed[0] else None, k_grad if needed[1] else None, None, None, None, None)

    _library.register(name, forward, _fake_forward, gradients, _save)
    _library.register(f"{name}_backward", backward, _fake_backward, _library.no_second_derivative(backend))

    def transition_consistency(
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float = 1.0,
        normalize: str = "row",
    ) -> TransitionConsistency:
        if normalize == "column":
            q, k, q_target, k_target = k, q, k_target, q_target
        flat = [_triton.flatten_leading(x, 2) for x in (q, k, q_target, k_target)]
        flat_mask = None if mask is None else _triton.flatten_leading(mask, 1)
        kl, diagonal, diagonal_target, *_ = getattr(torch.ops.cc4s_kernels, name)(*flat, flat_mask, scale)
        leading = q.shape[:-2]
        return TransitionConsistency(
            kl.reshape(q.shape[:-1]), diagonal.sum(-1).reshape(leading), diagonal_target.sum(-1).reshape(leading)
        )

    return transition_consistency


def _triton_kernels() -> passes.Kernels:
    from cc4s_kernels.ops.transition_consistency import triton

    return triton.TritonKernels()


def _triton_refuses(q: Tensor, *args: Any, **options: Any) -> str | None:
    if q.shape[-1] > 256:
        return f"d = {q.shape[-1]}: the Triton kernels take d <= 256"
    return _triton.refuses(q, "q")


def _cuda_refuses(q: Tensor, *args: Any, **options: Any) -> str | None:
    if q.shape[-1] > 128:
        return f"d = {q.shape[-1]}: the CUDA kernels take d <= 128"
    return _cuda.refuses_pairwise(q, "q")


backends.register("transition_consistency", "triton", _define("triton", _triton_kernels), _triton_refuses)
backends.register("transition_consistency", "cuda", _define("cuda", cuda.CudaKernels), _cuda_refuses)
