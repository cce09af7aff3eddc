"""Torch ops and backends of `potts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, _triton, backends
from cc4s_kernels._precision import accumulation_dtype
from cc4s_kernels.ops.color_affinity.reference import SuperpixelGraph
from cc4s_kernels.ops.potts import reference
from cc4s_kernels.ops.potts.grid import PixelGrid

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# On a graph prob is (B, K, C), weight (B, E) and edge_index (B, 2, E); on a grid prob is (B, C, H, W), weight
# (B or 1, D, H, W) and edge_index None. `scale` (B,) is the norm, 0 where there was no weight. The kernels of `potts`
# stand in csrc/potts/, those of `potts_triton` in triton.py; a gradient that is not needed is empty.
_PROBLEM = "Tensor prob, Tensor weight, Tensor? edge_index, str relaxation, str norm"
_BACKENDS = {"potts": "cpu", "potts_triton": "triton"}
for _name in _BACKENDS:
    _library.LIBRARY.define(f"{_name}({_PROBLEM}) -> (Tensor energy, Tensor scale)")
    _library.LIBRARY.define(
        f"{_name}_backward(Tensor gradient, Tensor energy, Tensor scale, {_PROBLEM}, bool prob_needed,"
        " bool weight_needed) -> (Tensor prob_gradient, Tensor weight_gradient)"
    )


def _fake(prob: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(prob.dtype)
    return prob.new_empty(prob.shape[:1], dtype=dtype), prob.new_empty(prob.shape[:1], dtype=dtype)


def _fake_backward(
    gradient: Tensor, energy: Tensor, scale: Tensor, prob: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    prob_needed, weight_needed = args[-2:]
    return (
        prob.new_empty(prob.shape if prob_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prob, weight, edge_index, *ctx.options = inputs
    ctx.save_for_backward(*output, prob, weight, edge_index)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_of(name: str) -> Any:
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Any, ...]:
        if gradient is None:
            return (None,) * 5
        needed = ctx.needs_input_grad[:2]
        op = getattr(torch.ops.cc4s_kernels, f"{name}_backward")
        found = op(gradient, *ctx.saved_tensors, *ctx.options, *needed)
        return (*(g if n else None for g, n in zip(found, needed, strict=True)), None, None, None)

    return backward


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from cc4s_kernels.ops.potts import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from cc4s_kernels.ops.potts import triton

    return triton.backward(*args)


_library.LIBRARY.impl("potts_triton", _triton_forward, "CompositeExplicitAutograd")
_library.LIBRARY.impl("potts_triton_backward", _triton_backward, "CompositeExplicitAutograd")
for _name, _backend in _BACKENDS.items():
    _op = f"{_library.NAMESPACE}::{_name}"
    torch.library.register_fake(_op, _fake, lib=_library.LIBRARY)
    torch.library.register_fake(f"{_op}_backward", _fake_backward, lib=_library.LIBRARY)
    torch.library.register_autograd(_op, _backward_of(_name), setup_context=_setup_context, lib=_library.LIBRARY)
    torch.library.register_autograd(f"{_op}_backward", _library.no_second_derivative(_backend), lib=_library.LIBRARY)


def _kernel_of(name: str) -> Any:
    def run(
        prob: Tensor,
        graph_or_grid: SuperpixelGraph | PixelGrid,
        *,
        relaxation: str = "quadratic",
        norm: str = "sum",
    ) -> Tensor:
        edge_index = graph_or_grid.edge_index if isinstance(graph_or_grid, SuperpixelGraph) else None
        op = getattr(torch.ops.cc4s_kernels, name)
        energy: Tensor = op(prob, graph_or_grid.weight, edge_index, relaxation, norm)[0]
        return energy

    return run


def _cpu_refuses(prob: Tensor, graph_or_grid: SuperpixelGraph | PixelGrid, **options: Any) -> str | None:
    if prob.device.type != "cpu":
        return f"prob is on {prob.device}"
    for name, tensor in (("prob", prob), ("weight", graph_or_grid.weight)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, the C++ kernels take float64, float32, float16 and bfloat16"
    return None


def _triton_refuses(prob: Tensor, graph_or_grid: SuperpixelGraph | PixelGrid, **options: Any) -> str | None:
    return _triton.refuses(prob, "prob") or _triton.refuses(graph_or_grid.weight, "weight")


backends.register("potts", "reference", reference.potts)
backends.register("potts", "cpu", _kernel_of("potts"), _cpu_refuses)
backends.register("potts", "triton", _kernel_of("potts_triton"), _triton_refuses)
