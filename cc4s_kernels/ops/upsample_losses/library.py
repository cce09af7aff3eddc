"""Torch ops and backends of `upsample_losses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, _triton, backends
from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.upsample_losses import reference
from cc4s_kernels.ops.upsample_losses.reference import UpsampleLosses

_ARGUMENTS = (
    "Tensor logits, Tensor labels, Tensor? weight, Tensor? superpixels, Tensor? class_weight, "
    "SymInt num_superpixels, int ignore_index, bool align_corners"
)

_OUTPUTS = "(Tensor cross_entropy, Tensor labelled, Tensor entropy, Tensor weight_sum, Tensor pooled, Tensor counts)"
_GRADIENTS = "Tensor cross_entropy_gradient, Tensor entropy_gradient, Tensor? pooled_gradient"

# The kernels of all backends have these signatures; logits are float32 or float64.


def _fake(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    superpixels: Tensor | None,
    class_weight: Tensor | None,
    num_superpixels: int,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, ...]:
    batch, classes = logits.shape[:2]
    bins = 0 if superpixels is None else num_superpixels
    shapes = ((batch,), (batch,), (batch,), (batch,), (batch, bins, classes), (batch, bins))
    return tuple(logits.new_empty(shape) for shape in shapes)


def _fake_backward(
    cross_entropy_gradient: Tensor,
    entropy_gradient: Tensor,
    pooled_gradient: Tensor | None,
    logits: Tensor,
    *args: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, labelled, _, weight, _, counts = output
    ctx.mark_non_differentiable(labelled, weight, counts)
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _gradients_by(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of the op `name`."""

    def gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        cross_entropy, _, entropy, _, pooled, _ = given
        logits, *maps = ctx.saved_tensors
        nothing = (None,) * (len(maps) + len(ctx.options))
        if cross_entropy is None and entropy is None and pooled is None:
            return None, *nothing
        each = [logits.new_zeros(logits.shape[:1]) if g is None else g for g in (cross_entropy, entropy)]
        backward = getattr(torch.ops.cc4s_kernels, f"{name}_backward")
        return backward(*each, pooled, logits, *maps, *ctx.options), *nothing

    return gradients


def _run_by(name: str) -> Callable[..., UpsampleLosses]:
    """The public call on the op `name`."""

    def run(
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        superpixels: Tensor | None = None,
        num_superpixels: int | None = None,
        ignore_index: int = 255,
        align_corners: bool = True,
        class_weight: Tensor | None = None,
    ) -> UpsampleLosses:
        dtype = accumulation_dtype(logits.dtype)
        if weight is not None and weight.dtype not in (torch.bool, torch.float32, torch.float64):
            weight = weight.to(dtype)
        if class_weight is not None:
            class_weight = class_weight.to(dtype)
        with without_autocast(logits.device):
            sums = getattr(torch.ops.cc4s_kernels, name)(
                # Small: the low resolution. This cast also rounds the gradient to the dtype of the logits.
                logits.to(dtype),
                labels,
                weight,
                superpixels,
                class_weight,
                num_superpixels or 0,
                ignore_index,
                align_corners,
            )
        return UpsampleLosses(*sums)

    return run


# ---- cpu: csrc/upsample_losses/upsample_losses_cpu.cpp

_library.LIBRARY.define(f"upsample_losses({_ARGUMENTS}) -> {_OUTPUTS}")
_library.LIBRARY.define(f"upsample_losses_backward({_GRADIENTS}, {_ARGUMENTS}) -> Tensor")
for _name, _shapes in (("upsample_losses", _fake), ("upsample_losses_backward", _fake_backward)):
    torch.library.register_fake(f"{_library.NAMESPACE}::{_name}", _shapes, lib=_library.LIBRARY)
torch.library.register_autograd(
    f"{_library.NAMESPACE}::upsample_losses",
    _gradients_by("upsample_losses"),
    setup_context=_setup_context,
    lib=_library.LIBRARY,
)
torch.library.register_autograd(
    f"{_library.NAMESPACE}::upsample_losses_backward", _library.no_second_derivative("cpu"), lib=_library.LIBRARY
)


def _cpu_refuses(logits: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if logits.device.type == "cpu" else f"the logits are on {logits.device}"


# ---- triton: triton.py


def _triton_forward(*args: Any) -> tuple[Tensor, ...]:
    from cc4s_kernels.ops.upsample_losses import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from cc4s_kernels.ops.upsample_losses import triton

    return triton.backward(*args)


def _triton_refuses(logits: Tensor, labels: Tensor, **options: Any) -> str | None:
    if labels.shape[-2] * labels.shape[-1] >= 2**31:
        return f"labels have {labels.shape[-2]} x {labels.shape[-1]} pixels, the Triton kernels take less than 2^31"
    return _triton.refuses(logits, "logits", widened=True)


_library.LIBRARY.define(f"upsample_losses_triton({_ARGUMENTS}) -> {_OUTPUTS}")
_library.LIBRARY.define(f"upsample_losses_triton_backward({_GRADIENTS}, {_ARGUMENTS}) -> Tensor")
_library.register(
    "upsample_losses_triton", _triton_forward, _fake, _gradients_by("upsample_losses_triton"), _setup_context
)
_library.register(
    "upsample_losses_triton_backward", _triton_backward, _fake_backward, _library.no_second_derivative("triton")
)

backends.register("upsample_losses", "reference", reference.upsample_losses)
backends.register("upsample_losses", "cpu", _run_by("upsample_losses"), _cpu_refuses)
backends.register("upsample_losses", "triton", _run_by("upsample_losses_triton"), _triton_refuses)
