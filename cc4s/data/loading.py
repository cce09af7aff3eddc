"""Samples for training and evaluation, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from cc4s.config import AugmentConfig, DataConfig
from cc4s.data.augment import augment, check_augment
from cc4s.data.dataset import Entry, channel_statistics
from cc4s.data.images import Array, ignore_index, read_image, read_index_png, to_rgb, to_unit_float
from cc4s.data.strokes import read_scribble
from cc4s.errors import UserError


def normalize(image: Tensor, config: DataConfig) -> Tensor:
    """Subtracts the mean and divides by the deviation of each channel.

    Args:
        image: (..., C, H, W) float in [0, 1].
        config: `mean` and `std` of images in [0, 1]; see `channel_statistics`.

    Returns:
        The same shape, dtype and device.

    Raises:
        UserError: the statistics do not fit `channels`. ValueError: the image has another number of channels.
    """
    mean, std = channel_statistics(config)
    if image.ndim < 3 or image.shape[-3] != config.channels:
        raise ValueError(f"image: shape {tuple(image.shape)}, expected (..., {config.channels}, height, width)")
    shape = (config.channels, 1, 1)
    centre = torch.from_numpy(mean).to(image).reshape(shape)
    return (image - centre) / torch.from_numpy(std).to(image).reshape(shape)


def worker_init(worker_id: int) -> None:
    """One thread per loader process: OpenCV's and torch's own threads would only fight over the cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def read_label(entry: Entry, labels: str | Path, num_classes: int) -> Array:
    """The training label of an image: of its scribble, of its mask, or from a folder of pseudo-labels.

    Raises:
        UserError: there is none, or it is no index image of these classes.
    """
    if isinstance(labels, Path):
        return read_index_png(labels / f"{entry.name}.png", num_classes)
    if labels == "masks":
        if entry.label is None:
            raise UserError(f"{entry.image}: the image has no mask")
        return read_index_png(entry.label, num_classes)
    if entry.scribble is None:
        raise UserError(f"{entry.image}: the image has no scribble")
    return read_scribble(entry.scribble, entry.classes, num_classes)


def label_counts(entries: Sequence[Entry], labels: str | Path, num_classes: int) -> npt.NDArray[np.int64]:
    """Labelled pixels of every class over all images, (num_classes,)."""
    total = np.zeros(num_classes, np.int64)
    for entry in entries:
        counts = np.bincount(read_label(entry, labels, num_classes).ravel(), minlength=num_classes)
        total += counts[:num_classes]
    return total


