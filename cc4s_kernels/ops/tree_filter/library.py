"""Torch ops and backends of `tree_filter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, backends
from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.tree_filter import reference

# Trees: weight (B, E) -> order, parent, edge (B, N) int64; see reference.trees. The filter: values (B, C, N) in the
# accumulation dtype, decay (B, N) in it too. The kernels stand in csrc/tree_filter/.
_TREES = "(Tensor weight, int height, int width) -> (Tensor order, Tensor parent, Tensor edge)"
_FILTER = "Tensor values, Tensor decay, Tensor order, Tensor parent"
_library.LIBRARY.define(f"tree_filter_trees{_TREES}")
_library.LIBRARY.define(f"tree_filter_trees_reference{_TREES}")
_library.LIBRARY.define(f"tree_filter({_FILTER}) -> Tensor")
_library.LIBRARY.define(
    f"tree_filter_backward(Tensor gradient, {_FILTER}) -> (Tensor values_gradient, Tensor decay_gradient)"
)
_library.LIBRARY.impl("tree_filter_trees_reference", reference.trees, "CompositeExplicitAutograd")


def _fake_trees(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    order, parent, edge = (weight.new_empty((weight.shape[0], height * width), dtype=torch.int64) for _ in range(3))
    return order, parent, edge


def _fake(values: Tensor, *args: Any) -> Tensor:
    return values.new_empty(values.shape)


def _fake_backward(gradient: Tensor, values: Tensor, decay: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), decay.new_empty(decay.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.cc4s_kernels.tree_filter_backward(gradient, *ctx.saved_tensors), None, None)


for _name in ("tree_filter_trees", "tree_filter_trees_reference"):
    torch.library.register_fake(f"{_library.NAMESPACE}::{_name}", _fake_trees, lib=_library.LIBRARY)
_OP = f"{_library.NAMESPACE}::tree_filter"
torch.library.register_fake(_OP, _fake, lib=_library.LIBRARY)
torch.library.register_fake(f"{_OP}_backward", _fake_backward, lib=_library.LIBRARY)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context, lib=_library.LIBRARY)
torch.library.register_autograd(f"{_OP}_backward", _library.no_second_derivative("compiled"), lib=_library.LIBRARY)


def _compiled(values: Tensor, guide: Tensor, *, sigma: float) -> Tensor:
    with without_autocast(values.device):
        dtype = accumulation_dtype(values.dtype)
        weight = reference.edge_weights(guide, dtype)
        order, parent, edge = torch.ops.cc4s_kernels.tree_filter_trees(weight.detach().nan_to_num(), *values.shape[2:])
        decay = reference.decays(weight, edge, sigma)
        out: Tensor = torch.ops.cc4s_kernels.tree_filter(values.to(dtype).flatten(2), decay, order, parent)
        return out.unflatten(2, values.shape[2:])


def _cpu_refuses(values: Tensor, guide: Tensor, **options: Any) -> str | None:
    return None if values.device.type == "cpu" else f"values is on {values.device}"


def _cuda_refuses(values: Tensor, guide: Tensor, **options: Any) -> str | None:
    return _cuda.refuses(values, "values")


backends.register("tree_filter", "reference", reference.tree_filter)
backends.register("tree_filter", "cpu", _compiled, _cpu_refuses)
backends.register("tree_filter", "cuda", _compiled, _cuda_refuses)
