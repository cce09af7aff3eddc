"""Pixel grids with a weight for every pair of neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype
from cc4s_kernels._validation import check_number, check_positive, check_shape, check_tensor, describe, may_read_values

OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""(dy, dx) of the pairs: right, down, down-right, down-left; the first two make the 4-connected grid."""


class PixelGrid(NamedTuple):
    """A 4- or 8-connected grid of pixels, from `cc4s_kernels.pixel_grid` or `cc4s_kernels.gaussian_grid`.

    weight: (B or 1, D, H, W) floating, D = 2 (4-connected) or 4 (8-connected). weight[:, d, y, x] belongs to
    the pair of (y, x) and (y, x) + (0, 1), (1, 0), (1, 1), (1, -1) for d = 0, 1, 2, 3; a pair that leaves the
    grid is ignored.
    """

    weight: Tensor


def shifted(field: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pairs of pixels (dy, dx) apart, dy >= 0: two views (..., H', W') of field (..., H, W)."""
    height, width = field.shape[-2:]
    left, right = max(-dx, 0), width - max(dx, 0)
    # A grid without a pair has an empty view.
    left, right = min(left, width), max(right, min(left, width))
    bottom = max(height - dy, 0)
    return (
        field[..., :bottom, left:right],
        field[..., height - bottom :, max(left + dx, 0) : max(left + dx, 0) + right - left],
    )


def pairs(field: Tensor, direction: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pairs of a direction."""
    return shifted(field, *OFFSETS[direction])


def _directions(connectivity: int) -> int:
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: got {connectivity!r}, expected 4 or 8")
    return connectivity // 2


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight with 0 for each pair that has a pixel outside mask (B, H, W)."""
    keep = torch.zeros((mask.shape[0], *weight.shape[1:]), dtype=torch.bool, device=weight.device)
    for direction in range(weight.shape[1]):
        here, there = pairs(mask, direction)
        target, _ = pairs(keep[:, direction], direction)
        target.copy_(here & there)
    return torch.where(keep, weight, 0)


def _check_mask(mask: Tensor, height: int, width: int, device: torch.device) -> None:
    check_tensor("mask", mask, dims="(B, H, W)", dtypes=(torch.bool,), device=device)
    check_shape("mask", mask, (mask.shape[0], height, width), "the pixels of the grid")


def pixel_grid(
    height: int,
    width: int,
    *,
    connectivity: int = 4,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> PixelGrid:
    """A grid with given weights, or with weight 1 for every pair.

    Args:
        height, width: pixels.
        connectivity: 4 or 8.
        weight: (B or 1, D, H, W) floating, at least 0, D = connectivity / 2, laid out as in `PixelGrid`. May
            require a gradient.
        mask: (B, H, W) bool, True = valid; pairs with another pixel get weight 0.
        device: of the weights, where `weight` is None; default: that of `mask`, else the default device.

    Returns:
        `PixelGrid` for `potts`.

    Raises:
        TypeError, ValueError: an argument is not as above (negative or non-finite weights: on the CPU,
            elsewhere with CC4S_KERNELS_CHECK=1).
    """
    check_number("height", height, low=1, integer=True)
    check_number("width", width, low=1, integer=True)
    directions = _directions(connectivity)
    if weight is None:
        device = mask.device if device is None and isinstance(mask, Tensor) else device
        weight = torch.ones(1, directions, height, width, device=device)
    else:
        check_tensor("weight", weight, dims="(B, D, H, W)", floating=True)
        check_shape("weight", weight, (weight.shape[0], directions, height, width), f"connectivity {connectivity}")
        check_weight("weight", weight)
    if mask is not None:
        _check_mask(mask, height, width, weight.device)
        if weight.shape[0] not in (1, mask.shape[0]):
            raise ValueError(f"mask: got {describe(mask)}, expected the batch of weight {tuple(weight.shape)}")
        weight = masked(weight, mask)
    return PixelGrid(weight)


def gaussian_grid(
    image: Tensor, *, sigma_color: float = 15.0, connectivity: int = 8, mask: Tensor | None = None
) -> PixelGrid:
    """A grid with Gaussian colour weights exp(-|I_p - I_q|^2 / (2 sigma_color^2)).

    Args:
        image: (B, C, H, W) uint8, or floating in [0, 1] (taken times 255), any number of channels.
        sigma_color: standard deviation in 8-bit levels, greater than 0.
        connectivity: 4 or 8; diagonal pairs have the same weight as the others.
        mask: (B, H, W) bool, True = valid; pairs with another pixel get weight 0.

    Returns:
        `PixelGrid` with weight (B, D, H, W) float32 (float64 for a float64 image), differentiable with
        respect to a floating image.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("image", image, dims="(B, C, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {describe(image)}, expected torch.uint8, or a floating dtype in [0, 1]")
    check_positive("sigma_color", sigma_color)
    directions = _directions(connectivity)
    batch, _, height, width = image.shape
    if mask is not None:
        _check_mask(mask, height, width, image.device)
        check_shape("mask", mask, (batch, height, width), "the pixels of image")
    color = image.to(accumulation_dtype(image.dtype))
    color = color * ((255 if image.is_floating_point() else 1) / sigma_color)
    weight = []
    for direction in range(directions):
        here, there = pairs(color, direction)
        w = torch.exp(-0.5 * (here - there).square().sum(1))
        # Back to (B, H, W): zeros where the pair leaves the image.
        missing = width - w.shape[2]
        sides = (missing, 0) if OFFSETS[direction][1] < 0 else (0, missing)
        weight.append(torch.nn.functional.pad(w, (*sides, 0, height - w.shape[1])))
    stacked = torch.stack(weight, 1)
    return PixelGrid(stacked if mask is None else masked(stacked, mask))


def check_weight(name: str, weight: Tensor) -> None:
    """Raises ValueError for a negative or non-finite value, where values may be read."""
    if weight.numel() == 0 or not may_read_values(weight):
        return
    low, high = (float(value) for value in torch.aminmax(weight.detach()))
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"{name}: got values from {low} to {high}, expected finite values >= 0")
