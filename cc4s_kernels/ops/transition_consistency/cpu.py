"""The C++ backend of `transition_consistency`: torch ops, fakes, autograd; kernels in csrc/transition_consistency/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, backends
from cc4s_kernels._pairwise import cpu_refuses
from cc4s_kernels._precision import accumulation_dtype
from cc4s_kernels.ops.transition_consistency.reference import TransitionConsistency

# Kernels in csrc/transition_consistency/, for rows; the last three outputs are read by the backward pass.
_library.LIBRARY.define(
    "transition_consistency(Tensor q, Tensor k, Tensor q_target, Tensor k_target, Tensor? mask, float scale)"
    " -> (Tensor kl, Tensor trace, Tensor trace_target, Tensor lse, Tensor lse_target, Tensor diagonal)"
)
_library.LIBRARY.define(
    "transition_consistency_backward(Tensor? grad_kl, Tensor? grad_trace, Tensor q, Tensor k, Tensor q_target,"
    " Tensor k_target, Tensor lse, Tensor lse_target, Tensor diagonal, Tensor? mask, float scale) -> (Tensor, Tensor)"
)
_NAME = f"{_library.NAMESPACE}::transition_consistency"


def _fake(
    q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(q.dtype)
    rows, images = q.shape[:-1], q.shape[:-2]
    return tuple(q.new_empty(shape, dtype=dtype) for shape in (rows, images, images, rows, rows, rows))


def _fake_backward(
    grad_kl: Tensor | None, grad_trace: Tensor | None, q: Tensor, k: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mask, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[3:], mask)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_kl: Tensor | None, grad_trace: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_kl is None and grad_trace is None:
        return (None,) * 6
    gradients = torch.ops.cc4s_kernels.transition_consistency_backward(
        grad_kl, grad_trace, *ctx.saved_tensors, ctx.scale
    )
    return (*gradients, None, None, None, None)


torch.library.register_fake(_NAME, _fake, lib=_library.LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _fake_backward, lib=_library.LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=_library.LIBRARY)
torch.library.register_autograd(f"{_NAME}_backward", _library.no_second_derivative("cpu"), lib=_library.LIBRARY)


def _cpu(
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
    found = torch.ops.cc4s_kernels.transition_consistency(q, k, q_target, k_target, mask, scale)
    return TransitionConsistency(*found[:3])


def _cpu_refuses(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return cpu_refuses(q)


backends.register("transition_consistency", "cpu", _cpu, _cpu_refuses)
