"""The loss of a training stage (docs/method.md section 9), normalised over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cc4s_kernels.nn as ckn
from cc4s.config import Config, StageConfig, cell_pitch
from cc4s.data import ignore_index
from cc4s.models import frozen_statistics
from cc4s.models.segmenter import cell_mask
from cc4s.transforms import ImageTransform

Batch = dict[str, Any]


class GlobalCounts(NamedTuple):
    """What the means of a step divide by, over all processes and micro-batches."""

    scribble: ckn.Counts
    # Valid positions that both views share (images in the released reduction); 0 without consistency.
    positions: Tensor


def balanced_weights(pixels: Tensor, power: float) -> Tensor:
    """Class weights (1 / share)^power, scaled so that their mean over the labelled pixels is 1.

    Args:
        pixels: (C,) labelled pixels of each class. Classes without any weigh as much as the rarest one; where there is
            no labelled pixel all weights are 1.
        power: 0 gives 1 everywhere, 1 the same total weight to every class.

    Returns:
        (C,) float32.
    """
    if not bool(pixels.any()):
        return torch.ones(len(pixels))
    share = pixels.double() / pixels.sum()
    weight = share.clamp_min(share[share > 0].min()) ** -power
    return (weight / (weight * share).sum()).float()


class StageLoss(nn.Module):
    """Cross-entropy, and entropy, colour and consistency where the stage has them.

    Args:
        config: of the run; its `loss`, `augment.crop` and `model`.
        stage: which terms are on.
        num_classes: number of classes.
        class_weight: (C,) of the cross-entropy; None weighs all alike.
    """

    def __init__(
        self, config: Config, stage: StageConfig, num_classes: int, class_weight: Tensor | None = None
    ) -> None:
        super().__init__()
        loss, consistency = config.loss, config.loss.consistency
        self.has_entropy = "entropy" in stage.losses
        self.has_color = "color" in stage.losses and loss.color > 0
        self.skip_boundaries = self.has_entropy and loss.entropy_skip_boundaries
        self.mask_padding = config.model.mask_padding
        self.update_statistics = consistency.update_statistics
        # Rows and columns of the walk's positions.
        self.grid = (config.augment.crop - 1) // cell_pitch(config.model) + 1
        self.scribble = ckn.ScribbleLoss(
            loss.cross_entropy,
            loss.entropy if self.has_entropy else 0.0,
            loss.color if self.has_color else 0.0,
            num_superpixels=loss.superpixels,
            compactness=loss.compactness,
            norm=loss.color_norm,
            relaxation=loss.relaxation,
            ignore_index=ignore_index(num_classes),
            class_weight=class_weight,
        )
        self.consistency: ckn.EigenspaceConsistencyLoss | None = None
        if "consistency" in stage.losses:
            self.consistency = ckn.EigenspaceConsistencyLoss(
                consistency.kl,
                consistency.trace,
                normalize=consistency.normalize,
                preset=consistency.reduction,
            )

    @property
    def needs_superpixels(self) -> bool:
        """Whether batches must hold `superpixels`."""
        return self.has_color or self.skip_boundaries

    def global_counts(self, micro: Sequence[Batch], transforms: Sequence[ImageTransform | None]) -> GlobalCounts:
        """Counts over all micro-batches of all processes: one all-reduce, before the first forward pass."""
        total = torch.stack(
            [self._counts(batch, transform) for batch, transform in zip(micro, transforms, strict=True)]
        )
        labelled, weight, images, positions = ckn.global_count(total.sum(0)).unbind()
        return GlobalCounts(ckn.Counts(labelled, weight, images), positions)

    def _counts(self, batch: Batch, transform: ImageTransform | None) -> Tensor:
        counts = self.scribble.counts(batch["label"], batch["rgb"], **self._maps(batch))
        positions = torch.zeros((), device=batch["label"].device)
        if self.consistency is not None and transform is not None:
            mask = self._cells(batch["valid"])
            shape = mask if mask is not None else batch["valid"].new_ones(len(batch["valid"]), self.grid, self.grid)
            positions = self.consistency.count(shape.flatten(1)[..., None], transform=transform.cells, mask=mask)
        return torch.stack([*map(torch.as_tensor, counts), positions])

    def _maps(self, batch: Batch) -> dict[str, Tensor | None]:
        """Superpixels, entropy weight and mask, for the scribble terms."""
        valid = batch["valid"]
        return {
            "superpixels": batch.get("superpixels"),
            # None leaves out the boundaries of the superpixels.
            "weight": None if self.skip_boundaries else valid.float(),
            "mask": valid,
        }

    def _cells(self, valid: Tensor) -> Tensor | None:
        return cell_mask(valid, self.grid, self.grid) if self.mask_padding else None

    def forward(
        self,
        network: nn.Module,
        batch: Batch,
        transform: ImageTransform | None,
        counts: GlobalCounts,
        target: nn.Module | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the network, and once more on the transformed image where the stage has consistency.

        Args:
            network: what to train, wrapped for its devices.
            batch: from `TrainingSet`.
            transform: from `draw`; None without consistency.
            counts: from `global_counts`.
            target: the bare network for the target pass, which needs no gradient; `network` if None.
            autocast: precision of the target pass.

        Returns:
            "loss" with gradient, and its terms before their weights (those of the stage).
        """
        valid = batch["valid"] if self.mask_padding else None
        output = network(batch["image"], valid)
        scribble = self.scribble.terms(
            output.logits, batch["label"], batch["rgb"], **self._maps(batch), normalizer=counts.scribble
        )
        terms = {"loss": scribble.total, "cross_entropy": scribble.cross_entropy.detach()}
        if self.has_entropy:
            terms["entropy"] = scribble.entropy.detach()
        if self.has_color:
            terms["color"] = scribble.color.detach()
        if self.consistency is not None and transform is not None:
            bare = network if target is None else target
            statistics = nullcontext() if self.update_statistics else frozen_statistics(bare)
            with torch.no_grad(), statistics, autocast or nullcontext():
                # Not compiled: its shapes change from step to step, and it has no backward to gain from.
                other = bare.forward(
                    transform.pixels(batch["image"]), None if valid is None else transform.pixels(valid)
                )
            # A mixed-precision wrapper widens what it returns, the bare network does not.
            consistency = self.consistency.terms(
                output.q,
                output.k,
                other.q.to(output.q.dtype),
                other.k.to(output.k.dtype),
                transform=transform.cells,
                mask=self._cells(batch["valid"]),
                normalizer=counts.positions,
            )
            terms["loss"] = terms["loss"] + consistency.total
            terms["consistency_kl"] = consistency.kl.detach()
            terms["consistency_trace"] = consistency.trace.detach()
        return terms
