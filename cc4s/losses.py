"""The loss of a training stage (docs/method.md section 9), normalised over the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import cc4s_kernels as ck
import cc4s_kernels.nn as ckn
from cc4s.config import (
    PEER_TERMS,
    Config,
    DenseConfig,
    LossConfig,
    PottsConfig,
    SelfLabelConfig,
    StageConfig,
    TreeEnergyConfig,
    cell_pitch,
)
from cc4s.data import ignore_index
from cc4s.models import frozen_statistics
from cc4s.models.segmenter import SegmenterOutput, cell_mask
from cc4s.self_labels import soft_self_labels
from cc4s.transforms import ImageTransform

Batch = dict[str, Any]


class GlobalCounts(NamedTuple):
    """What the means of a step divide by, over all processes and micro-batches."""

    scribble: ckn.Counts
    # Valid positions that both views share (images in the released reduction); 0 without consistency.
    positions: Tensor
    # Pixels without a label.
    unlabelled: Tensor


# A peer's term, from the network's output, the batch, and what its mean divides by.
Term = Callable[[SegmenterOutput, Batch, GlobalCounts], Tensor]


def _potts(config: PottsConfig) -> Term:
    loss = ckn.PottsLoss(config.relaxation)

    def term(output: SegmenterOutput, batch: Batch, counts: GlobalCounts) -> Tensor:
        grid = ck.gaussian_grid(
            batch["rgb"], sigma_color=config.sigma_color, connectivity=config.connectivity, mask=batch["valid"]
        )
        return loss(output.logits, grid, normalizer=counts.scribble.images)

    return term


def _random_walker(loss: ckn.RandomWalkerLoss) -> Term:
    return lambda output, batch, counts: loss(
        output.logits, batch["label"], batch["rgb"], batch["valid"], normalizer=counts.scribble.images
    )


def _on_image(loss: nn.Module) -> Term:
    """A loss that is called with logits, image and mask."""
    return lambda output, batch, counts: loss(
        output.logits, batch["rgb"], batch["valid"], normalizer=counts.scribble.images
    )


def _dense(loss: type[nn.Module], config: DenseConfig, **options: float) -> Term:
    return _on_image(loss(config.sigma_xy, config.sigma_rgb, config.scale, **options))


def _tree_energy(config: TreeEnergyConfig, ignored: int) -> Term:
    loss = ckn.TreeEnergyLoss(config.sigma)

    def term(output: SegmenterOutput, batch: Batch, counts: GlobalCounts) -> Tensor:
        features = output.features if config.features else None
        unlabelled = _unlabelled(batch, ignored)
        return loss(output.logits, batch["rgb"], features, unlabelled=unlabelled, normalizer=counts.scribble.images)

    return term


def _self_labels(config: SelfLabelConfig, ignored: int) -> Term:
    loss = ckn.CollisionCrossEntropyLoss()

    def term(output: SegmenterOutput, batch: Batch, counts: GlobalCounts) -> Tensor:
        label, mask = batch["label"], batch["valid"]
        logits = output.logits.detach().float()
        prob = interpolate(logits, label.shape[1:], mode="bilinear", align_corners=True).softmax(1)
        target = soft_self_labels(prob, label, batch["rgb"], mask, config, ignored)
        return loss(output.logits, target, _unlabelled(batch, ignored), normalizer=counts.unlabelled)

    return term


def _unlabelled(batch: Batch, ignored: int) -> Tensor:
    return batch["valid"] & (batch["label"].long() == ignored)


# One line for each peer: its key in `LossConfig`, and how its term is made from that and the unlabelled pixels' label.
TERMS: dict[str, Callable[[LossConfig, int], Term]] = {
    "potts": lambda loss, ignored: _potts(loss.potts),
    "rawks": lambda loss, ignored: _random_walker(
        ckn.RandomWalkerLoss(loss.rawks.beta, loss.rawks.alpha, stride=loss.rawks.stride, ignore_index=ignored)
    ),
    "selflabel": lambda loss, ignored: _self_labels(loss.selflabel, ignored),
    "densecrf": lambda loss, ignored: _dense(ckn.DenseCRFLoss, loss.densecrf),
    "ncl": lambda loss, ignored: _dense(ckn.NormalizedCutLoss, loss.ncl),
    "kcl": lambda loss, ignored: _dense(
        ckn.KernelCutLoss, loss.kcl, normalized_cut=loss.kcl.normalized_cut, dense_crf=loss.kcl.dense_crf
    ),
    "gatedcrf": lambda loss, ignored: _on_image(
        ckn.GatedCRFLoss(loss.gatedcrf.radius, loss.gatedcrf.sigma_xy, loss.gatedcrf.sigma_rgb)
    ),
    "tel": lambda loss, ignored: _tree_energy(loss.tel, ignored),
}


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
    """Cross-entropy, and entropy, colour, consistency and the terms of peers where the stage has them.

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
        self.ignored = ignore_index(num_classes)
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
            ignore_index=self.ignored,
            class_weight=class_weight,
        )
        self.peers = {
            name: (getattr(loss, name).weight, TERMS[name](loss, self.ignored))
            for name in PEER_TERMS
            if name in stage.losses
        }
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
        labelled, weight, images, positions, unlabelled = ckn.global_count(total.sum(0)).unbind()
        return GlobalCounts(ckn.Counts(labelled, weight, images), positions, unlabelled)

    def _counts(self, batch: Batch, transform: ImageTransform | None) -> Tensor:
        counts = self.scribble.counts(batch["label"], batch["rgb"], **self._maps(batch))
        positions = torch.zeros((), device=batch["label"].device)
        if self.consistency is not None and transform is not None:
            mask = self._cells(batch["valid"])
            shape = mask if mask is not None else batch["valid"].new_ones(len(batch["valid"]), self.grid, self.grid)
            positions = self.consistency.count(shape.flatten(1)[..., None], transform=transform.cells, mask=mask)
        unlabelled = _unlabelled(batch, self.ignored).sum(dtype=torch.float32)
        return torch.stack([*map(torch.as_tensor, counts), positions, unlabelled])

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
        for name, (weight, term) in self.peers.items():
            value = term(output, batch, counts)
            terms["loss"] = terms["loss"] + weight * value
            terms[name] = value.detach()
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