class TrainingSet(TorchDataset[dict[str, Any]]):
    """Augmented crops, each a function of (seed, epoch, index) alone.

    Args:
        entries: of `Dataset.train`.
        data: channels, statistics and `long_side`.
        augment_config: the augmentation.
        seed: of the augmentation.
        labels: "scribbles", "masks", or a folder with a PNG of pseudo-labels per image.
        num_classes: labels are checked against it.
        superpixels: number of superpixels of the crop; 0 computes none.
        compactness: of the superpixels.

    `set[(epoch, index)]` is a dict: `name` str; `index` int; `image` float32 (C, crop, crop), normalised, 0
    on padding; `rgb` uint8 (3, crop, crop), the crop before normalisation; `label` uint8 (crop, crop), 255 =
    ignore, or int64 with 65535 = ignore where there are more than 255 classes; `valid` bool (crop, crop),
    False on padding; with superpixels also `superpixels` int32 (crop, crop), -1 on padding.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        data: DataConfig,
        augment_config: AugmentConfig,
        *,
        seed: int,
        labels: str | Path,
        num_classes: int,
        superpixels: int = 0,
        compactness: float = 10.0,
    ) -> None:
        if isinstance(labels, str) and labels not in ("scribbles", "masks"):
            raise ValueError(f"labels: {labels!r}; expected 'scribbles', 'masks' or a folder as a Path")
        check_augment(augment_config)
        self.entries = list(entries)
        self.data = data
        self.augment_config = augment_config
        self.seed = seed
        self.labels = labels
        self.num_classes = num_classes
        self.superpixels = superpixels
        self.compactness = compactness
        self.ignore = ignore_index(num_classes)
        self.mean, self.std = channel_statistics(data)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        entry = self.entries[index]
        pixels = read_image(entry.image, self.data.channels)
        label = read_label(entry, self.labels, self.num_classes)
        if label.shape != pixels.shape[:2]:
            raise UserError(f"{entry.image}: image of {pixels.shape[:2]}, label of {label.shape} (height, width)")
        fill = np.rint(self.mean * 255) if pixels.dtype == np.uint8 else self.mean
        crop, label, valid = augment(
            pixels,
            label,
            self.augment_config,
            np.random.default_rng((self.seed, epoch, index)),
            fill=fill.astype(pixels.dtype),
            ignore=self.ignore,
            long_side=self.data.long_side,
        )
        image = (to_unit_float(crop) - self.mean) / self.std
        image[~valid] = 0
        sample: dict[str, Any] = {
            "name": entry.name,
            "index": index,
            "image": _channels_first(image),
            "rgb": _channels_first(to_rgb(crop)),
            "label": _label_tensor(label),
            "valid": torch.from_numpy(valid),
        }
        if self.superpixels:
            sample["superpixels"] = self._superpixels(sample["rgb"], sample["valid"])
        return sample

    def _superpixels(self, rgb: Tensor, valid: Tensor) -> Tensor:
        import cc4s_kernels as ck

        ids: Tensor = ck.slic(rgb[None], self.superpixels, compactness=self.compactness, mask=valid[None])
        return ids[0]


class EvaluationSet(TorchDataset[dict[str, Any]]):
    """Whole images at their own size; `data.long_side` and inference sizes are the predictor's business.

    `set[i]` is a dict: `name` str; `image` float32 (C, H, W) in [0, 1], not normalised; `label` (H, W) as in
    `TrainingSet`, or None where the image has no mask. Use it with `batch_size=None`.
    """

    def __init__(self, entries: Sequence[Entry], data: DataConfig, num_classes: int) -> None:
        self.entries = list(entries)
        self.data = data
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        image = to_unit_float(read_image(entry.image, self.data.channels))
        label = None if entry.label is None else _label_tensor(read_index_png(entry.label, self.num_classes))
        if label is not None and label.shape != image.shape[:2]:
            raise UserError(f"{entry.label}: {tuple(label.shape)}, but the image is {image.shape[:2]} (height, width)")
        return {"name": entry.name, "image": _channels_first(image), "label": label}


def _channels_first(image: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _label_tensor(label: Array) -> Tensor:
    return torch.from_numpy(label if label.dtype == np.uint8 else label.astype(np.int64))


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for a number of optimiser steps.

    Training sees one endless list: the permutations of epoch 0, 1, 2, ..., each a function of (seed, epoch).
    Step s takes positions s * batch_size to (s + 1) * batch_size of it, cut into `accumulate` micro-batches,
    each cut into one contiguous part per process. So neither a resume nor the number of processes changes
    what step s sees.

    Args:
        length: number of training images.
        batch_size: images per optimiser step, over all processes and micro-batches.
        seed: of the permutations.
        start_step, total_steps: yields steps start_step to total_steps - 1, `accumulate` lists for each.
        accumulate: micro-batches per step.
        rank, world_size: this process and their number.

    Raises:
        UserError: nothing to train on, or the batch does not divide.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        total_steps: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise UserError("the training list is empty")
        if batch_size < 1 or accumulate < 1:
            raise UserError(
                f"train.batch_size, train.accumulate: {batch_size}, {accumulate}; expected positive numbers"
            )
        if batch_size % (accumulate * world_size):
            raise UserError(
                f"train.batch_size: {batch_size} is not divisible by train.accumulate * processes = "
                f"{accumulate} * {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank}, expected 0 to {world_size - 1}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step: {start_step}, expected 0 to total_steps = {total_steps}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.accumulate * self.world_size)
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.total_steps):
            for part in range(self.accumulate):
                first = step * self.batch_size + (part * self.world_size + self.rank) * share
                batch = []
                for position in range(first, first + share):
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                    batch.append((epoch, int(order[position % self.length])))
                yield batch
