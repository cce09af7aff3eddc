"""Losses against soft labels: collision cross-entropy, and the labels of random walkers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels._validation import (
    INTEGER_DTYPES,
    check_number,
    check_pixel_mask,
    check_shape,
    check_tensor,
    describe,
    may_read_values,
    value_range,
)
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, divide, reduce
from cc4s_kernels.nn.losses import upsampled_probabilities
from cc4s_kernels.ops.potts.reference import negative_log
from cc4s_kernels.ops.random_walker import random_walker


class CollisionCrossEntropyLoss(BatchLoss):
    """-ln~ sum_k p_k y_k: how likely a draw from the prediction and one from the soft label differ.

    ln~ is that of docs/method.md section 7 (finite for opposite one-hots). Where y is uniform the loss is constant:
    an uncertain label teaches nothing. The mean is over pixels that have a label.

    Source: Z. Zhang and Y. Boykov, "Collision Cross-Entropy for Soft Class Labels and Deep Clustering", 2024.

    Args:
        align_corners: of the upsampling.
        reduction, normalizer: see `cc4s_kernels.nn.losses`; counts labelled pixels.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    def __init__(self, *, align_corners: bool = True, reduction: str = "mean", normalizer: Normalizer = None) -> None:
        super().__init__(reduction, normalizer)
        self.align_corners = align_corners

    def forward(
        self, logits: Tensor, target: Tensor, mask: Tensor | None = None, *, normalizer: Normalizer = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating; upsampled to the target.
            target: (B, C, H, W) floating, distributions over classes; all 0 = no label.
            mask: (B, H, W) bool, False = does not count.
            normalizer: global count; see `cc4s_kernels.nn.losses`.

        Returns:
            Scalar, or (B,) sums for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        check_tensor("target", target, dims="(B, C, H, W)", floating=True, device=logits.device)
        check_shape("target", target, (*logits.shape[:2], *target.shape[2:]), "the batch and classes of logits")
        counted = self._counted(target, mask)
        prob = upsampled_probabilities(logits, target.shape[2:], self.align_corners)
        with without_autocast(logits.device):
            value = negative_log((prob * target.to(prob.dtype)).sum(1)).where(counted, 0)
        return reduce(value.sum((1, 2)), counted.sum((1, 2), dtype=value.dtype), self.reduction, normalizer)

    @staticmethod
    def _counted(target: Tensor, mask: Tensor | None) -> Tensor:
        check_pixel_mask(mask, (target.shape[0], *target.shape[2:]), target.device)
        # A NaN is no missing label: the loss shows it.
        labelled = target.sum(1) != 0
        return labelled if mask is None else labelled & mask

    def count(self, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """What "mean" divides by: the number of labelled pixels, 0-d float32, local."""
        check_tensor("target", target, dims="(B, C, H, W)", floating=True)
        return self._counted(target, mask).sum(dtype=torch.float32)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class RandomWalkerLoss(BatchLoss):
    """Cross-entropy against the labels that random walkers carry from the scribbles to all pixels.

    With y from `cc4s_kernels.random_walker` and p the prediction, an image costs the mean over the pixels that a
    scribble reaches of exp(-alpha H(y)) * -sum_k y_k ln p_k: where walkers disagree, little is asked. The mean is over
    images; one without a scribble costs 0. Gradients reach a floating `image` too (y and H depend on it): features of
    a network learn where the walk should stop.

    Source: P. Vernaza and M. Chandraker, "Learning random-walk label propagation for weakly-supervised semantic
    segmentation", CVPR 2017; docs/methods.md says what differs.

    Args:
        beta: of `cc4s_kernels.random_walker`.
        alpha: how fast the weight falls with the entropy; 0 weights all pixels the same.
        stride: the walk is on cells of stride x stride pixels: of their mean colour, and seeded where all their
            labelled pixels agree.
        ignore_index: the label of unlabelled pixels.
        align_corners: of the upsampling.
        reduction, normalizer: see `cc4s_kernels.nn.losses`; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    def __init__(
        self,
        beta: float = 130.0,
        alpha: float = 1.0,
        *,
        stride: int = 1,
        ignore_index: int = 255,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_number("beta", beta, low=0)
        check_number("alpha", alpha, low=0)
        check_number("stride", stride, low=1, integer=True)
        check_number("ignore_index", ignore_index, integer=True)
        self.beta = beta
        self.alpha = alpha
        self.stride = stride
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def propagate(self, image: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
        """The soft labels (B, C, ceil(H / stride), ceil(W / stride)) of `forward`; all 0 = none."""
        check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES)
        check_tensor("image", image, dims="(B, any, H, W)", device=labels.device)
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"image: got {describe(image)}, expected torch.uint8 or a floating dtype")
        batch, height, width = labels.shape
        check_shape("image", image, (batch, image.shape[1], height, width), "the pixels of labels")
        check_pixel_mask(mask, labels.shape, labels.device)
        if labels.numel() and may_read_values(labels):
            low, high = value_range(labels, skip=self.ignore_index)
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"labels: got classes from {low:.0f} to {high:.0f}, expected 0 to {num_classes - 1}, or"
                    f" {self.ignore_index} for none"
                )
        if self.stride > 1:
            image, labels, mask = _cells(image, labels, mask, self.stride, self.ignore_index)
        return random_walker(image, labels, num_classes, beta=self.beta, mask=mask, ignore_index=self.ignore_index)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            labels: (B, H, W) integer.
            image: (B, any, H, W) uint8 or floating: colours or features.
            mask: (B, H, W) bool, False = no pixel (padding).
            normalizer: global number of images; see `cc4s_kernels.nn.losses`.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError, RuntimeError: as `cc4s_kernels.random_walker`.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES, device=logits.device)
        check_shape("labels", labels, (logits.shape[0], *labels.shape[1:]), "the batch of logits")
        dtype = accumulation_dtype(logits.dtype)
        target = self.propagate(image, labels, logits.shape[1], mask).to(dtype)
        with without_autocast(logits.device):
            prediction = interpolate(
                logits.to(dtype), target.shape[2:], mode="bilinear", align_corners=self.align_corners
            )
            reached = target.detach().sum(1) > 0.5
            # The derivative of t ln t is infinite at 0: it must not see it.
            entropy = -(target * target.clamp(min=1e-12).log()).sum(1)
            confidence = torch.exp(-self.alpha * entropy)
            cross_entropy = -(target * prediction.log_softmax(1)).sum(1)
            sums = (confidence * cross_entropy).where(reached, 0).sum((1, 2))
            energy = divide(sums, reached.sum((1, 2), dtype=sums.dtype))
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    def count(self, image: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(image.shape[0]), device=image.device)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, alpha={self.alpha}, stride={self.stride}, reduction={self.reduction!r}"


def _cells(
    image: Tensor, labels: Tensor, mask: Tensor | None, stride: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image, labels and mask on cells of stride x stride pixels; the last ones may be smaller."""
    with without_autocast(image.device):
        value = image.to(accumulation_dtype(image.dtype))
        if image.dtype == torch.uint8:
            value = value / 255
        known = labels.long() != ignore_index
        if mask is not None:
            inside = mask[:, None].to(value.dtype)
            known = known & mask
            share = avg_pool2d(inside, stride, ceil_mode=True)
            value = avg_pool2d(value * inside, stride, ceil_mode=True) / share.where(share > 0, 1)
            mask = share[:, 0] > 0
        else:
            value = avg_pool2d(value, stride, ceil_mode=True)
        # Classes are exact in float32; a cell without a label has the highest -1 and the lowest "infinity".
        classes = labels[:, None].float()
        known = known[:, None]
        highest = max_pool2d(classes.where(known, -1), stride, ceil_mode=True)[:, 0]
        lowest = -max_pool2d((-classes).where(known, -torch.inf), stride, ceil_mode=True)[:, 0]
        agreed = highest == lowest
        return value, highest.long().where(agreed, ignore_index), mask
