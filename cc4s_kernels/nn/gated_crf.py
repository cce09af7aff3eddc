"""Gated CRF loss: pixels of one window and similar colour should have the same class."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels._validation import check_number, check_positive, check_tensor
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, reduce
from cc4s_kernels.nn.losses import upsampled_probabilities
from cc4s_kernels.ops.gated_crf import MAX_RADIUS, gated_crf


class GatedCRFLoss(BatchLoss):
    """Gated CRF energy of softmax probabilities at the size of the image: `cc4s_kernels.gated_crf`.

    The mean is over the images of the batch. The authors' release averages over all destinations of the batch: the
    same where each image has as many. It runs at the network's resolution, on an image reduced to it: pass such an
    image for that.

    Args:
        radius, sigma_xy, sigma_rgb: as in `cc4s_kernels.gated_crf`.
        align_corners: of the upsampling.
        reduction, normalizer: see `cc4s_kernels.nn.losses`; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.

    Source: A. Obukhov et al., "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation", 2019.
    """

    def __init__(
        self,
        radius: int = 5,
        sigma_xy: float = 6.0,
        sigma_rgb: float = 0.1,
        *,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_number("radius", radius, low=1, high=MAX_RADIUS, integer=True)
        for name, sigma in (("sigma_xy", sigma_xy), ("sigma_rgb", sigma_rgb)):
            check_positive(name, sigma)
        self.radius = radius
        self.sigma_xy = sigma_xy
        self.sigma_rgb = sigma_rgb
        self.align_corners = align_corners

    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        destination: Tensor | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            image: (B, c, H, W) uint8 before normalisation, or floating in [0, 1].
            mask: (B, H, W) bool, False = no pixel (padding).
            destination: (B, H, W) bool, the pixels whose energy counts, such as the unlabelled ones; default: all.
            normalizer: global number of images.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: as `cc4s_kernels.gated_crf`.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        check_tensor("image", image, dims="(B, c, H, W)", device=logits.device)
        energy = gated_crf(
            upsampled_probabilities(logits, image.shape[2:], self.align_corners),
            image,
            radius=self.radius,
            sigma_xy=self.sigma_xy,
            sigma_rgb=self.sigma_rgb,
            mask=mask,
            destination=destination,
        )
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    def count(self, logits: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(logits.shape[0]), device=logits.device)

    def extra_repr(self) -> str:
        return (
            f"radius={self.radius}, sigma_xy={self.sigma_xy}, sigma_rgb={self.sigma_rgb}, reduction={self.reduction!r}"
        )
