"""Soft self-labelling: labels of all pixels that agree with the network and with the image (docs/methods.md)."""

from __future__ import annotations

import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s.config import SelfLabelConfig
from cc4s_kernels.ops.potts.reference import negative_log


def label_energy(
    y: Tensor, prob: Tensor, seeds: Tensor, mask: Tensor, grid: ck.PixelGrid, config: SelfLabelConfig
) -> Tensor:
    """What soft labels minimise: mean over unlabelled pixels of -ln~ y.p, plus potts * Potts energy of y: (B,).

    Args:
        y, prob: (B, C, H, W). seeds: (B, H, W) int64, -1 = unlabelled. mask: (B, H, W) bool, False = no pixel.
        grid: of the Potts energy.
    """
    free = mask & (seeds < 0)
    collision = negative_log((y * prob).sum(1)).where(free, 0).sum((1, 2)) / free.sum((1, 2)).clamp(min=1)
    return collision + config.potts * ck.potts(y, grid, relaxation=config.relaxation)


def soft_self_labels(
    prob: Tensor, labels: Tensor, rgb: Tensor, mask: Tensor, config: SelfLabelConfig, ignore_index: int = 255
) -> Tensor:
    """Soft labels y for fixed predictions: `label_energy` lowered by mirror descent, from y = prob.

    A step multiplies y by exp(-rate * gradient per pixel) and normalises it; scribbles stay one-hot. It depends on
    nothing but its arguments: the alternation of labels and network has no state to store.

    Args:
        prob: (B, C, H, W) float32, no gradient. labels: (B, H, W) integer. rgb: (B, 3, H, W) uint8.
        mask: (B, H, W) bool, False = no pixel. config: steps, rate, Potts weight, relaxation and grid.

    Returns:
        (B, C, H, W) distributions.
    """
    grid = ck.gaussian_grid(rgb, sigma_color=config.sigma_color, connectivity=config.connectivity, mask=mask)
    seeds = labels.long()
    seeds = seeds.where((seeds != ignore_index) & mask, -1)
    known = (seeds >= 0)[:, None]
    one_hot = torch.zeros_like(prob).scatter_(1, seeds.clamp(min=0)[:, None], 1.0)
    # The energy is a mean over pixels: a step per pixel of the same size in images of all sizes.
    rate = config.rate * mask.sum((1, 2)).to(prob.dtype)[:, None, None, None]
    y = one_hot.where(known, prob)
    for _ in range(config.steps):
        y.requires_grad_()
        with torch.enable_grad():
            energy = label_energy(y, prob, seeds, mask, grid, config).sum()
        (gradient,) = torch.autograd.grad(energy, y)
        y = (y.detach().clamp(min=1e-8).log() - rate * gradient).softmax(1)
        y = one_hot.where(known, y)
    return y.detach()
