"""Looks at every file of a dataset before anything is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cc4s.config import DataConfig
from cc4s.data.dataset import Dataset, Entry
from cc4s.data.images import Array, ignore_index, read_image, read_index_png, verify_png
from cc4s.data.strokes import read_scribble
from cc4s.errors import UserError
from cc4s.progress import progress_bar

logger = logging.getLogger("cc4s")


def check_dataset(
    dataset: Dataset,
    config: DataConfig,
    *,
    labels: bool = False,
    scribbles: bool = True,
    progress: bool = False,
) -> None:
    """Decodes every file that a run will need; raises at the first bad one, in the order of the lists.

    Args:
        dataset: from `open_dataset`.
        config: what it was opened with.
        labels: whether training needs masks. Those of evaluation images are always needed.
        scribbles: whether training needs scribbles.
        progress: show a progress bar.

    Raises:
        UserError: a missing, unreadable or corrupt file; another number of channels; image, mask and scribble
            of different sizes; a label that is no class; a colour image for a mask; no labelled pixel in all
            scribbles, in all masks of the training set, or in all masks of the evaluation set.
    """
    count = dataset.num_classes
    ignore = ignore_index(count)

    def check(job: tuple[Entry, bool]) -> tuple[bool, bool]:
        """Whether any pixel of the scribble, and of the mask, is labelled."""
        entry, training = job
        image = read_image(entry.image, config.channels)
        if entry.image.suffix.lower() == ".png":
            verify_png(entry.image)
        drawn = labelled = False
        if training and scribbles:
            path = _existing(entry.scribble, dataset.scribble_folder, entry, "training scribble (.png, .xml, .json)")
            drawn = bool((_read(path, entry, image, lambda: read_scribble(path, entry.classes, count)) != ignore).any())
        if not training or labels:
            mask_path = _existing(entry.label, dataset.label_folder, entry, "mask")
            mask = _read(mask_path, entry, image, lambda: read_index_png(mask_path, count))
            labelled = bool((mask != ignore).any())
        return drawn, labelled

    jobs = [(entry, True) for entry in dataset.train] + [(entry, False) for entry in dataset.eval]
    executor = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        results = list(
            progress_bar(executor.map(check, jobs), "checking data", "image", show=progress, total=len(jobs))
        )
    finally:
        executor.shutdown(wait=True, cancel_futures=True)

    trained, evaluated = results[: len(dataset.train)], results[len(dataset.train) :]
    if scribbles and trained:
        _check_drawn([entry.name for entry in dataset.train], [drawn for drawn, _ in trained], dataset.scribble_folder)
    if labels and trained and not any(labelled for _, labelled in trained):
        raise UserError(f"{dataset.label_folder}: no labelled pixel in the masks of all {len(trained)} training images")
    if evaluated and not any(labelled for _, labelled in evaluated):
        raise UserError(
            f"{dataset.label_folder}: no labelled pixel in the masks of all {len(evaluated)} images of "
            f"{dataset.eval_name}.txt"
        )


def _existing(path: Path | None, folder: Path, entry: Entry, what: str) -> Path:
    if path is None:
        raise UserError(f"{folder / (entry.name + '.png')}: no {what} for image '{entry.name}'")
    return path


def _read(path: Path, entry: Entry, image: Array, read: Callable[[], Array]) -> Array:
    mask = read()
    if path.suffix.lower() == ".png":
        verify_png(path)
    if mask.shape != image.shape[:2]:
        raise UserError(
            f"{path}: {mask.shape[1]} x {mask.shape[0]} pixels, but {entry.image} has "
            f"{image.shape[1]} x {image.shape[0]} (width x height)"
        )
    return mask


def _check_drawn(names: Sequence[str], drawn: Sequence[bool], folder: Path) -> None:
    empty = [name for name, any_pixel in zip(names, drawn, strict=True) if not any_pixel]
    if len(empty) == len(names):
        raise UserError(f"{folder}: no scribbled pixel in all {len(names)} training images")
    if empty:
        logger.warning("%d of %d training images have no scribbled pixel (first: %s)", len(empty), len(names), empty[0])
