"""The exact bilateral filter: sums over all pairs of pixels, weighted by position and colour."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_colors, check_pixel_mask, check_positive, check_shape, check_tensor, describe
from cc4s_kernels.ops.bilateral_filter import library  # noqa: F401  registers the backends

__all__ = ["bilateral_filter"]


def bilateral_filter(
    values: Tensor,
    image: Tensor,
    *,
    sigma_xy: float,
    sigma_rgb: float,
    mask: Tensor | None = None,
    include_self: bool = False,
) -> Tensor:
    """K values: for each pixel i the sum over all pixels j of K_ij values_j, without the N x N matrix.

    K_ij = exp(-|xy_i - xy_j|^2 / (2 sigma_xy^2) - |rgb_i - rgb_j|^2 / (2 sigma_rgb^2)), positions in pixels,
    colours in levels 0..255; not normalised. Every pair counts, whatever its distance: no lattice, no window.

    Args:
        values: (B, C, H, W) floating.
        image: (B, 3, H, W) uint8 RGB, or floating in [0, 1] (taken times 255, not rounded). It has no gradient.
        sigma_xy: standard deviation in pixels, greater than 0.
        sigma_rgb: standard deviation in levels, greater than 0; 13 and 15 are usual.
        mask: (B, H, W) bool, True = valid. Other pixels are in no pair: their results and gradients are 0, and
            what stands there (NaN included) changes nothing. None: all are valid.
        include_self: whether the pair (i, i), with K_ii = 1, counts.

    Returns:
        (B, C, H, W) in the dtype of `values`; distances, kernel and sums are float32 (float64 for float64
        values). Under autocast the inputs stay as they are. Differentiable in `values` any number of times, on
        every backend: K is symmetric, so the gradient is the filtered gradient.

    Raises:
        TypeError: not a tensor, a wrong dtype, an option of a wrong type.
        ValueError: shapes or devices that do not fit, a standard deviation that is not finite and positive, an
            image that requires a gradient, a floating image outside [0, 1] (on the CPU, elsewhere with
            CC4S_KERNELS_CHECK=1).

    Source: P. Krähenbühl and V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
    Potentials", 2011.
    """
    check_tensor("values", values, dims="(B, C, H, W)", floating=True)
    batch, _, height, width = values.shape
    check_pixel_mask(mask, (batch, height, width), values.device)
    check_image(image, (batch, 3, height, width), values.device, mask)
    for name, sigma in (("sigma_xy", sigma_xy), ("sigma_rgb", sigma_rgb)):
        check_positive(name, sigma)
    if not isinstance(include_self, bool):
        raise TypeError(f"include_self: got {describe(include_self)}, expected a bool")
    options = {"sigma_xy": sigma_xy, "sigma_rgb": sigma_rgb, "mask": mask, "include_self": include_self}
    filtered: Tensor = backends.select("bilateral_filter", values, image, **options)(values, image, **options)
    return filtered


def check_image(image: Tensor, size: tuple[int, int, int, int], device: torch.device, mask: Tensor | None) -> None:
    check_tensor("image", image, dims="(B, 3, H, W)", device=device)
    check_shape("image", image, size, "the colours of each pixel of values")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {describe(image)}, expected torch.uint8, or a floating dtype in [0, 1]")
    if image.requires_grad:
        raise ValueError("image: requires a gradient, expected image.detach(): bilateral_filter has none for the image")
    check_colors(image, mask)
