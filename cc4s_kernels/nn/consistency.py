"""Self-supervision on the neural eigenspace."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cc4s_kernels._validation import check_choice, check_number, check_tensor, describe
from cc4s_kernels.nn._reduce import BatchLoss, Normalizer, reduce
from cc4s_kernels.nn.transforms import Crop, Flip, Transform
from cc4s_kernels.ops.transition_consistency import transition_consistency

PRESETS = ("clean", "released")

RELEASED_TRACE_COEFFICIENT = 1e-2


class ConsistencyTerms(NamedTuple):
    """total: the weighted sum. kl: the divergence term before its weight. trace: likewise the trace term."""

    total: Tensor
    kl: Tensor
    trace: Tensor


class EigenspaceConsistencyLoss(BatchLoss):
    """The transition matrix of a transformed image should be that of the image, transformed.

    With P from (q, k) and the constant P' from (q_target, k_target), on the N positions that both views
    share:

    - preset "clean": kl_weight * mean of KL_i(P' | P) + trace_weight * |tr P - tr P'| / N. Over a batch with
      masks every valid position weighs the same: both terms are summed over the batch and divided by its
      number of valid common positions.
    - preset "released": what the authors' code computes: kl_weight * (sum of KL) / N² + trace_weight * 1e-2 *
      |tr P - tr P'|, mean over the images, with matrices normalised over queries. The factor 30 in front of
      the sum belongs to the caller.

    Args:
        kl_weight: weight of the divergence.
        trace_weight: weight of the trace term.
        normalize: "row" (over keys: the P that the walk uses) or "column" (over queries). None = "row" for
            "clean", "column" for "released".
        reduction: "mean"; "sum": without the division by positions (by images for "released"); "none": the
            same per image, (B,).
        preset: "clean" or "released".
        scale: factor of the scores.
        normalizer: for "mean", the number to divide by instead: the global number of valid common positions
            (of images for "released"), as `count` gives it for one batch. The loss is then world size * local
            sum / normalizer.

    Source: docs/method.md sections 5 and 8.
    """

    def __init__(
        self,
        kl_weight: float = 1.0,
        trace_weight: float = 1.0,
        normalize: str | None = None,
        reduction: str = "mean",
        preset: str = "clean",
        *,
        scale: float = 1.0,
        normalizer: Normalizer = None,
    ) -> None:
        super().__init__(reduction, normalizer)
        check_number("kl_weight", kl_weight, low=0.0)
        check_number("trace_weight", trace_weight, low=0.0)
        check_choice("preset", preset, PRESETS)
        if normalize is None:
            normalize = "column" if preset == "released" else "row"
        check_choice("normalize", normalize, ("row", "column"))
        check_number("scale", scale)
        self.kl_weight = kl_weight
        self.trace_weight = trace_weight
        self.normalize = normalize
        self.preset = preset
        self.scale = scale

    def extra_repr(self) -> str:
        return (
            f"kl_weight={self.kl_weight}, trace_weight={self.trace_weight}, normalize={self.normalize!r}, "
            f"reduction={self.reduction!r}, preset={self.preset!r}"
        )

    def count(self, q: Tensor, *, transform: Transform | None = None, mask: Tensor | None = None) -> Tensor:
        """The local `normalizer` of a batch: 0-d float32. Of `q` only the shape counts."""
        return self._counts(q, transform, _flat_mask(q, mask)).sum()

    def _counts(self, q: Tensor, transform: Transform | None, mask: Tensor | None) -> Tensor:
        """(B,): valid common positions, or 1 each for the released preset."""
        if self.preset == "released":
            return torch.ones(q.shape[0], device=q.device)
        return _common_positions(q, transform, mask)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        *,
        transform: Transform | None = None,
        mask: Tensor | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor:
        """The total loss; arguments and errors as in `terms`.

        Returns:
            A scalar (or (B,) for reduction "none"), float32 (float64 for float64 inputs), also under
            autocast.
        """
        return self.terms(q, k, q_target, k_target, transform=transform, mask=mask, normalizer=normalizer).total

    def terms(
        self,
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        *,
        transform: Transform | None = None,
        mask: Tensor | None = None,
        normalizer: Normalizer = None,
    ) -> ConsistencyTerms:
        """Computes the total and each term.

        Args:
            q: (B, N, d) floating, queries of the image over its h x w feature cells, row by row.
            k: (B, N, d), keys of the image.
            q_target: (B, N', d), queries of the transformed image; a constant.
            k_target: (B, N', d), keys of the transformed image; a constant.
            transform: how the transformed image came from the image, in feature cells; None: not at all, or
                the targets are already at the positions of q.
            mask: (B, N) or (B, h, w) bool, True = valid position of the image.
            normalizer: see the class; wins over that of the constructor.

        Returns:
            `ConsistencyTerms`: scalars (or (B,) for reduction "none"), float32 (float64 for float64 inputs),
            also under autocast.

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype or device than the others ask
                for.
        """
        check_tensor("q", q, dims="(B, N, d)", floating=True)
        _check_transform(transform)
        normalizer = self._given_or_own(normalizer)
        mask = _flat_mask(q, mask)
        counts = self._counts(q, transform, mask)
        positions = _common_positions(q, transform, mask)
        if transform is not None:
            q, k = transform.of_image(q, "q"), transform.of_image(k, "k")
            q_target = transform.of_target(q_target, "q_target")
            k_target = transform.of_target(k_target, "k_target")
            mask = None if mask is None else transform.of_image(mask, "mask")
        found = transition_consistency(q, k, q_target, k_target, mask=mask, scale=self.scale, normalize=self.normalize)
        kl = found.kl.sum(-1)  # [B]
        trace = (found.trace - found.trace_target).abs()  # [B]
        if self.preset == "released":
            kl = kl / positions.clamp(min=1).to(kl.dtype).square()
            trace = RELEASED_TRACE_COEFFICIENT * trace
        kl = reduce(kl, counts, self.reduction, normalizer)
        trace = reduce(trace, counts, self.reduction, normalizer)
        return ConsistencyTerms(self.kl_weight * kl + self.trace_weight * trace, kl, trace)


def _check_transform(transform: Any) -> None:
    if transform is not None and not isinstance(transform, Flip | Crop):
        raise TypeError(f"transform: got {describe(transform)}, expected None, Flip or Crop")


def _flat_mask(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, N) from (B, N) or (B, h, w)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: got {describe(mask)}, expected a bool tensor")
    flat = mask.flatten(1) if mask.dim() == 3 else mask
    if flat.shape != q.shape[:2]:
        raise ValueError(
            f"mask: got {describe(mask)}, expected (B, N) or (B, h, w) with B = {q.shape[0]}, N = {q.shape[1]}"
        )
    return flat


def _common_positions(q: Tensor, transform: Transform | None, mask: Tensor | None) -> Tensor:
    """(B,) float32: number of valid positions that both views have."""
    if mask is None:
        size = transform.crop_height * transform.crop_width if isinstance(transform, Crop) else q.shape[1]
        return torch.full(q.shape[:1], float(size), device=q.device)
    return (mask if transform is None else transform.of_image(mask, "mask")).sum(-1, dtype=torch.float32)
