"""Torch ops and backends of `gated_crf`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, _triton, backends
from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.gated_crf import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# prob (B, C, H, W), color (B, c, H, W) in units of sigma_rgb in the accumulation dtype, gates (B, H, W) bool (None:
# open) -> sums over pairs (B,). The kernels of `gated_crf` stand in csrc/gated_crf/, those of `gated_crf_triton` in
# triton.py.
_PROBLEM = "Tensor prob, Tensor color, Tensor? source, Tensor? destination, int radius, float sigma_xy"
_BACKENDS = {"gated_crf": "cpu", "gated_crf_triton": "triton"}
for _name in _BACKENDS:
    _library.LIBRARY.define(f"{_name}({_PROBLEM}) -> Tensor")
    _library.LIBRARY.define(f"{_name}_backward(Tensor gradient, {_PROBLEM}) -> Tensor")


def _fake(prob: Tensor, *args: Any) -> Tensor:
    return prob.new_empty(prob.shape[:1], dtype=accumulation_dtype(prob.dtype))


def _fake_backward(gradient: Tensor, prob: Tensor, *args: Any) -> Tensor:
    return prob.new_empty(prob.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.radius, ctx.sigma_xy = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(name: str) -> Any:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        op = getattr(torch.ops.cc4s_kernels, f"{name}_backward")
        return (op(gradient, *ctx.saved_tensors, ctx.radius, ctx.sigma_xy), *5 * (None,))

    return backward


def _triton_forward(*args: Any) -> Tensor:
    from cc4s_kernels.ops.gated_crf import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from cc4s_kernels.ops.gated_crf import triton

    return triton.backward(*args)


_library.LIBRARY.impl("gated_crf_triton", _triton_forward, "CompositeExplicitAutograd")
_library.LIBRARY.impl("gated_crf_triton_backward", _triton_backward, "CompositeExplicitAutograd")
for _name, _backend in _BACKENDS.items():
    _op = f"{_library.NAMESPACE}::{_name}"
    torch.library.register_fake(_op, _fake, lib=_library.LIBRARY)
    torch.library.register_fake(f"{_op}_backward", _fake_backward, lib=_library.LIBRARY)
    torch.library.register_autograd(_op, _backward_of(_name), setup_context=_setup_context, lib=_library.LIBRARY)
    torch.library.register_autograd(f"{_op}_backward", _library.no_second_derivative(_backend), lib=_library.LIBRARY)


def _kernel_of(name: str) -> Any:
    def run(
        prob: Tensor,
        image: Tensor,
        *,
        radius: int = 5,
        sigma_xy: float = 6.0,
        sigma_rgb: float = 0.1,
        mask: Tensor | None = None,
        destination: Tensor | None = None,
    ) -> Tensor:
        with without_autocast(prob.device):
            receives, count = reference.destinations(prob, mask, destination)
            color = reference.color_of(image, sigma_rgb, accumulation_dtype(prob.dtype))
            op = getattr(torch.ops.cc4s_kernels, name)
            sums: Tensor = op(prob, color, mask, receives, radius, float(sigma_xy))
            return sums / count.clamp(min=1)

    return run


def _cpu_refuses(prob: Tensor, image: Tensor, **options: Any) -> str | None:
    if prob.device.type != "cpu":
        return f"prob is on {prob.device}"
    if prob.dtype not in DTYPES:
        return f"prob is {prob.dtype}, the C++ kernels take float64, float32, float16 and bfloat16"
    return None


def _triton_refuses(prob: Tensor, image: Tensor, **options: Any) -> str | None:
    return _triton.refuses(prob, "prob")


backends.register("gated_crf", "reference", reference.gated_crf)
backends.register("gated_crf", "cpu", _kernel_of("gated_crf"), _cpu_refuses)
backends.register("gated_crf", "triton", _kernel_of("gated_crf_triton"), _triton_refuses)
