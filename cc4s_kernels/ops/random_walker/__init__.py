"""Propagation of seeds by random walks on the pixel grid."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import (
    INTEGER_DTYPES,
    check_number,
    check_shape,
    check_tensor,
    describe,
    may_read_values,
    value_range,
)
from cc4s_kernels.ops.potts.grid import PixelGrid, check_weight
from cc4s_kernels.ops.random_walker import library  # noqa: F401  registers the backends

__all__ = ["random_walker"]


def random_walker(
    image_or_grid: Tensor | PixelGrid,
    seeds: Tensor,
    num_classes: int,
    *,
    beta: float = 130.0,
    mask: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """The probability that a random walk from each pixel meets a seed of each class first.

    On the 4-connected grid with weights w_ij = exp(-beta |I_i - I_j|^2 / (10 std sqrt(channels))) + 1e-10, std
    being the standard deviation of all values of the image: `skimage.segmentation.random_walker` with its
    `channel_axis`. Pixels without a seed solve sum_j w_ij (p_i - p_j) = 0.

    Args:
        image_or_grid: (B, C, H, W) uint8 (taken over 255) or floating (taken as it is), any number of channels,
            features of a network too; or a 4-connected `PixelGrid`, whose weights (B or 1, 2, H, W) are then those
            of the walk.
        seeds: (B, H, W) integer classes, `ignore_index` = no seed.
        num_classes: C of the result.
        beta: how much a difference of colours hinders the walk, at least 0; not used with a grid.
        mask: (B, H, W) bool, False = no pixel (padding): neither walked on nor part of std.
        ignore_index: the label of pixels without a seed.

    Returns:
        (B, C, H, W) float32 (float64 for float64), in [0, 1]: sums to 1 over classes where any seed can be reached,
        0 for every class elsewhere (an image without a seed, a region cut off by the mask or by weights 0).
        Seeds are one-hot. Differentiable in a floating image and in the weights of a grid, by one more solve.

    Raises:
        TypeError, ValueError: an argument is not as above (seeds out of range, values that are not finite: on the
            CPU, elsewhere with CC4S_KERNELS_CHECK=1, and else such a seed is none).
        RuntimeError: the solver does not converge.

    Source: L. Grady, "Random walks for image segmentation", PAMI 2006; docs/kernels/random_walker.md.
    """
    check_number("num_classes", num_classes, low=1, integer=True)
    check_number("beta", beta, low=0)
    check_number("ignore_index", ignore_index, integer=True)
    check_tensor("seeds", seeds, dims="(B, H, W)", dtypes=INTEGER_DTYPES)
    _check_space(image_or_grid, seeds)
    if mask is not None:
        check_tensor("mask", mask, dims="(B, H, W)", dtypes=(torch.bool,), device=seeds.device)
        check_shape("mask", mask, seeds.shape, "the shape of seeds")
    if seeds.numel() and may_read_values(seeds):
        low, high = value_range(seeds, skip=ignore_index)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"seeds: got classes from {low} to {high}, expected 0 to {num_classes - 1} or {ignore_index} (none)"
            )
    options = {"beta": beta, "mask": mask, "ignore_index": ignore_index}
    run = backends.select("random_walker", image_or_grid, seeds, num_classes, **options)
    return run(image_or_grid, seeds, num_classes, **options)


def _check_space(image_or_grid: Tensor | PixelGrid, seeds: Tensor) -> None:
    batch, height, width = seeds.shape
    if isinstance(image_or_grid, PixelGrid):
        weight = image_or_grid.weight
        check_tensor("weight", weight, dims="(B, 2, H, W)", floating=True, device=seeds.device)
        if weight.shape[0] not in (1, batch) or weight.shape[1] != 2:
            raise ValueError(f"weight: got {describe(weight)}, expected batch 1 or {batch} and 2 directions")
        check_shape("weight", weight, (weight.shape[0], 2, height, width), "the pixels of seeds")
        check_weight("weight", weight)
        return
    image = image_or_grid
    check_tensor("image", image, dims="(B, C, H, W)", device=seeds.device)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {describe(image)}, expected torch.uint8 or a floating dtype")
    check_shape("image", image, (batch, max(image.shape[1], 1), height, width), "the pixels of seeds")
    if image.is_floating_point() and image.numel() and may_read_values(image):
        low, high = value_range(image)
        if not (low > -float("inf") and high < float("inf")):
            raise ValueError(f"image: got values from {low} to {high}, expected finite values")
