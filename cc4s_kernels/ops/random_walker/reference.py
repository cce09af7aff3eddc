"""The definition of `random_walker` in plain PyTorch, by conjugate gradients in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.potts.grid import PixelGrid, masked

FLOOR = 1e-10
"""Added to every weight, as in scikit-image: no edge of an image is cut."""

TOLERANCE = 1e-14
"""|D^-1 r| of each system relative to |D^-1 b| (residual, right-hand side, diagonal; Euclidean norms): what one more
Jacobi step would change, in units of probability. So small because a region whose edges to the rest have the weight w
has an error of up to this over w."""

MAX_ITERATIONS = 20000

ACCEPTED = 1e-3
"""What will do in the place of `TOLERANCE` after the last step: images of noise, where most weights are almost 0."""


def edge_weights(image: Tensor, beta: float, mask: Tensor | None) -> Tensor:
    """exp(-beta |I_i - I_j|^2 / (10 std sqrt(channels))) + 1e-10: image (B, C, H, W) -> (B, 2, H, W).

    std is the standard deviation of all values of an image (inside the mask); where it is 0, all weights are 1.
    """
    with without_autocast(image.device):
        value = image.to(accumulation_dtype(image.dtype))
        if image.dtype == torch.uint8:
            value = value / 255
        batch, channels, height, width = value.shape
        inside = value.new_ones(batch, 1, height, width) if mask is None else mask[:, None].to(value.dtype)
        count = (channels * inside.sum((1, 2, 3))).clamp(min=1)
        mean = (value * inside).sum((1, 2, 3)) / count
        variance = ((value - mean[:, None, None, None]).square() * inside).sum((1, 2, 3)) / count  # [B]
        flat = variance == 0
        # The root's gradient is infinite at 0: it must not see it.
        factor = (beta / 10 / channels**0.5) / variance.where(~flat, 1).sqrt().where(~flat, 1)
        right = (value[..., 1:] - value[..., :-1]).square().sum(1)  # [B, H, W-1]
        down = (value[..., 1:, :] - value[..., :-1, :]).square().sum(1)  # [B, H-1, W]
        # What leaves the image has weight 0.
        weight = torch.stack(
            [
                pad(torch.exp(-factor[:, None, None] * right) + FLOOR, (0, 1) if width else (0, 0)),
                pad(torch.exp(-factor[:, None, None] * down) + FLOOR, (0, 0, 0, 1) if height else (0, 0)),
            ],
            1,
        )
        return weight if mask is None else masked(weight, mask)


def neighbours(weight: Tensor, x: Tensor) -> Tensor:
    """Weighted sum over the 4 neighbours: weight (B, 2, H, W), x (B, K, H, W) -> (B, K, H, W)."""
    right, down = weight[:, :1, :, :-1], weight[:, 1:, :-1]
    return (
        pad(right * x[..., 1:], (0, 1))
        + pad(right * x[..., :-1], (1, 0))
        + pad(down * x[..., 1:, :], (0, 0, 0, 1))
        + pad(down * x[..., :-1, :], (0, 0, 1, 0))
    )


def reached(weight: Tensor, seeded: Tensor) -> Tensor:
    """Pixels that edges of positive weight join to a seed: (B, 2, H, W), bool (B, H, W) -> bool (B, H, W)."""
    edges = weight > 0
    inside = edges[:, 0, :, :-1].flatten(1).all(1) & edges[:, 1, :-1].flatten(1).all(1)
    found = seeded | (seeded.flatten(1).any(1) & inside)[:, None, None]
    while not bool(inside.all()):
        grown = found | (neighbours(edges.float(), found[:, None].float())[:, 0] > 0)
        if torch.equal(grown, found):
            break
        found = grown
    return found


def solve(weight: Tensor, rhs: Tensor, free: Tensor) -> Tensor:
    """x with sum_j w_ij (x_i - x_j) = rhs_i on free pixels and x = 0 elsewhere.

    Conjugate gradients with the diagonal as preconditioner, to `TOLERANCE` for each right-hand side.

    Args:
        weight: (B, 2, H, W) float64. rhs: (B, K, H, W), used on free pixels. free: (B, H, W) bool, each joined to a
            pixel that is not free.

    Raises:
        RuntimeError: no convergence in `MAX_ITERATIONS` steps.
    """
    rhs = rhs * free[:, None]
    out = torch.zeros_like(rhs)
    # One right-hand side for each image and class with any: most classes are not in an image.
    columns = rhs.flatten(2).any(2).nonzero().unbind(1)
    r = rhs[columns][:, None]  # [M, 1, H, W]
    if len(r) == 0:
        return out
    w, free = weight[columns[0]], free[columns[0]][:, None]
    diagonal = neighbours(w, torch.ones_like(r)).where(free, 1)
    z = r / diagonal
    bound = TOLERANCE * z.flatten(1).norm(dim=1)
    # What is not finite stays so.
    x = torch.zeros_like(r) + 0 * bound[:, None, None, None]
    p, rz = z, (r * z).sum((1, 2, 3), keepdim=True)
    for step in range(MAX_ITERATIONS):
        # A solved system stands still: its numbers would get too small to divide.
        active = (z.flatten(1).norm(dim=1) > bound)[:, None, None, None]
        # Looking costs a synchronisation on a GPU.
        if step % 16 == 0 and not bool(active.any()):
            out[columns] = x[:, 0]
            return out
        a = (diagonal * p - neighbours(w, p)).where(free, 0)
        pa = (p * a).sum((1, 2, 3), keepdim=True)
        alpha = (rz / pa).where(active & (pa > 0), 0)
        x = x + alpha * p
        r = r - alpha * a
        z = r / diagonal
        rz, before = (r * z).sum((1, 2, 3), keepdim=True), rz
        p = z + (rz / before).where(active & (before > 0), 0) * p
    if not bool((z.flatten(1).norm(dim=1) > ACCEPTED / TOLERANCE * bound).any()):
        out[columns] = x[:, 0]
        return out
    raise RuntimeError(f"random_walker: no convergence in {MAX_ITERATIONS} steps; a smaller beta makes it easier")


def random_walker(
    image_or_grid: Tensor | PixelGrid,
    seeds: Tensor,
    num_classes: int,
    *,
    beta: float = 130.0,
    mask: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """See `cc4s_kernels.random_walker`."""
    weight = weights_of(image_or_grid, beta, mask).expand(len(seeds), -1, -1, -1)
    classes = torch.arange(num_classes, device=seeds.device)[:, None, None]
    clamped = (seeds_of(seeds, num_classes, mask, ignore_index)[:, None] == classes).to(torch.float64)  # [B, C, H, W]
    wide = weight.double()
    seeded = clamped.any(1)
    free = torch.ops.cc4s_kernels.random_walker_reached(wide, seeded) & ~seeded
    solution = torch.ops.cc4s_kernels.random_walker_solve(wide, neighbours(wide, clamped), free)
    return (solution.clamp(0, 1) + clamped).to(weight.dtype)


def weights_of(image_or_grid: Tensor | PixelGrid, beta: float, mask: Tensor | None) -> Tensor:
    """(B, 2, H, W) in the accumulation dtype, 0 outside the mask."""
    if not isinstance(image_or_grid, PixelGrid):
        return edge_weights(image_or_grid, beta, mask)
    weight = image_or_grid.weight.to(accumulation_dtype(image_or_grid.weight.dtype))
    return weight if mask is None else masked(weight, mask)


def seeds_of(seeds: Tensor, num_classes: int, mask: Tensor | None, ignore_index: int) -> Tensor:
    """(B, H, W) int64 classes, -1 where there is no seed (or one out of range, or outside the mask)."""
    seeds = seeds.long()
    kept = (seeds != ignore_index) & (seeds >= 0) & (seeds < num_classes)
    return seeds.where(kept if mask is None else kept & mask, -1)
