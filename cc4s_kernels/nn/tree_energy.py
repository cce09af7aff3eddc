"""Tree energy loss: predictions should equal their means along the trees of the image and of its features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels._validation import check_positive, check_shape, check_tensor, describe
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, divide, reduce
from cc4s_kernels.ops.tree_filter import tree_filter


class TreeEnergyLoss(BatchLoss):
    """L1 distance of softmax probabilities and soft pseudo-labels from `cc4s_kernels.tree_filter`, in cascade.

    At the resolution of the logits: pseudo = filter(prob, image, sigma), and with features
    pseudo = filter(pseudo, features, 1). Per image, sum over unlabelled pixels and classes of |prob - pseudo| over the
    number of these pixels; the mean is over the images of the batch (the authors' release divides by the unlabelled
    pixels of the batch: the same where each image has as many).

    Args:
        sigma: of the tree of the image, in units of squared colour distance.
        detach: the pseudo-labels are constants; with False they pass the gradient on, to the features too.
        reduction, normalizer: see `cc4s_kernels.nn.losses`; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.

    Source: Z. Liang et al., "Tree Energy Loss: Towards Sparsely Annotated Semantic Segmentation", 2022.
    """

    def __init__(
        self,
        sigma: float = 0.02,
        *,
        detach: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_positive("sigma", sigma)
        if not isinstance(detach, bool):
            raise TypeError(f"detach: got {describe(detach)}, expected a bool")
        self.sigma = sigma
        self.detach = detach

    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        features: Tensor | None = None,
        *,
        unlabelled: Tensor | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            image: (B, c, H, W) uint8, or floating (normalised or not: sigma is in its units); resized to h x w.
            features: (B, d, h', w') floating; resized to h x w. None: the tree of the image alone.
            unlabelled: (B, H, W) bool, the pixels that count (not labelled, no padding), at any size; default: all.
            normalizer: global number of images.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits). An image without an unlabelled
            pixel has loss 0 with gradient 0.

        Raises:
            TypeError, ValueError: as `cc4s_kernels.tree_filter`.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        check_tensor("image", image, dims="(B, c, H, W)", device=logits.device)
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"image: got {describe(image)}, expected torch.uint8 or a floating dtype")
        if features is not None:
            check_tensor("features", features, dims="(B, d, h, w)", floating=True, device=logits.device)
        with without_autocast(logits.device):
            dtype = accumulation_dtype(logits.dtype)
            prob = logits.to(dtype).softmax(1)
            weight = self._weight(prob, unlabelled)
            colors = image.to(dtype) / (1 if image.is_floating_point() else 255)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                pseudo = tree_filter(prob, self._resized(colors, prob), sigma=self.sigma)
                if features is not None:
                    pseudo = tree_filter(pseudo, self._resized(features.to(dtype), prob), sigma=1.0)
            distance = ((prob - pseudo).abs().sum(1) * weight).sum((1, 2))
            energy = divide(distance, weight.sum((1, 2)))
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    @staticmethod
    def _resized(guide: Tensor, prob: Tensor) -> Tensor:
        if guide.shape[2:] == prob.shape[2:]:
            return guide
        return interpolate(guide, prob.shape[2:], mode="bilinear", align_corners=False)

    @staticmethod
    def _weight(prob: Tensor, unlabelled: Tensor | None) -> Tensor:
        """(B, h, w): 1 for the pixels that count."""
        if unlabelled is None:
            return torch.ones_like(prob[:, 0])
        check_tensor("unlabelled", unlabelled, dims="(B, H, W)", dtypes=(torch.bool,), device=prob.device)
        check_shape("unlabelled", unlabelled, (prob.shape[0], *unlabelled.shape[1:]), "the batch of logits")
        return interpolate(unlabelled[:, None].to(prob.dtype), prob.shape[2:])[:, 0]

    def count(self, logits: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(logits.shape[0]), device=logits.device)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, detach={self.detach}, reduction={self.reduction!r}"
