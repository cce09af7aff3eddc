"""Torch ops and backends of `bilateral_filter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, _triton, backends
from cc4s_kernels._precision import accumulation_dtype
from cc4s_kernels.ops.bilateral_filter import reference

# `levels` (B, 3, H, W) are the colours in levels, in the dtype that is computed in. The kernels of `bilateral_filter`
# stand in csrc/bilateral_filter/, those of `bilateral_filter_triton` in triton.py.
_BACKENDS = {"bilateral_filter": "cpu", "bilateral_filter_triton": "triton"}


def _triton_filter(*args: Any) -> Tensor:
    from cc4s_kernels.ops.bilateral_filter import triton

    return triton.bilateral_filter(*args)


def _fake(values: Tensor, *args: Any) -> Tensor:
    return values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, levels, mask, *ctx.options = inputs
    ctx.save_for_backward(levels, mask)


def _backward_of(name: str) -> Any:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # K is symmetric: the gradient is the gradient, filtered. So is every further derivative.
        filtered = getattr(torch.ops.cc4s_kernels, name)(gradient, *ctx.saved_tensors, *ctx.options)
        return (filtered, None, None, None, None, None)

    return backward


for _name in _BACKENDS:
    _library.LIBRARY.define(
        f"{_name}(Tensor values, Tensor levels, Tensor? mask, float sigma_xy, float sigma_rgb, bool include_self)"
        " -> Tensor"
    )
    _op = f"{_library.NAMESPACE}::{_name}"
    torch.library.register_fake(_op, _fake, lib=_library.LIBRARY)
    torch.library.register_autograd(_op, _backward_of(_name), setup_context=_setup_context, lib=_library.LIBRARY)
_library.LIBRARY.impl("bilateral_filter_triton", _triton_filter, "CompositeExplicitAutograd")


def _kernel_of(name: str) -> Any:
    def run(
        values: Tensor,
        image: Tensor,
        *,
        sigma_xy: float,
        sigma_rgb: float,
        mask: Tensor | None = None,
        include_self: bool = False,
    ) -> Tensor:
        levels = reference.image_levels(image, mask, accumulation_dtype(values.dtype))
        op = getattr(torch.ops.cc4s_kernels, name)
        filtered: Tensor = op(values, levels, mask, sigma_xy, sigma_rgb, include_self)
        return filtered

    return run


def _cpu_refuses(values: Tensor, image: Tensor, **options: Any) -> str | None:
    return None if values.device.type == "cpu" else f"values is on {values.device}"


def _triton_refuses(values: Tensor, image: Tensor, **options: Any) -> str | None:
    if values[:1].numel() >= 2**31:
        return f"values has {values[:1].numel()} numbers per image, the Triton kernel takes less than 2^31"
    return _triton.refuses(values, "values")


backends.register("bilateral_filter", "reference", reference.bilateral_filter)
backends.register("bilateral_filter", "cpu", _kernel_of("bilateral_filter"), _cpu_refuses)
backends.register("bilateral_filter", "triton", _kernel_of("bilateral_filter_triton"), _triton_refuses)
