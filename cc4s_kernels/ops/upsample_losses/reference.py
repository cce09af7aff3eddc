"""The definition of `upsample_losses` in plain PyTorch: every intermediate at full resolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cc4s_kernels._precision import accumulation_dtype, without_autocast


class UpsampleLosses(NamedTuple):
    """Sums per image; see `cc4s_kernels.upsample_losses`.

    cross_entropy, labelled, entropy, weight: (B,). pooled: (B, K, C). counts: (B, K).
    """

    cross_entropy: Tensor
    labelled: Tensor
    entropy: Tensor
    weight: Tensor
    pooled: Tensor
    counts: Tensor


def upsample_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    superpixels: Tensor | None = None,
    num_superpixels: int | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
    class_weight: Tensor | None = None,
) -> UpsampleLosses:
    """docs/method.md sections 3, 4 and 7 as they are written; the arguments are checked before."""
    dtype = accumulation_dtype(logits.dtype)
    classes = logits.shape[1]
    with without_autocast(logits.device):
        full = interpolate(
            logits.to(dtype), labels.shape[-2:], mode="bilinear", align_corners=align_corners
        )  # [B, C, H, W]
        log_prob = full.log_softmax(1)
        prob = log_prob.exp()

        target = labels.long()
        # The range matters only where nobody could look at the values: such a label counts as ignored.
        labelled = (target != ignore_index) & (target >= 0) & (target < classes)  # [B, H, W]
        target = target.where(labelled, 0)
        scale = labelled.to(dtype)
        if class_weight is not None:
            scale = scale * class_weight.to(dtype)[target]
        picked = log_prob.gather(1, target[:, None])[:, 0]
        cross_entropy = -(scale * picked).sum((1, 2))

        entropy = -(prob * log_prob).sum(1)  # [B, H, W]
        pixel_weight = torch.ones_like(entropy) if weight is None else weight.to(dtype)
        pooled, counts = _pool(prob, superpixels, num_superpixels or 0)
        return UpsampleLosses(
            cross_entropy=cross_entropy,
            labelled=scale.sum((1, 2)),
            entropy=(pixel_weight * entropy).sum((1, 2)),
            weight=pixel_weight.sum((1, 2)),
            pooled=pooled,
            counts=counts,
        )


def _pool(prob: Tensor, superpixels: Tensor | None, num_superpixels: int) -> tuple[Tensor, Tensor]:
    """Sums of prob (B, C, H, W) over each id: (B, K, C), and the number of pixels: (B, K)."""
    batch, classes = prob.shape[:2]
    if superpixels is None:
        return prob.new_zeros(batch, 0, classes), prob.new_zeros(batch, 0)
    ids = superpixels.long().flatten(1)  # [B, HW]
    # One bin more, for pixels without an id; it is cut off at the end.
    bins = num_superpixels + 1
    ids = ids.where((ids >= 0) & (ids < num_superpixels), num_superpixels)
    rows = (ids + bins * torch.arange(batch, device=ids.device)[:, None]).flatten()
    values = prob.flatten(2).transpose(1, 2).flatten(0, 1)  # [B*HW, C]
    pooled = prob.new_zeros(batch * bins, classes).index_add(0, rows, values)
    counts = prob.new_zeros(batch * bins).index_add(0, rows, torch.ones_like(values[:, 0]))
    return (
        pooled.view(batch, bins, classes)[:, :num_superpixels],
        counts.view(batch, bins)[:, :num_superpixels],
    )
