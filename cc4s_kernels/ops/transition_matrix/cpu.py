"""The C++ backend of `transition_matrix`: torch ops, fakes, autograd. The kernels stand in csrc/transition_matrix/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, backends
from cc4s_kernels._pairwise import cpu_refuses
from cc4s_kernels._precision import accumulation_dtype

# Kernels in csrc/transition_matrix/. normalize: position in _NORMALIZATIONS.
_library.LIBRARY.define(
    "transition_matrix(Tensor q, Tensor k, float scale, int normalize) -> (Tensor matrix, Tensor lse)"
)
_library.LIBRARY.define(
    "transition_matrix_backward(Tensor grad, Tensor q, Tensor k, Tensor lse, float scale, int normalize)"
    " -> (Tensor, Tensor)"
)
_NAME = f"{_library.NAMESPACE}::transition_matrix"
_NORMALIZATIONS = ("row", "column", "symmetric")


def _fake(q: Tensor, k: Tensor, scale: float, normalize: int) -> tuple[Tensor, Tensor]:
    rows = q.shape[:-1]
    return q.new_empty((*rows, rows[-1])), q.new_empty(rows, dtype=accumulation_dtype(q.dtype))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, ctx.scale, ctx.normalize = inputs
    ctx.save_for_backward(q, k, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    gradients = torch.ops.cc4s_kernels.transition_matrix_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.normalize)
    return (*gradients, None, None)


torch.library.register_fake(_NAME, _fake, lib=_library.LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _fake_backward, lib=_library.LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=_library.LIBRARY)
torch.library.register_autograd(f"{_NAME}_backward", _library.no_second_derivative("cpu"), lib=_library.LIBRARY)


def _cpu(q: Tensor, k: Tensor, *, scale: float = 1.0, normalize: str = "row") -> Tensor:
    return torch.ops.cc4s_kernels.transition_matrix(q, k, scale, _NORMALIZATIONS.index(normalize))[0]


def _cpu_refuses(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return cpu_refuses(q)


backends.register("transition_matrix", "cpu", _cpu, _cpu_refuses)
