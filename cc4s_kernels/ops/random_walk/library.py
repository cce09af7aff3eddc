"""Torch ops and backends of `random_walk`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, _triton, backends
from cc4s_kernels.ops.random_walk import cpu as cpu
from cc4s_kernels.ops.random_walk import cuda, reference, steps

backends.register("random_walk", "reference", reference.random_walk)

# ---- triton and cuda: tensors are (B, N, width); lse2 is the lse in units of log 2, states are Y_1 .. Y_{steps-1}.


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, steps: int, restart: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse2 = v.new_empty(v.shape[:-1], dtype=torch.float32)
    return v.new_empty(v.shape), lse2, v.new_empty((steps - 1, *v.shape))


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    scores_needed, values_needed = args[-2:]
    shape = q.shape if scores_needed else (0,)
    return q.new_empty(shape), q.new_empty(shape), v.new_empty(v.shape if values_needed else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _define(backend: str, kernels: Callable[[], steps.Kernels]) -> Callable[..., Any]:
    """The ops `random_walk_<backend>` and its backward on `kernels()`, and the public function on them."""
    name = f"random_walk_{backend}"
    _library.LIBRARY.define(
        f"{name}(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int steps, float restart)"
        " -> (Tensor y, Tensor lse2, Tensor states)"
    )
    _library.LIBRARY.define(
        f"{name}_backward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor y, Tensor lse2, Tensor states,"
        " Tensor? y_grad, Tensor? lse_grad, float scale, int steps, float restart, bool scores_needed,"
        " bool values_needed) -> (Tensor q_grad, Tensor k_grad, Tensor v_grad)"
    )

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return steps.forward(kernels(), *args)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return steps.backward(kernels(), *args)

    def gradients(ctx: Any, y_grad: Tensor | None, lse2_grad: Tensor | None, states_grad: None) -> tuple[Any, ...]:
        # The kernels take the gradient of the lse in natural units.
        lse_grad = None if lse2_grad is None else lse2_grad / math.log(2.0)
        needed = ctx.needs_input_grad
        scores, values = needed[0] or needed[1], needed[2]
        q_grad, k_grad, v_grad = getattr(torch.ops.cc4s_kernels, f"{name}_backward")(
            *ctx.saved_tensors, y_grad, lse_grad, *ctx.options, scores, values
        )
        found = (q_grad if needed[0] else None, k_grad if needed[1] else None, v_grad if needed[2] else None)
        return (*found, None, None, None, None)

    _library.register(name, forward, _fake_forward, gradients, _save)
    _library.register(f"{name}_backward", backward, _fake_backward, _library.no_second_derivative(backend))

    def random_walk(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float = 1.0,
        steps: int = 1,
        restart: float = 0.0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        flat = [_triton.flatten_leading(x, 2) for x in (q, k, v)]
        flat_mask = None if mask is None else _triton.flatten_leading(mask, 1)
        y, lse2, _ = getattr(torch.ops.cc4s_kernels, name)(*flat, flat_mask, scale, steps, restart)
        y = y.reshape(v.shape)
        return (y, (lse2 * math.log(2.0)).reshape(q.shape[:-1])) if return_lse else y

    return random_walk


def _triton_kernels() -> steps.Kernels:
    from cc4s_kernels.ops.random_walk import triton

    return triton.TritonKernels()


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    if q.shape[-1] > 256 or v.shape[-1] > 1024:
        return f"d = {q.shape[-1]}, D = {v.shape[-1]}: the Triton kernels take d <= 256 and D <= 1024"
    return _triton.refuses(q, "q")


def _cuda_refuses(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    if q.shape[-1] > 128 or v.shape[-1] > 1024:
        return f"d = {q.shape[-1]}, D = {v.shape[-1]}: the CUDA kernels take d <= 128 and D <= 1024"
    return _cuda.refuses_pairwise(q, "q")


backends.register("random_walk", "triton", _define("triton", _triton_kernels), _triton_refuses)
backends.register("random_walk", "cuda", _define("cuda", cuda.CudaKernels), _cuda_refuses)
