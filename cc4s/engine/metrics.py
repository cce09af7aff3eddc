"""Segmentation metrics from confusion matrices: exact counts, summed over images, processes and volumes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cc4s.errors import UserError

Mask = Tensor | npt.NDArray[Any]


class SegmentationMetrics:
    """IoU, Dice and accuracy of index masks.

    Every number comes from integer counts, so the order of images and the number of processes change
    nothing.

    Pooled ("2-D") numbers come from one confusion matrix over the labelled pixels of all images. Per-volume
    ("3-D") numbers first pool the slices of each volume, take the score of every class of the volume, and
    only then average.

    Args:
        classes: class names, in index order; no two alike.
        exclude: class indices left out of the means. They stay in the confusion matrix, in the per-class
            numbers and in `pixel_accuracy`.
        volume_pattern: a regular expression searched in image names; its first group names the volume of a
            slice. A name it does not match is a volume of its own. Empty: no per-volume numbers.
        ignore_index: label of pixels that count nowhere.

    Raises:
        UserError: `exclude` (the key `data.exclude_from_mean`) or `volume_pattern` (`data.volume_pattern`) is
            no good.
        ValueError: two classes have the same name, or there is none.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        exclude: Sequence[int] = (),
        volume_pattern: str = "",
        ignore_index: int = 255,
    ) -> None:
        self.classes = list(classes)
        count = len(self.classes)
        if count == 0 or len(set(self.classes)) != count:
            raise ValueError(f"classes: expected different names, at least one, got {self.classes}")
        if 0 <= ignore_index < count:
            raise ValueError(f"ignore_index: {ignore_index} is the class {self.classes[ignore_index]!r}")
        for index in exclude:
            if not 0 <= index < count:
                raise UserError(f"data.exclude_from_mean: {index} is not a class; expected 0 to {count - 1}")
        try:
            self._pattern = re.compile(volume_pattern) if volume_pattern else None
        except re.error as error:
            raise UserError(f"data.volume_pattern: {volume_pattern!r} is not a regular expression: {error}") from None
        if self._pattern is not None and self._pattern.groups == 0:
            raise UserError(f"data.volume_pattern: {volume_pattern!r} has no (group) to name the volume")
        self.exclude = frozenset(exclude)
        self.ignore_index = ignore_index
        # [C, C] label, prediction
        self.confusion = torch.zeros(count, count, dtype=torch.int64)
        self.images = 0
        # volume -> [3, C] pixels in both, predicted, labelled
        self._volumes: dict[str, Tensor] = {}

    def update(self, name: str, prediction: Mask, label: Mask) -> None:
        """Count one image.

        Args:
            name: the image's name; only `volume_pattern` looks at it.
            prediction: (H,W) integer class indices, any device.
            label: (H,W) integer class indices or `ignore_index`.

        Raises:
            ValueError: the shapes differ, or an index is out of range.
        """
        prediction = _as_int64(prediction)
        label = _as_int64(label).to(prediction.device)
        if prediction.shape != label.shape or prediction.ndim != 2:
            raise ValueError(
                f"{name}: expected a prediction and a label of one size (H, W), "
                f"got {tuple(prediction.shape)} and {tuple(label.shape)}"
            )
        self._check_range(name, "prediction", prediction)
        self._check_range(name, "label", label[label != self.ignore_index])
        confusion = multiclass_confusion_matrix(
            prediction, label, len(self.classes), ignore_index=self.ignore_index, validate_args=False
        ).cpu()
        self.confusion += confusion
        self.images += 1
        if self._pattern is not None:
            match = self._pattern.search(name)
            volume = (match.group(1) if match else None) or name
            self._add_volume(volume, _overlap(confusion))

    def _check_range(self, name: str, what: str, indices: Tensor) -> None:
        if indices.numel() == 0:
            return
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < 0 or high >= len(self.classes):
            worst = low if low < 0 else high
            raise ValueError(f"{name}: {what} {worst} is not a class; expected 0 to {len(self.classes) - 1}")

    def _add_volume(self, volume: str, overlap: Tensor) -> None:
        known = self._volumes.get(volume)
        self._volumes[volume] = overlap.clone() if known is None else known + overlap

    def state(self) -> dict[str, Any]:
        """The counts so far, on the CPU: `confusion` (C,C) int64, `images`, `volumes` {name: (3,C) int64}."""
        return {"confusion": self.confusion.clone(), "images": self.images, "volumes": dict(self._volumes)}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the counts of another process's `state()`."""
        self.confusion += state["confusion"].cpu()
        self.images += state["images"]
        for volume, overlap in state["volumes"].items():
            self._add_volume(volume, overlap.cpu())

    def compute(self) -> dict[str, Any]:
        """The metrics, ready for JSON; None where nothing was there to measure.

        Returns:
            `per_class_iou`, `per_class_dice`: |A and B| / |A or B| and 2 |A and B| / (|A| + |B|) of the
            pooled pixels of a class, A predicted and B labelled; None for a class neither predicted nor
            labelled. `per_class_accuracy`: the share of a class's labelled pixels that is predicted so
            (recall); None for a class without labelled pixels.
            `miou`, `dice`, `mean_accuracy`: their means over the classes that are not excluded and not None.
            `pixel_accuracy`: the share of all labelled pixels, excluded classes as well, that is predicted
            right. `classes_in_mean`: names of the classes that `miou` and `dice` average.
            `images`: number of images counted.

            With a volume pattern also `volumes`, their number; `per_class_volume_dice` and
            `per_class_volume_iou`: the mean of a class's score over volumes, without the volumes in which it
            is neither predicted nor labelled; `volume_dice` and `volume_iou`: the means of those over the
            classes that are not excluded.
        """
        counts = _overlap(self.confusion).numpy()
        iou, dice = _iou(counts), _dice(counts)
        accuracy = _ratio(counts[0], counts[2])
        pixels = int(counts[2].sum())
        result: dict[str, Any] = {
            "miou": self._mean(iou),
            "dice": self._mean(dice),
            "pixel_accuracy": float(counts[0].sum() / pixels) if pixels else None,
            "mean_accuracy": self._mean(accuracy),
            "per_class_iou": self._named(iou),
            "per_class_dice": self._named(dice),
            "per_class_accuracy": self._named(accuracy),
            "classes_in_mean": [self.classes[i] for i in self._in_mean(iou)],
            "images": self.images,
        }
        if self._pattern is not None:
            # Sorted: float sums must not depend on which process saw a volume first.
            volumes = [self._volumes[v].numpy() for v in sorted(self._volumes)]
            volume_iou = _mean_over_volumes([_iou(v) for v in volumes], len(self.classes))
            volume_dice = _mean_over_volumes([_dice(v) for v in volumes], len(self.classes))
            result |= {
                "volume_iou": self._mean(volume_iou),
                "volume_dice": self._mean(volume_dice),
                "per_class_volume_iou": self._named(volume_iou),
                "per_class_volume_dice": self._named(volume_dice),
                "volumes": len(volumes),
            }
        return result

    def _in_mean(self, values: npt.NDArray[np.float64]) -> list[int]:
        return [i for i, value in enumerate(values) if i not in self.exclude and not np.isnan(value)]

    def _mean(self, values: npt.NDArray[np.float64]) -> float | None:
        used = self._in_mean(values)
        return float(np.mean(values[used])) if used else None

    def _named(self, values: npt.NDArray[np.float64]) -> dict[str, float | None]:
        return {
            name: None if np.isnan(value) else float(value) for name, value in zip(self.classes, values, strict=True)
        }


def _as_int64(mask: Mask) -> Tensor:
    if isinstance(mask, np.ndarray):
        # astype copies: torch warns about read-only arrays and has no uint32.
        return torch.from_numpy(mask.astype(np.int64))
    return mask.long()


def _overlap(confusion: Tensor) -> Tensor:
    """(3,C) pixels of each class in both masks, in the prediction, in the label."""
    return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _iou(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    both, predicted, labelled = counts
    return _ratio(both, predicted + labelled - both)


def _dice(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    both, predicted, labelled = counts
    return _ratio(2 * both, predicted + labelled)


def _mean_over_volumes(values: list[npt.NDArray[np.float64]], classes: int) -> npt.NDArray[np.float64]:
    stacked = np.array(values).reshape(-1, classes)  # [V, C]
    present = ~np.isnan(stacked)
    return _ratio(np.where(present, stacked, 0.0).sum(0), present.sum(0))
