"""Argument checks shared by the ops: one clear error that names the argument, what came and what was expected."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cc4s_kernels import _library

INTEGER_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def describe(value: Any) -> str:
    """Shape, dtype and device of a tensor; type and value of anything else."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    name: str,
    value: Any,
    *,
    dims: str,
    floating: bool = False,
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> None:
    """Checks that `value` is a tensor of the rank, dtype and device an op expects.

    Args:
        name: argument name for the message.
        dims: expected shape in words, such as "(B, C, H, W)"; a leading "..." allows any leading dimensions.
        floating: any floating dtype is required.
        dtypes: the allowed dtypes, where not empty.
        device: the device it must share.

    Raises:
        TypeError: not a tensor, or wrong dtype. ValueError: wrong rank or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor {dims}")
    names = [part.strip() for part in dims.strip("()").split(",") if part.strip()]
    leading = bool(names) and names[0] == "..."
    rank = len(names) - leading
    if value.dim() < rank or (value.dim() != rank and not leading):
        raise ValueError(f"{name}: got {describe(value)}, expected shape {dims}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name}: got {describe(value)}, expected a floating dtype")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name}: got {describe(value)}, expected one of {', '.join(map(str, dtypes))}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got {describe(value)}, expected device {device}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raises ValueError unless `value` has exactly the shape `expected`; `meaning` says where that shape is from."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: got {describe(value)}, expected shape {tuple(expected)} ({meaning})")


def check_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, integer: bool = False
) -> None:
    """Checks a finite number option in [low, high].

    Raises:
        TypeError: not a number (bool is none). ValueError: not finite or out of range.
    """
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: got {describe(value)}, expected {'an integer' if integer else 'a number'}")
    # Comparisons, not math.isfinite: under torch.compile a number may be symbolic.
    if not (-math.inf < value < math.inf and low <= value <= high):
        raise ValueError(f"{name}: got {value!r}, expected a finite value in [{low}, {high}]")


def check_positive(name: str, value: Any) -> None:
    """Checks a finite number option greater than 0.

    Raises:
        TypeError: not a number. ValueError: not finite, or not greater than 0.
    """
    check_number(name, value, low=0)
    if value == 0:
        raise ValueError(f"{name}: got 0, expected a value greater than 0")


def check_pixel_mask(mask: Any, size: Sequence[int], device: torch.device) -> None:
    """None or bool (B, H, W) of shape `size`."""
    if mask is not None:
        check_tensor("mask", mask, dims="(B, H, W)", dtypes=(torch.bool,), device=device)
        check_shape("mask", mask, size, "one value for each pixel")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def may_read_values(tensor: Tensor) -> bool:
    """Whether a check may look at the values of `tensor`: not while tracing, on a GPU only with CC4S_KERNELS_CHECK=1
    (a look costs a device synchronisation)."""
    if (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or isinstance(tensor, torch._subclasses.FakeTensor)
    ):
        return False
    return tensor.device.type == "cpu" or os.environ.get("CC4S_KERNELS_CHECK") == "1"


_FAST_RANGE = (*INTEGER_DTYPES, torch.float32, torch.float64)


def value_range(tensor: Tensor, *, skip: int | None = None) -> tuple[float, float]:
    """Smallest and largest value of a tensor that is not empty; a NaN anywhere makes both NaN.

    Values equal to `skip` are left out; where none is left, the range is (0, -1).
    """
    if (
        _library.EXTENSION_ERROR is None
        and tensor.device.type == "cpu"
        and tensor.dtype in _FAST_RANGE
        and tensor.is_contiguous()
    ):
        low, high = torch.ops.cc4s_kernels.value_range(tensor.detach(), skip).tolist()
        return low, high
    # Compared with a uint8 tensor, -1 would be 255.
    kept = tensor.detach() if skip is None else tensor[tensor.long() != skip]
    if kept.numel() == 0:
        return 0, -1
    low, high = torch.aminmax(kept)
    return low.item(), high.item()


def check_colors(image: Tensor, mask: Tensor | None = None) -> None:
    """Raises ValueError where a floating `image` (B, c, H, W) leaves [0, 1] inside `mask` (B, H, W)."""
    if image.is_floating_point() and image.numel() and may_read_values(image):
        low, high = value_range(image if mask is None else image.masked_fill(~mask[:, None], 0.0))
        # A NaN anywhere makes the comparison false.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"image: got values from {low} to {high}, expected [0, 1], before normalisation")
