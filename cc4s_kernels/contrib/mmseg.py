"""mmsegmentation (1.x): losses, an attention block and heads that never upsample their logits.

    custom_imports = dict(imports=["cc4s_kernels.contrib.mmseg"])

registers in mmengine's root registry, which that of mmsegmentation falls back to:

- losses `CC4SPartialCrossEntropyLoss` and `CC4SSoftEntropyLoss`;
- `CC4SRandomWalk2d`, also as a plugin of a backbone: dict(cfg=dict(type="CC4SRandomWalk2d"), ...).

A head with `FusedUpsampleMixin` in front of its class gives these losses the logits at their own size:

    @MODELS.register_module()
    class FusedFCNHead(FusedUpsampleMixin, FCNHead): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from cc4s_kernels import nn as losses
from cc4s_kernels._validation import check_number, describe
from cc4s_kernels.contrib._require import require

__all__ = ["FusedUpsampleMixin", "PartialCrossEntropyLoss", "RandomWalk2d", "SoftEntropyLoss", "register"]


class _Loss(nn.Module):
    """What mmsegmentation asks of a loss.

    Args:
        loss_weight: factor of the loss.
        loss_name: its name in the log; the trainer adds up those that start with "loss_".

    Attributes:
        align_corners: of the upsampling to the labels, where the logits are smaller; a head with
            `FusedUpsampleMixin` sets its own.
    """

    def __init__(self, loss_weight: float, loss_name: str) -> None:
        super().__init__()
        check_number("loss_weight", loss_weight)
        if not loss_name.startswith("loss_"):
            raise ValueError(f"loss_name: got {loss_name!r}, expected a name that starts with 'loss_'")
        self.loss_weight = loss_weight
        self._loss_name = loss_name
        self.align_corners = False

    @property
    def loss_name(self) -> str:
        return self._loss_name


def _refuse_override(avg_factor: Any, reduction_override: Any) -> None:
    if avg_factor is not None or reduction_override is not None:
        raise ValueError("avg_factor, reduction_override: expected None: the mean is over labelled pixels")


class PartialCrossEntropyLoss(_Loss):
    """`cc4s_kernels.nn.PartialCrossEntropyLoss`: the mean is over labelled pixels, as with avg_non_ignore=True.

    Args:
        loss_weight, loss_name: see mmsegmentation.
        class_weight: (C,) weights, or None.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        loss_name: str = "loss_pce",
        class_weight: Sequence[float] | None = None,
    ) -> None:
        super().__init__(loss_weight, loss_name)
        self.class_weight = class_weight

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: Any = None,
        reduction_override: Any = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Computes the loss.

        Args:
            cls_score: (B, C, h, w) floating logits. label: (B, H, W) integer.
            weight: of a pixel sampler: 0 leaves a pixel out; no other value than 0 and 1.
            ignore_index: label of unlabelled pixels.

        Returns:
            A scalar.
        """
        _refuse_override(avg_factor, reduction_override)
        criterion = losses.PartialCrossEntropyLoss(
            ignore_index=ignore_index, class_weight=self.class_weight, align_corners=self.align_corners
        ).to(cls_score.device)
        return self.loss_weight * criterion(cls_score, label, None if weight is None else weight != 0)


class SoftEntropyLoss(_Loss):
    """`cc4s_kernels.nn.SoftEntropyLoss` at every pixel of the label map, labelled or not.

    Args:
        loss_weight, loss_name: see mmsegmentation.
    """

    def __init__(self, loss_weight: float = 1.0, loss_name: str = "loss_entropy") -> None:
        super().__init__(loss_weight, loss_name)

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: Any = None,
        reduction_override: Any = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Computes the loss; arguments as in `PartialCrossEntropyLoss`, `weight` any weights. Of labels only the size
        counts."""
        _refuse_override(avg_factor, reduction_override)
        criterion = losses.SoftEntropyLoss(align_corners=self.align_corners)
        size = (label.shape[1], label.shape[2])
        return self.loss_weight * criterion(cls_score, weight, size=None if weight is not None else size)


class RandomWalk2d(losses.RandomWalk2d):
    """`cc4s_kernels.nn.RandomWalk2d` under the names that mmcv's plugins and blocks expect."""

    _abbr_ = "random_walk"

    def init_weights(self) -> None:
        """The walk passes features through at the start: nothing more to do."""


class FusedUpsampleMixin:
    """A decode head whose losses upsample the logits inside: in front of a `BaseDecodeHead` class.

    The losses of the head have to be those of this module. "acc_seg" is not in the log: it would need the upsampled
    logits.
    """

    loss_decode: Any
    sampler: Any
    align_corners: bool
    ignore_index: int

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            seg_logits: (B, C, h, w), as the head's forward gives it.
            batch_data_samples: B data samples with `gt_sem_seg`.

        Returns:
            Loss name -> scalar; losses of one name are added up.

        Raises:
            TypeError: a loss of another package. ValueError: a pixel sampler, which needs the upsampled logits.
        """
        if self.sampler is not None:
            raise ValueError(f"sampler: got {type(self.sampler).__name__}, expected None with FusedUpsampleMixin")
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)  # type: ignore[attr-defined]
        found: dict[str, Tensor] = {}
        for criterion in self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]:
            if not isinstance(criterion, _Loss):
                raise TypeError(
                    f"loss_decode: got {describe(type(criterion).__name__)}, expected losses of "
                    "cc4s_kernels.contrib.mmseg with FusedUpsampleMixin"
                )
            criterion.align_corners = self.align_corners
            value = criterion(seg_logits, labels, ignore_index=self.ignore_index)
            name = criterion.loss_name
            found[name] = found[name] + value if name in found else value
        return found


_REGISTERED: dict[str, type[nn.Module]] = {
    "CC4SPartialCrossEntropyLoss": PartialCrossEntropyLoss,
    "CC4SSoftEntropyLoss": SoftEntropyLoss,
    "CC4SRandomWalk2d": RandomWalk2d,
}


def register(registry: Any = None) -> None:
    """Adds the losses and the block to a registry of mmengine; the import of this module does it for the root.

    Args:
        registry: an `mmengine.registry.Registry`; None = mmengine's `MODELS`.

    Raises:
        ImportError: no mmengine.
    """
    if registry is None:
        registry = require("mmengine.registry", "mmengine").MODELS
    for name, module in _REGISTERED.items():
        if registry.get(name) is not module:
            registry.register_module(name=name, module=module)


# Without mmengine the classes are of use by themselves.
with suppress(ImportError):
    register()
