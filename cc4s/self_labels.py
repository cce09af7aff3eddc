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

    A step multiplies y by exp(-rate * gradient per pixel) and normalises it; scribbles stay one-hot. A step that does
    not lower an image's energy is not taken, and the image's rate is halved. The result depends on nothing but the
    arguments: the alternation of labels and network has no state to store.

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

    def evaluated(y: Tensor) -> tuple[Tensor, Tensor]:
        y.requires_grad_()
        with torch.enable_grad():
            energy = label_energy(y, prob, seeds, mask, grid, config)
        (gradient,) = torch.autograd.grad(energy.sum(), y)
        y.requires_grad_(False)
        return energy.detach(), gradient

    def everywhere(per_image: Tensor) -> Tensor:
        return per_image[:, None, None, None]

    # The energy is a mean over pixels: a step per pixel of the same size in images of all sizes.
    rate = config.rate * mask.sum((1, 2)).to(prob.dtype)
    y = one_hot.where(known, prob)
    energy, gradient = evaluated(y)
    for _ in range(config.steps):
        moved = (y.clamp(min=1e-8).log() - everywhere(rate) * gradient).softmax(1)
        moved = one_hot.where(known, moved)
        new_energy, new_gradient = evaluated(moved)
        better = new_energy < energy
        rate = rate.where(better, rate / 2)
        energy = new_energy.where(better, energy)
        y, gradient = moved.where(everywhere(better), y), new_gradient.where(everywhere(better), gradient)
    return y
