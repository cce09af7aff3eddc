"""Gated CRF energy: soft labels of nearby pixels of similar colour should agree."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_colors, check_number, check_positive, check_shape, check_tensor, describe
from cc4s_kernels.ops.gated_crf import library  # noqa: F401  registers the backends

MAX_RADIUS = 1024


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
    """Energy of soft labels in local windows: mean over pixels i of sum_j K_ij (1 - p_i.p_j), per image.

    K_ij = exp(-|xy_i - xy_j|^2 / (2 sigma_xy^2) - |rgb_i - rgb_j|^2 / (2 sigma_rgb^2)) for the other pixels j of the
    (2 radius + 1)^2 window around i, 0 elsewhere. Pixels outside of the image are no pixels.

    The gates: a pixel j gives (is a source) where `mask` is True; a pixel i receives (is a destination) where both
    `mask` and `destination` are True. The sum runs over pairs of a destination i and a source j, the mean over
    destinations. Both ends of a pair get the gradient.

    Args:
        prob: (B, C, H, W) class probabilities of any floating dtype, each distribution with sum 1; computed in
            float32 (float64 stays float64).
        image: (B, c, H, W), any number of channels: floating in [0, 1], or uint8 (divided by 255). It gets no
            gradient: it is a constant of the energy.
        radius: of the window, 1 to 1024.
        sigma_xy: in pixels, greater than 0.
        sigma_rgb: of colours in [0, 1], greater than 0.
        mask: (B, H, W) bool, True = valid (no padding). What prob and image hold elsewhere does not count, as long
            as it is finite.
        destination: (B, H, W) bool, True = receives; for example the unlabelled pixels.

    Returns:
        (B,) energies, 0 with gradient 0 for an image without a destination.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: A. Obukhov et al., "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation", 2019.
    """
    _check(prob, image, radius, mask, destination)
    for name, sigma in (("sigma_xy", sigma_xy), ("sigma_rgb", sigma_rgb)):
        check_positive(name, sigma)
    options = {
        "radius": radius,
        "sigma_xy": sigma_xy,
        "sigma_rgb": sigma_rgb,
        "mask": mask,
        "destination": destination,
    }
    return backends.select("gated_crf", prob, image, **options)(prob, image, **options)


def _check(prob: Tensor, image: Tensor, radius: int, mask: Tensor | None, destination: Tensor | None) -> None:
    check_tensor("prob", prob, dims="(B, C, H, W)", floating=True)
    check_tensor("image", image, dims="(B, c, H, W)", device=prob.device)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {describe(image)}, expected torch.uint8, or a floating dtype in [0, 1]")
    batch, _, height, width = prob.shape
    check_shape("image", image, (batch, image.shape[1], height, width), "the pixels of prob")
    check_number("radius", radius, low=1, high=MAX_RADIUS, integer=True)
    for name, gate in (("mask", mask), ("destination", destination)):
        if gate is not None:
            check_tensor(name, gate, dims="(B, H, W)", dtypes=(torch.bool,), device=prob.device)
            check_shape(name, gate, (batch, height, width), "the pixels of prob")
    check_colors(image, mask)
