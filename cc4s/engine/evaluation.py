"""Evaluation and pseudo-labels: what a trained network says of whole images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cc4s.config import Config
from cc4s.data import (
    Dataset,
    Entry,
    EvaluationSet,
    ignore_index,
    read_index_png,
    read_scribble,
    to_rgb,
    write_index_png,
)
from cc4s.engine import crf
from cc4s.engine.inference import Predictor
from cc4s.engine.metrics import SegmentationMetrics
from cc4s.engine.runtime import Runtime
from cc4s.progress import progress_bar

logger = logging.getLogger("cc4s")


def evaluate(
    network: torch.nn.Module, dataset: Dataset, config: Config, runtime: Runtime, *, label: str
) -> dict[str, Any]:
    """Metrics of a network on the evaluation split, shared over processes.

    Args:
        network: on the runtime's device.
        dataset: its `eval` entries need masks.
        config: inference options, channel statistics, classes left out of means, volumes.
        runtime: device and processes.
        label: text of the progress bar.

    Returns:
        What `SegmentationMetrics.compute` returns; with a CRF also `crf`, how it ran.
    """
    metrics = new_metrics(dataset, config)
    mine = runtime.share(dataset.eval)
    for name, probability, sample in predictions(network, mine, config, runtime, len(dataset.classes), label):
        metrics.update(name, probability.argmax(0).cpu(), sample["label"])
    merged = new_metrics(dataset, config)
    for state in runtime.gather(metrics.state()):
        merged.merge(state)
    return merged.compute() | _crf_note(config.inference.crf, config, runtime)


def _crf_note(used: bool, config: Config, runtime: Runtime) -> dict[str, str]:
    """What a result says of the CRF: how it ran, where it ran."""
    return {"crf": crf.describe(config.crf, runtime.device)} if used else {}


def new_metrics(dataset: Dataset, config: Config) -> SegmentationMetrics:
    """Empty metrics with the dataset's classes and the configuration's exclusions and volumes."""
    return SegmentationMetrics(
        dataset.classes,
        exclude=config.data.exclude_from_mean,
        volume_pattern=config.data.volume_pattern,
        ignore_index=ignore_index(len(dataset.classes)),
    )


def predictions(
    network: torch.nn.Module,
    entries: Sequence[Entry],
    config: Config,
    runtime: Runtime,
    num_classes: int,
    label: str,
    use_crf: bool | None = None,
) -> Any:
    """Yields (name, probabilities (C, H, W), sample) for `entries`: this process's share of the work."""
    predictor = Predictor(network, config.inference, config.data)
    images = EvaluationSet(entries, config.data, num_classes)
    refine = config.inference.crf if use_crf is None else use_crf
    if refine and runtime.is_main:
        logger.info("dense CRF: %s", crf.describe(config.crf, runtime.device))
    for index in progress_bar(range(len(images)), label, "image", show=runtime.is_main):
        sample = images[index]
        with runtime.fabric.autocast():
            probability = predictor.probabilities(sample["image"])
        if refine:
            probability = crf.refine(probability, as_uint8(sample["image"]), config.crf)
        yield sample["name"], probability, sample


def as_uint8(image: Tensor) -> np.ndarray:
    """(channels, H, W) in [0, 1] -> (H, W, 3) uint8, as `cc4s.data.to_rgb`."""
    return to_rgb(image.permute(1, 2, 0).cpu().numpy())


def pseudo_label(probability: Tensor, scribble: np.ndarray | None, threshold: float, ignore_index: int) -> np.ndarray:
    """argmax where the largest probability reaches `threshold`, else ignore; then the scribbles on top.

    Args:
        probability: (C, H, W).
        scribble: (H, W) class indices, `ignore_index` where unlabelled; None has none.
        threshold: least probability of a label, in [0, 1].

    Returns:
        (H, W) uint8, or uint16 for more than 255 classes.

    Source: docs/method.md section 6.
    """
    best, label = probability.max(0)
    mask = torch.where(best >= threshold, label, ignore_index).cpu().numpy()
    if scribble is not None:
        mask = np.where(scribble != ignore_index, scribble, mask)
    return mask.astype(np.uint8 if probability.shape[0] <= 255 else np.uint16)


def write_pseudo_labels(
    network: torch.nn.Module, dataset: Dataset, config: Config, runtime: Runtime, folder: Path
) -> dict[str, Any]:
    """Writes a pseudo-label PNG for every training image; files that are already there are kept.

    Returns:
        `coverage` (share of labelled pixels), `images`, and, where training masks exist, the metrics of the labelled
        pixels against them; with a CRF also `crf`, how it ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_classes = len(dataset.classes)
    # The share comes first: what is missing changes while the processes write.
    mine = runtime.share(dataset.train)
    missing = [entry for entry in mine if not (folder / f"{entry.name}.png").is_file()]
    by_name = {entry.name: entry for entry in missing}
    for name, probability, _ in predictions(
        network, missing, config, runtime, num_classes, "pseudo-labels", use_crf=config.pseudo.crf
    ):
        entry = by_name[name]
        scribble = None if entry.scribble is None else read_scribble(entry.scribble, entry.classes, num_classes)
        mask = pseudo_label(probability, scribble, config.pseudo.threshold, ignore_index(num_classes))
        write_index_png(folder / f"{name}.png", mask, dataset.palette, num_classes)
    runtime.barrier()
    return _judge_pseudo_labels(dataset, config, runtime, folder)


def _judge_pseudo_labels(dataset: Dataset, config: Config, runtime: Runtime, folder: Path) -> dict[str, Any]:
    num_classes = len(dataset.classes)
    ignore = ignore_index(num_classes)
    metrics = new_metrics(dataset, config)
    labelled = pixels = 0
    for entry in runtime.share(dataset.train):
        mask = read_index_png(folder / f"{entry.name}.png", num_classes)
        labelled += int((mask != ignore).sum())
        pixels += mask.size
        if entry.label is not None:
            truth = read_index_png(entry.label, num_classes)
            where = mask != ignore
            metrics.update(entry.name, np.where(where, mask, 0), np.where(where, truth, ignore))
    merged = new_metrics(dataset, config)
    shares = runtime.gather((metrics.state(), labelled, pixels))
    for state, _, _ in shares:
        merged.merge(state)
    total = sum(share[2] for share in shares)
    result: dict[str, Any] = {
        "coverage": sum(share[1] for share in shares) / max(1, total),
        "images": len(dataset.train),
    }
    if any(entry.label is not None for entry in dataset.train):
        result |= merged.compute()
    return result | _crf_note(config.pseudo.crf, config, runtime)
