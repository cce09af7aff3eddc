"""Argument checks of the pairwise ops (random walk, transition matrix, consistency, eigenspace)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cc4s_kernels._validation import check_number, check_shape, check_tensor, describe


def check_queries_and_keys(q: Any, k: Any, names: Sequence[str] = ("q", "k")) -> None:
    """Floating (..., N, d) of one shape, dtype and device.

    Raises:
        TypeError, ValueError: as in `cc4s_kernels._validation`.
    """
    check_tensor(names[0], q, dims="(..., N, d)", floating=True)
    check_tensor(names[1], k, dims="(..., N, d)", floating=True, device=q.device)
    check_shape(names[1], k, q.shape, f"that of {names[0]}")
    check_same_dtype(names[0], q, names[1], k)


def check_values(q: Tensor, v: Any) -> None:
    """Floating (..., N, D) that fits to `q`."""
    check_tensor("v", v, dims="(..., N, D)", floating=True, device=q.device)
    check_shape("v", v, (*q.shape[:-1], v.shape[-1]), "N and the leading dimensions of q")
    check_same_dtype("q", q, "v", v)


def check_mask(q: Tensor, mask: Any) -> None:
    """None or bool (..., N) that fits to `q`."""
    if mask is not None:
        check_tensor("mask", mask, dims="(..., N)", dtypes=(torch.bool,), device=q.device)
        check_shape("mask", mask, q.shape[:-1], "N and the leading dimensions of q")


def check_walk(q: Any, k: Any, v: Any, mask: Any, scale: Any, steps: Any, restart: Any) -> None:
    """The arguments of `random_walk`, on one process or on several."""
    check_queries_and_keys(q, k)
    check_values(q, v)
    check_mask(q, mask)
    check_number("scale", scale)
    check_number("steps", steps, low=1, integer=True)
    check_number("restart", restart, low=0.0, high=1.0)


def check_same_dtype(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raises TypeError unless `a` and `b` have one dtype; under autocast they will be cast to one."""
    if a.dtype != b.dtype and not (a.device.type != "meta" and torch.is_autocast_enabled(a.device.type)):
        raise TypeError(f"{second}: got {describe(b)}, expected {a.dtype} as {first}")
