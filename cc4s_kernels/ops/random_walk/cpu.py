"""The C++ backend of `random_walk`: torch ops, fakes, autograd. The kernels stand in csrc/random_walk/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, backends
from cc4s_kernels._pairwise import cpu_refuses
from cc4s_kernels._precision import accumulation_dtype

# Kernels in csrc/random_walk/. `states` are Y_1 .. Y_{steps-1}, which the backward pass reads.
_library.LIBRARY.define(
    "random_walk(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int steps, float restart)"
    " -> (Tensor y, Tensor lse, Tensor states)"
)
_library.LIBRARY.define(
    "random_walk_backward(Tensor? grad_y, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse,"
    " Tensor states, Tensor? mask, float scale, int steps, float restart) -> (Tensor, Tensor, Tensor)"
)
_NAME = f"{_library.NAMESPACE}::random_walk"


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, steps: int, restart: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    return (
        v.new_empty(v.shape),
        q.new_empty(q.shape[:-1], dtype=dtype),
        v.new_empty((steps - 1, *v.shape), dtype=dtype),
    )


def _fake_backward(
    grad_y: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, mask)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None and grad_lse is None:
        return (None,) * 7
    gradients = torch.ops.cc4s_kernels.random_walk_backward(grad_y, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None)


torch.library.register_fake(_NAME, _fake, lib=_library.LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _fake_backward, lib=_library.LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=_library.LIBRARY)
torch.library.register_autograd(f"{_NAME}_backward", _library.no_second_derivative("cpu"), lib=_library.LIBRARY)


def _cpu(
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
    y, lse, _ = torch.ops.cc4s_kernels.random_walk(q, k, v, mask, scale, steps, restart)
    return (y, lse) if return_lse else y


def _cpu_refuses(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> str | None:
    return cpu_refuses(q, value_width=v.shape[-1])


backends.register("random_walk", "cpu", _cpu, _cpu_refuses)
