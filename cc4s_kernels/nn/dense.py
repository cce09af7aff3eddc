"""Losses on the fully connected graph of all pixels: dense CRF, normalised cut and kernel cut.

With S the softmax probabilities and K the kernel of `cc4s_kernels.bilateral_filter` on the pixels of one image, both
at `scale` times the size of the image, all exact and in O(N) memory:

    dense CRF       -sum_k S_k' K S_k / number of pixels
    normalised cut  sum_k S_k' K (1 - S_k) / (d' S_k),  d = K 1
    kernel cut      their weighted sum

Reductions and normalisers are those of `cc4s_kernels.nn.losses`; what is counted are images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cc4s_kernels import _library
from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels._validation import check_number, check_pixel_mask, check_positive, check_shape, check_tensor, describe
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, divide, reduce
from cc4s_kernels.ops.bilateral_filter import bilateral_filter, check_image

# S (B, C, H, W) and K S -> S_k' K S_k (B, C). Its gradient 2 K S is at hand: no second filter. The backward op takes
# S only to refuse its own gradient, which would need one.
_library.LIBRARY.define("kernel_forms(Tensor prob, Tensor filtered) -> Tensor")
_library.LIBRARY.define("kernel_forms_backward(Tensor gradient, Tensor prob, Tensor filtered) -> Tensor")


def _forms(prob: Tensor, filtered: Tensor) -> Tensor:
    return (prob * filtered).sum((2, 3))


def _forms_backward(gradient: Tensor, prob: Tensor, filtered: Tensor) -> Tensor:
    return 2 * gradient[:, :, None, None] * filtered


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.cc4s_kernels.kernel_forms_backward(gradient, *ctx.saved_tensors), None


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("DenseCRFLoss, NormalizedCutLoss and KernelCutLoss have no second derivatives")


_library.register("kernel_forms", _forms, lambda p, f: p.new_empty(p.shape[:2]), _gradients, _setup_context)
_library.register("kernel_forms_backward", _forms_backward, lambda g, p, f: torch.empty_like(f), _no_second_derivative)


class _DenseLoss(BatchLoss):
    """Probabilities and image at the reduced size, filtered."""

    def __init__(
        self,
        sigma_xy: float = 100.0,
        sigma_rgb: float = 15.0,
        scale: float = 0.5,
        *,
        include_self: bool = False,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_positive("sigma_xy", sigma_xy)
        check_positive("sigma_rgb", sigma_rgb)
        check_number("scale", scale, low=0, high=1)
        if scale == 0:
            raise ValueError("scale: got 0, expected a value in (0, 1]")
        if not isinstance(include_self, bool):
            raise TypeError(f"include_self: got {describe(include_self)}, expected a bool")
        self.sigma_xy = sigma_xy
        self.sigma_rgb = sigma_rgb
        self.scale = scale
        self.include_self = include_self
        self.align_corners = align_corners

    def forward(
        self, logits: Tensor, image: Tensor, mask: Tensor | None = None, *, normalizer: Normalizer = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            image: (B, 3, H, W) uint8 RGB before normalisation, or floating in [0, 1]; grey as one channel or
                three.
            mask: (B, H, W) bool, False = no pixel (padding).
            normalizer: global number of images.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits). An image without a valid
            pixel has loss 0 with gradient 0.

        Raises:
            TypeError, ValueError: as `cc4s_kernels.bilateral_filter`.
        """
        normalizer = self._given_or_own(normalizer)
        energy = self._energy(*self._filtered(logits, image, mask))
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    def count(self, logits: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(logits.shape[0]), device=logits.device)

    def _filtered(self, logits: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S (B, C, H', W'), the valid pixels as 1 (B, 1, H', W'), and S_k' K S_k and d' S_k (B, C)."""
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        check_tensor("image", image, dims="(B, 3, H, W)", device=logits.device)
        batch, channels, height, width = image.shape
        check_shape("image", image, (logits.shape[0], 1 if channels == 1 else 3, height, width), "the batch of logits")
        image = image.expand(-1, 3, -1, -1)
        check_pixel_mask(mask, (batch, height, width), image.device)
        check_image(image, (batch, 3, height, width), image.device, mask)
        size = [max(1, int(side * self.scale)) for side in (height, width)]
        with without_autocast(logits.device):
            prob = logits.to(accumulation_dtype(logits.dtype))
            # Probabilities at the size of the image, then reduced, as in the released code.
            if prob.shape[2:] != image.shape[2:]:
                prob = interpolate(prob, (height, width), mode="bilinear", align_corners=self.align_corners)
            prob = prob.softmax(1)
            if size != [height, width]:
                prob = interpolate(prob, size, mode="bilinear", align_corners=False)
                image = interpolate(image, size, mode="nearest")
                mask = None if mask is None else interpolate(mask[:, None].to(torch.uint8), size)[:, 0] != 0
            valid = torch.ones_like(prob[:, :1]) if mask is None else mask[:, None].to(prob.dtype)
            if mask is not None:
                prob = prob.masked_fill(~mask[:, None], 0.0)
            filtered = bilateral_filter(
                torch.cat([prob.detach(), valid], 1),
                image,
                sigma_xy=self.sigma_xy * self.scale,
                sigma_rgb=self.sigma_rgb,
                mask=mask,
                include_self=self.include_self,
            )
            forms: Tensor = torch.ops.cc4s_kernels.kernel_forms(prob, filtered[:, :-1].contiguous())
            return prob, valid, forms, (prob * filtered[:, -1:]).sum((2, 3))

    def _energy(self, prob: Tensor, valid: Tensor, forms: Tensor, degrees: Tensor) -> Tensor:
        """(B,)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"sigma_xy={self.sigma_xy}, sigma_rgb={self.sigma_rgb}, scale={self.scale}, reduction={self.reduction!r}"


def _crf_energy(valid: Tensor, forms: Tensor) -> Tensor:
    return divide(-forms.sum(1), valid.sum((1, 2, 3)))


def _cut_energy(forms: Tensor, degrees: Tensor) -> Tensor:
    # S' K 1 - S' K S over S' d; a class that is nowhere has no cut. Subnormal numbers are nowhere too: 1 / d would be
    # infinite in the gradient.
    return divide(degrees - forms, degrees.where(degrees > 1e-30, 0)).sum(1)


class DenseCRFLoss(_DenseLoss):
    """Relaxed energy of a dense CRF: -sum_k S_k' K S_k over the number of pixels.

    Args:
        sigma_xy: standard deviation of positions in pixels of the image; it shrinks with `scale`.
        sigma_rgb: standard deviation of colours in levels 0..255.
        scale: in (0, 1]; probabilities (bilinear) and image and mask (nearest) are reduced to that share of the
            image's size.
        include_self: whether the pair of a pixel with itself counts, as it does in the lattice of the released code.
        align_corners: of the upsampling of the logits to the image.
        reduction, normalizer: see `cc4s_kernels.nn.losses`; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.

    Source: M. Tang et al., "On Regularized Losses for Weakly-supervised CNN Segmentation", 2018. Their code divides
    by the number of images, not of pixels, and has the weight 2e-9 for it.
    """

    def _energy(self, prob: Tensor, valid: Tensor, forms: Tensor, degrees: Tensor) -> Tensor:
        return _crf_energy(valid, forms)


class NormalizedCutLoss(_DenseLoss):
    """Relaxed normalised cut: sum_k S_k' K (1 - S_k) / (d' S_k) with d = K 1, between 0 and the number of classes.

    Arguments as in `DenseCRFLoss`.

    Source: M. Tang et al., "Normalized Cut Loss for Weakly-supervised CNN Segmentation", 2018.
    """

    def _energy(self, prob: Tensor, valid: Tensor, forms: Tensor, degrees: Tensor) -> Tensor:
        return _cut_energy(forms, degrees)


class KernelCutLoss(_DenseLoss):
    """Kernel cut: `normalized_cut` * `NormalizedCutLoss` + `dense_crf` * `DenseCRFLoss`, with one filter for both.

    Args:
        normalized_cut, dense_crf: weights of the two terms.
        sigma_xy, ..., normalizer: as in `DenseCRFLoss`, for both terms.

    Source: M. Tang et al., "On Regularized Losses for Weakly-supervised CNN Segmentation", 2018.
    """

    def __init__(
        self,
        sigma_xy: float = 100.0,
        sigma_rgb: float = 15.0,
        scale: float = 0.5,
        *,
        normalized_cut: float = 1.0,
        dense_crf: float = 1.0,
        include_self: bool = False,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(
            sigma_xy,
            sigma_rgb,
            scale,
            include_self=include_self,
            align_corners=align_corners,
            reduction=reduction,
            normalizer=normalizer,
        )
        check_number("normalized_cut", normalized_cut, low=0)
        check_number("dense_crf", dense_crf, low=0)
        self.normalized_cut = normalized_cut
        self.dense_crf = dense_crf

    def _energy(self, prob: Tensor, valid: Tensor, forms: Tensor, degrees: Tensor) -> Tensor:
        return self.normalized_cut * _cut_energy(forms, degrees) + self.dense_crf * _crf_energy(valid, forms)
