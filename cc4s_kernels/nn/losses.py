"""Losses for sparse labels: partial cross-entropy, soft entropy, colour constraint, Potts, and all in one.

They take logits at the network's resolution; the upsampling to the labels happens inside, in
`cc4s_kernels.upsample_losses`. Every loss has

- `reduction`: "mean" over the whole batch (what is averaged over stands with each loss), "sum", or "none":
  one sum per image, (B,). A mean over nothing (no labelled pixel, no weight, no edge) is 0 with gradient 0.
- `normalizer`, in the constructor or in `forward` (which wins), for "mean" only: the count that the mean
  divides by, taken over the global batch. The loss is then world size * local sum / normalizer, so that the
  gradients that DistributedDataParallel averages over the processes, summed over micro-batches, are those of
  one process with the whole batch. `count` of each loss gives the local count, which needs no logits; add it
  up over the micro-batches and pass it through `global_count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels._validation import (
    INTEGER_DTYPES,
    check_choice,
    check_colors,
    check_number,
    check_pixel_mask,
    check_shape,
    check_tensor,
    describe,
)
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, check_reduction, global_count, reduce
from cc4s_kernels.ops.color_affinity import SuperpixelGraph, color_affinity
from cc4s_kernels.ops.potts import NORMS, RELAXATIONS, PixelGrid, potts
from cc4s_kernels.ops.slic import slic
from cc4s_kernels.ops.superpixel_boundaries import superpixel_boundaries
from cc4s_kernels.ops.upsample_losses import upsample_losses

ID_DTYPES = (torch.int16, torch.int32, torch.int64)


def _class_weight_buffer(value: Tensor | Sequence[float] | None) -> Tensor | None:
    if value is None:
        return None
    weight = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
    check_tensor("class_weight", weight, dims="(C,)", floating=True)
    return weight.detach().clone()


def _ignore_outside(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Labels with `ignore_index` where the mask is False."""
    if mask is None:
        return labels
    if labels.dtype == torch.uint8 and not 0 <= ignore_index <= 255:
        labels = labels.to(torch.int16)
    return labels.masked_fill(~mask, ignore_index)


def _labelled_count(labels: Tensor, mask: Tensor | None, ignore_index: int, class_weight: Tensor | None) -> Tensor:
    """Number of labelled pixels inside the mask, or the sum of their class weights: 0-d float32."""
    # Compared with a uint8 tensor, -1 would be 255.
    labelled = labels.long() != ignore_index
    if mask is not None:
        labelled = labelled & mask
    if class_weight is None:
        return labelled.sum(dtype=torch.float32)
    # A label out of range, where nobody could look at it, counts as ignored here as in the op.
    labelled = labelled & (labels >= 0) & (labels < len(class_weight))
    index = labels.long().where(labelled, 0)
    return class_weight.float()[index].where(labelled, 0).sum()


def _no_labels(logits: Tensor, size: Sequence[int]) -> tuple[Tensor, int]:
    """Labels for a call that needs none, and their ignore_index; takes no memory."""
    labels = torch.full((1, 1, 1), -1, dtype=torch.int32, device=logits.device)
    return labels.expand(logits.shape[0], *size), -1


