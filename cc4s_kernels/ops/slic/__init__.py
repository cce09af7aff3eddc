"""SLIC superpixels, defined in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_number, check_shape, check_tensor, describe
from cc4s_kernels.ops.slic import library  # noqa: F401  registers the backends

MAX_SIDE = 2**20
MAX_PIXELS = 2**31 - 1


def slic(
    image: Tensor,
    num_segments: int = 800,
    *,
    compactness: float = 10.0,
    iterations: int = 10,
    mask: Tensor | None = None,
) -> Tensor:
    """Partitions images into at most `num_segments` compact, connected superpixels of similar colour.

    Defined in integers (fixed-point CIE Lab, regular seeds): the result is bitwise the same on every backend,
    for every number of threads, and for an image alone or in a batch.

    Args:
        image: (B, 3, H, W) uint8, sRGB. Grey images as three equal channels. Any strides.
        num_segments: upper bound K of the number of segments of each image, at least 1. The seeds stand on a
            regular grid over the whole image, masked or not.
        compactness: weight of distance in the plane against distance in Lab, in Lab units per seed spacing,
            from 0 to 100; rounded to 1/256.
        iterations: rounds of centroids and assignments; 0 gives the cells of the grid.
        mask: (B, H, W) bool, True = valid. The rest gets id -1 and takes no part.

    Returns:
        (B, H, W) int32: per image ids 0..n-1 without gaps in raster order of first appearance, n <=
        num_segments, each id one 4-connected region; -1 where `mask` is False. Where the mask cuts the image
        into more than `num_segments` pieces, the smallest pieces get -1 as well.

    Raises:
        TypeError: `image` is not uint8, `mask` is not bool, an option is no number.
        ValueError: shape, device, an option out of range, an image without pixels.

    Source: R. Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", 2012, with
    the integer arithmetic of docs/kernels/slic.md.
    """
    _check(image, num_segments, compactness, iterations, mask)
    options = {"compactness": compactness, "iterations": iterations, "mask": mask}
    return backends.select("slic", image, num_segments, **options)(image, num_segments, **options)


def _check(image: Tensor, num_segments: int, compactness: float, iterations: int, mask: Tensor | None) -> None:
    check_tensor("image", image, dims="(B, 3, H, W)")
    if image.dtype != torch.uint8:
        raise TypeError(
            f"image: got {describe(image)}, expected torch.uint8; "
            "convert values in [0, 1] with (image * 255).round().clamp(0, 255).to(torch.uint8)"
        )
    batch, _, height, width = image.shape
    check_shape("image", image, (batch, 3, height, width), "three channels; grey: image.expand(-1, 3, -1, -1)")
    if height == 0 or width == 0:
        raise ValueError(f"image: got {describe(image)}, expected at least one pixel")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(f"image: got {describe(image)}, expected sides up to {MAX_SIDE} and up to {MAX_PIXELS} pixels")
    check_number("num_segments", num_segments, low=1, high=MAX_PIXELS, integer=True)
    check_number("compactness", compactness, low=0, high=100)
    check_number("iterations", iterations, low=0, high=MAX_PIXELS, integer=True)
    if mask is not None:
        check_tensor("mask", mask, dims="(B, H, W)", dtypes=(torch.bool,), device=image.device)
        check_shape("mask", mask, (batch, height, width), "the pixels of image")
