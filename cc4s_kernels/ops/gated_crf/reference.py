"""The definition of `gated_crf` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.potts.grid import shifted


def color_of(image: Tensor, sigma_rgb: float, dtype: torch.dtype) -> Tensor:
    """The image in units of sigma_rgb: constants (B, c, H, W) of that dtype."""
    scale = 1 / (sigma_rgb * (1 if image.is_floating_point() else 255))
    return image.detach().to(dtype) * scale


def destinations(prob: Tensor, mask: Tensor | None, destination: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The pixels that receive (B, H, W), None for all, and their number (B,) in the accumulation dtype."""
    dtype = accumulation_dtype(prob.dtype)
    if mask is not None:
        destination = mask if destination is None else mask & destination
    if destination is None:
        return None, prob.new_full(prob.shape[:1], prob.shape[2] * prob.shape[3], dtype=dtype)
    return destination, destination.sum((1, 2), dtype=dtype)


def pair_sums(
    prob: Tensor, color: Tensor, source: Tensor | None, destination: Tensor | None, radius: int, sigma_xy: float
) -> Tensor:
    """For each image the sum over pairs of pixels, once each, of K (1 - p_i.p_j) (d_i s_j + d_j s_i)."""
    ones = prob.new_ones((prob.shape[0], *prob.shape[2:]))
    gives = ones if source is None else source.to(prob.dtype)
    receives = ones if destination is None else destination.to(prob.dtype)
    total = prob.new_zeros(prob.shape[0])
    for dy in range(radius + 1):
        for dx in range(1 if dy == 0 else -radius, radius + 1):
            p, q = shifted(prob, dy, dx)  # [B, C, H', W']
            here, there = shifted(color, dy, dx)
            (s_here, s_there), (d_here, d_there) = shifted(gives, dy, dx), shifted(receives, dy, dx)
            exponent = 0.5 * (here - there).square().sum(1) + (dy * dy + dx * dx) / (2 * sigma_xy**2)
            weight = torch.exp(-exponent) * (d_here * s_there + d_there * s_here)
            total = total + (weight * (1 - (p * q).sum(1))).sum((1, 2))
    return total


def gated_crf(
    prob: Tensor,
    image: Tensor,
    *,
    radius: int = 5,
    sigma_xy: float = 6.0,
    sigma_rgb: float = 0.1,
    mask: Tensor | None = None,
    destination: Tensor | None = None,
) -> Tensor:
    """docs/kernels/gated_crf.md as it is written; arguments are valid (the public function checks them)."""
    with without_autocast(prob.device):
        prob = prob.to(accumulation_dtype(prob.dtype))
        receives, count = destinations(prob, mask, destination)
        color = color_of(image, sigma_rgb, prob.dtype)
        return pair_sums(prob, color, mask, receives, radius, sigma_xy) / count.clamp(min=1)