def _rgb(image: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 from uint8 or floating in [0, 1], three channels or one."""
    check_tensor("image", image, dims="(B, 3, H, W)")
    if image.shape[1] not in (1, 3):
        raise ValueError(f"image: got {describe(image)}, expected 3 channels (RGB) or 1 (grey)")
    if image.is_floating_point():
        check_colors(image)
        image = (image.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise TypeError(f"image: got {describe(image)}, expected uint8 or floating in [0, 1]")
    return image.expand(-1, 3, -1, -1)


def _inside(superpixels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Superpixels with -1 where the mask is False."""
    if superpixels is None or mask is None:
        return superpixels
    return superpixels.masked_fill(~mask, -1)


def _entropy_weight(weight: Tensor | None, superpixels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The map m of docs/method.md section 4; None = 1 everywhere. `superpixels` has -1 outside the mask."""
    if weight is None and superpixels is not None:
        return (superpixels >= 0) & ~superpixel_boundaries(superpixels)
    if mask is None:
        return weight
    return mask if weight is None else weight.masked_fill(~mask, 0)


class PartialCrossEntropyLoss(BatchLoss):
    """Cross-entropy over labelled pixels only (docs/method.md section 3).

    The mean is over labelled pixels of the batch; with class weights, over the sum of their weights, as in
    `torch.nn.CrossEntropyLoss`.

    Args:
        ignore_index: the label of unlabelled pixels.
        class_weight: (C,) non-negative weights, or None.
        align_corners: of the upsampling.
        reduction, normalizer: see the module; counts labelled pixels (their weights).

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weight: Tensor | Sequence[float] | None = None,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_number("ignore_index", ignore_index, integer=True)
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.register_buffer("class_weight", _class_weight_buffer(class_weight))

    def forward(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, normalizer: Normalizer = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            labels: (B, H, W) uint8, int16, int32 or int64.
            mask: (B, H, W) bool, False = no pixel (padding): its label does not count.
            normalizer: global count; see the module.

        Returns:
            Scalar, or (B,) sums for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: as `cc4s_kernels.upsample_losses`.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES)
        check_pixel_mask(mask, labels.shape, labels.device)
        out = upsample_losses(
            logits,
            _ignore_outside(labels, mask, self.ignore_index),
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            class_weight=self.class_weight,
        )
        return reduce(out.cross_entropy, out.labelled, self.reduction, normalizer)

    def count(self, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """What "mean" divides by, for these labels: 0-d float32, local."""
        check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES)
        check_pixel_mask(mask, labels.shape, labels.device)
        return _labelled_count(labels, mask, self.ignore_index, self.class_weight)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SoftEntropyLoss(BatchLoss):
    """Entropy of the predictions, weighted by a map (docs/method.md section 4).

    The map m is, in this order: `weight` where it is given; else, with `superpixels`, 1 inside and 0 on
    boundaries between superpixels and on pixels without one; else 1. It is 0 where `mask` is False. The mean is
    the sum of m H over the sum of m.

    Args:
        align_corners: of the upsampling.
        reduction, normalizer: see the module; counts the sum of m.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    def __init__(self, *, align_corners: bool = True, reduction: str = "mean", normalizer: Normalizer = None) -> None:
        super().__init__(reduction, normalizer)
        self.align_corners = align_corners

    def forward(
        self,
        logits: Tensor,
        weight: Tensor | None = None,
        *,
        superpixels: Tensor | None = None,
        mask: Tensor | None = None,
        size: tuple[int, int] | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss at the size of the map, else at `size`, else at that of `logits`.

        Args:
            logits: (B, C, h, w) floating.
            weight: (B, H, W) floating and non-negative, or bool.
            superpixels: (B, H, W) integer ids, -1 = none.
            mask: (B, H, W) bool, False = no pixel (padding).
            size: (H, W), where no map is given.
            normalizer: global count; see the module.

        Returns:
            Scalar, or (B,) sums for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: as `cc4s_kernels.upsample_losses`.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        maps = [m for m in (weight, superpixels, mask) if m is not None]
        if maps:
            size = (maps[0].shape[-2], maps[0].shape[-1])
        labels, ignore_index = _no_labels(logits, size or logits.shape[-2:])
        out = upsample_losses(
            logits,
            labels,
            weight=self._map(weight, superpixels, mask),
            ignore_index=ignore_index,
            align_corners=self.align_corners,
        )
        return reduce(out.entropy, out.weight, self.reduction, normalizer)

    @staticmethod
    def _map(weight: Tensor | None, superpixels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        for m in (weight, superpixels):
            if m is not None:
                check_pixel_mask(mask, m.shape, m.device)
        return _entropy_weight(weight, _inside(superpixels, mask), mask)

    def count(
        self, weight: Tensor | None = None, *, superpixels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What "mean" divides by: the sum of m, 0-d float32, local.

        Raises:
            ValueError: no map at all; the count is then the number of pixels.
        """
        m = self._map(weight, superpixels, mask)
        if m is None:
            raise ValueError("weight: got None with neither superpixels nor mask, expected one of them")
        return m.sum(dtype=torch.float32)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class _RegionEnergy(nn.Module):
    """Options of the colour energy on superpixels, and how it is computed from pooled probabilities."""

    def __init__(
        self, num_superpixels: int, compactness: float, norm: str, relaxation: str, max_edges: int | None
    ) -> None:
        super().__init__()
        if max_edges is not None:
            check_number("max_edges", max_edges, low=0, integer=True)
        check_number("num_superpixels", num_superpixels, low=1, integer=True)
        check_number("compactness", compactness, low=0, high=100)
        check_choice("norm", norm, NORMS)
        check_choice("relaxation", relaxation, RELAXATIONS)
        self.num_superpixels = num_superpixels
        self.compactness = compactness
        self.norm = norm
        self.relaxation = relaxation
        self.max_edges = max_edges

    def segment(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, W) int32 superpixels of the image."""
        with torch.no_grad():
            return slic(image, self.num_superpixels, compactness=self.compactness, mask=mask)

    def forward(self, pooled: Tensor, counts: Tensor, image: Tensor, superpixels: Tensor) -> Tensor:
        """(B,) energies."""
        with torch.no_grad():
            graph = color_affinity(image, superpixels.to(torch.int32), self.num_superpixels, max_edges=self.max_edges)
        return potts(_region_mean(pooled, counts), graph, relaxation=self.relaxation, norm=self.norm)

    def extra_repr(self) -> str:
        return (
            f"num_superpixels={self.num_superpixels}, compactness={self.compactness}, "
            f"norm={self.norm!r}, relaxation={self.relaxation!r}"
        )


def _region_mean(pooled: Tensor, counts: Tensor) -> Tensor:
    """Mean class probabilities (B, K, C) from sums; uniform for absent superpixels, which have no edges."""
    counts = counts[..., None]
    present = counts > 0
    return torch.where(present, pooled / counts.where(present, 1), 1 / pooled.shape[-1])


class ColorConstraintLoss(BatchLoss):
    """Superpixels of similar colour and texture should have similar classes (docs/method.md section 7).

    L_color per image = (1 / norm) sum over edges of 2 w_ij |S_i - S_j|², with S the mean probabilities of the
    superpixels and w the colour affinity of neighbours; the mean is over the images of the batch. Another
    `relaxation` r puts 4 r(S_i, S_j) in the place of 2 |S_i - S_j|² (r = |S_i - S_j|² / 2 is the quadratic
    one).

    Args:
        num_superpixels: K of SLIC; ids of superpixels that are passed in must be below it.
        compactness: of SLIC, where the superpixels are computed here.
        norm: "sum", the sum of w over ordered pairs (a weighted mean), "frobenius", the norm of the matrix w,
            or "none", 1.
        relaxation: as in `cc4s_kernels.potts`.
        max_edges: as in `cc4s_kernels.color_affinity`, for superpixels of one's own that are not connected.
        align_corners: of the upsampling.
        reduction, normalizer: see the module; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    def __init__(
        self,
        num_superpixels: int = 800,
        compactness: float = 10.0,
        norm: str = "sum",
        relaxation: str = "quadratic",
        *,
        max_edges: int | None = None,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        self.regions = _RegionEnergy(num_superpixels, compactness, norm, relaxation, max_edges)
        self.align_corners = align_corners

    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        superpixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating.
            image: (B, 3, H, W) uint8 RGB before normalisation, or floating in [0, 1]; grey as one channel or
                three.
            superpixels: (B, H, W) int32, -1 = none; computed by `cc4s_kernels.slic` where None.
            mask: (B, H, W) bool, False = no pixel (padding).
            normalizer: global number of images; see the module.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: as the ops `slic`, `color_affinity` and `upsample_losses`.
        """
        normalizer = self._given_or_own(normalizer)
        image = _rgb(image)
        size = (image.shape[0], *image.shape[2:])
        check_pixel_mask(mask, size, image.device)
        if superpixels is None:
            superpixels = self.regions.segment(image, mask)
        else:
            check_tensor("superpixels", superpixels, dims="(B, H, W)", dtypes=ID_DTYPES)
            check_shape("superpixels", superpixels, size, "the pixels of image")
            superpixels = _inside(superpixels, mask)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        labels, ignore_index = _no_labels(logits, image.shape[2:])
        out = upsample_losses(
            logits,
            labels,
            superpixels=superpixels,
            num_superpixels=self.regions.num_superpixels,
            ignore_index=ignore_index,
            align_corners=self.align_corners,
        )
        energy = self.regions(out.pooled, out.counts, image, superpixels)
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    def count(self, image: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(image.shape[0]), device=image.device)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class PottsLoss(BatchLoss):
    """Potts energy of softmax probabilities on a superpixel graph or a pixel grid (docs/method.md section 7).

    The mean is over the images of the batch. For probabilities that are at hand use `cc4s_kernels.potts`.

    Args:
        relaxation, norm: as in `cc4s_kernels.potts`.
        align_corners: of the upsampling.
        reduction, normalizer: see the module; counts images.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    def __init__(
        self,
        relaxation: str = "quadratic",
        norm: str = "sum",
        *,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_choice("relaxation", relaxation, RELAXATIONS)
        check_choice("norm", norm, NORMS)
        self.relaxation = relaxation
        self.norm = norm
        self.align_corners = align_corners

    def forward(
        self,
        logits: Tensor,
        graph_or_grid: SuperpixelGraph | PixelGrid,
        superpixels: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: (B, C, h, w) floating; upsampled to the superpixels or to the grid.
            graph_or_grid: a `SuperpixelGraph` from `cc4s_kernels.color_affinity`, or a `PixelGrid`.
            superpixels: (B, H, W), those of the graph; with a graph only.
            normalizer: global number of images; see the module.

        Returns:
            Scalar, or (B,) for reduction "none"; float32 (float64 for float64 logits).

        Raises:
            TypeError, ValueError: as the ops `upsample_losses` and `potts`; superpixels that are missing, or
                given with a grid.
        """
        normalizer = self._given_or_own(normalizer)
        check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
        if isinstance(graph_or_grid, SuperpixelGraph):
            check_tensor("superpixels", superpixels, dims="(B, H, W)", dtypes=ID_DTYPES)
            assert superpixels is not None
            labels, ignore_index = _no_labels(logits, superpixels.shape[1:])
            out = upsample_losses(
                logits,
                labels,
                superpixels=superpixels,
                num_superpixels=graph_or_grid.num_nodes,
                ignore_index=ignore_index,
                align_corners=self.align_corners,
            )
            prob = _region_mean(out.pooled, out.counts)
        elif superpixels is not None:
            raise ValueError("superpixels: got a tensor with a grid, expected it with a SuperpixelGraph only")
        elif not isinstance(graph_or_grid, PixelGrid):
            raise TypeError(f"graph_or_grid: got {describe(graph_or_grid)}, expected a SuperpixelGraph or a PixelGrid")
        else:
            prob = upsampled_probabilities(logits, graph_or_grid.weight.shape[2:], self.align_corners)
        energy = potts(prob, graph_or_grid, relaxation=self.relaxation, norm=self.norm)
        return reduce(energy, torch.ones_like(energy), self.reduction, normalizer)

    def count(self, logits: Tensor) -> Tensor:
        """What "mean" divides by: the number of images, 0-d float32, local."""
        return torch.tensor(float(logits.shape[0]), device=logits.device)

    def extra_repr(self) -> str:
        return f"relaxation={self.relaxation!r}, norm={self.norm!r}, reduction={self.reduction!r}"


def upsampled_probabilities(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """(B, C, H, W) in the accumulation dtype."""
    with without_autocast(logits.device):
        logits = logits.to(accumulation_dtype(logits.dtype))
        return interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners).softmax(1)


class Counts(NamedTuple):
    """What the three means of `ScribbleLoss` divide by: scalars, as numbers or 0-d tensors.

    labelled: labelled pixels (sum of their class weights). weight: sum of the entropy map. images: their
        number.
    """

    labelled: float | Tensor
    weight: float | Tensor
    images: float | Tensor


def global_counts(counts: Sequence[Counts]) -> Counts:
    """Adds up the counts of all micro-batches of a step and of all processes, in one all-reduce.

    Args:
        counts: of each micro-batch of this process, from `ScribbleLoss.counts`; the lengths may differ.

    Returns:
        The `normalizer` for each of these micro-batches.
    """
    device = next((v.device for c in counts for v in c if isinstance(v, Tensor)), torch.device("cpu"))
    total = torch.zeros(3, device=device)
    for count in counts:
        total = total + torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in count])
    return Counts(*global_count(total).unbind())


class ScribbleTerms(NamedTuple):
    """The terms of `ScribbleLoss`: scalars, or (B,) for reduction "none".

    total: the weighted sum of the others. cross_entropy, entropy, color: without their weights; color is 0
    where its weight is 0.
    """

    total: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    color: Tensor


class ScribbleLoss(nn.Module):
    """Partial cross-entropy, soft entropy and colour constraint in one pass over the logits.

    Equal to `cross_entropy` * `PartialCrossEntropyLoss` + `entropy` * `SoftEntropyLoss` + `color` *
    `ColorConstraintLoss`, each with its own mean (docs/method.md sections 3, 4 and 7).

    Args:
        cross_entropy, entropy, color: weights of the terms. With color=0 no image is needed.
        num_superpixels, compactness, norm, relaxation, max_edges: of `ColorConstraintLoss`.
        ignore_index, class_weight: of `PartialCrossEntropyLoss`.
        align_corners: of the upsampling.
        reduction, normalizer: see the module; the normalizer is a `Counts`.

    Raises:
        TypeError, ValueError: an option of a wrong type or value.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        cross_entropy: float = 1.0,
        entropy: float = 1.0,
        color: float = 1.0,
        *,
        num_superpixels: int = 800,
        compactness: float = 10.0,
        norm: str = "sum",
        relaxation: str = "quadratic",
        max_edges: int | None = None,
        ignore_index: int = 255,
        class_weight: Tensor | Sequence[float] | None = None,
        align_corners: bool = True,
        reduction: str = "mean",
        normalizer: Counts | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("cross_entropy", cross_entropy), ("entropy", entropy), ("color", color)):
            check_number(name, value, low=0)
        check_number("ignore_index", ignore_index, integer=True)
        _check_counts(reduction, normalizer)
        self.regions = _RegionEnergy(num_superpixels, compactness, norm, relaxation, max_edges)
        self.cross_entropy = cross_entropy
        self.entropy = entropy
        self.color = color
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.reduction = reduction
        self.normalizer = normalizer
        self.register_buffer("class_weight", _class_weight_buffer(class_weight))

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        image: Tensor | None = None,
        *,
        superpixels: Tensor | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Counts | None = None,
    ) -> Tensor:
        """The total loss; arguments as in `terms`."""
        return self.terms(
            logits, labels, image, superpixels=superpixels, weight=weight, mask=mask, normalizer=normalizer
        ).total

    def terms(
        self,
        logits: Tensor,
        labels: Tensor,
        image: Tensor | None = None,
        *,
        superpixels: Tensor | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Counts | None = None,
    ) -> ScribbleTerms:
        """Computes the total and each term.

        Args:
            logits: (B, C, h, w) floating.
            labels: (B, H, W) uint8, int16, int32 or int64.
            image: (B, 3, H, W) uint8 RGB before normalisation, or floating in [0, 1]; grey as one channel or
                three. Needed unless color=0.
            superpixels: (B, H, W) int32, -1 = none; where None and color > 0, computed by
                `cc4s_kernels.slic`.
            weight: (B, H, W) map of the entropy, floating and non-negative or bool. By default it is 0 on
                boundaries between superpixels and on pixels without one, 1 elsewhere.
            mask: (B, H, W) bool, False = no pixel (padding): out of every term.
            normalizer: global counts; see the module.

        Returns:
            `ScribbleTerms`.

        Raises:
            TypeError, ValueError: as the ops `slic`, `color_affinity` and `upsample_losses`; no image for
                color > 0.
        """
        normalizer = self.normalizer if normalizer is None else normalizer
        _check_counts(self.reduction, normalizer)
        image, superpixels = self._maps(labels, image, superpixels, mask)
        colored = self.color > 0
        out = upsample_losses(
            logits,
            _ignore_outside(labels, mask, self.ignore_index),
            weight=_entropy_weight(weight, superpixels, mask),
            superpixels=superpixels if colored else None,
            num_superpixels=self.regions.num_superpixels if colored else None,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            class_weight=self.class_weight,
        )
        images = torch.ones_like(out.cross_entropy)
        if colored:
            assert image is not None
            assert superpixels is not None
            energy = self.regions(out.pooled, out.counts, image, superpixels)
        else:
            energy = torch.zeros_like(images)
        norms = normalizer or (None, None, None)
        cross_entropy = reduce(out.cross_entropy, out.labelled, self.reduction, norms[0])
        entropy = reduce(out.entropy, out.weight, self.reduction, norms[1])
        color = reduce(energy, images, self.reduction, norms[2])
        total = self.cross_entropy * cross_entropy + self.entropy * entropy + self.color * color
        return ScribbleTerms(total, cross_entropy, entropy, color)

    def counts(
        self,
        labels: Tensor,
        image: Tensor | None = None,
        *,
        superpixels: Tensor | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Counts:
        """What the means of `terms` with these arguments divide by, as 0-d float32 tensors of this process.

        Give `superpixels` here and to `terms` where the colour term needs them: otherwise both compute them.
        """
        _, superpixels = self._maps(labels, image, superpixels, mask)
        labelled = _labelled_count(labels, mask, self.ignore_index, self.class_weight)
        m = _entropy_weight(weight, superpixels, mask)
        pixels = labelled.new_tensor(labels.numel()) if m is None else m.sum(dtype=torch.float32)
        return Counts(labelled, pixels, labelled.new_tensor(labels.shape[0]))

    def _maps(
        self, labels: Tensor, image: Tensor | None, superpixels: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The checked uint8 image, and superpixels (for the colour term always) with -1 outside the mask."""
        check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES)
        check_pixel_mask(mask, labels.shape, labels.device)
        if self.color > 0:
            if image is None:
                raise ValueError(f"image: got None, expected (B, 3, H, W) as color={self.color}")
            image = _rgb(image)
            expected = (labels.shape[0], 3, *labels.shape[1:])
            check_shape("image", image, expected, "the pixels of labels")
            if superpixels is None:
                return image, self.regions.segment(image, mask)
        if superpixels is not None:
            check_tensor("superpixels", superpixels, dims="(B, H, W)", dtypes=ID_DTYPES)
            check_shape("superpixels", superpixels, labels.shape, "the shape of labels")
        return image, _inside(superpixels, mask)

    def extra_repr(self) -> str:
        return (
            f"cross_entropy={self.cross_entropy}, entropy={self.entropy}, color={self.color}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


def _check_counts(reduction: str, normalizer: Counts | None) -> None:
    if normalizer is None:
        check_reduction(reduction)
        return
    if not isinstance(normalizer, Counts):
        raise TypeError(f"normalizer: got {describe(normalizer)}, expected Counts(labelled, weight, images)")
    for count in normalizer:
        check_reduction(reduction, count)
