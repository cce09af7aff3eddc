"""What a trained network is used for: evaluation, pseudo-labels and masks of new images."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cc4s.data import Dataset, Entry, check_dataset, open_dataset, read_image, voc_palette, write_index_png
from cc4s.data.images import IMAGE_SUFFIXES
from cc4s.engine import evaluation
from cc4s.engine.checkpoint import Trained
from cc4s.engine.runtime import Runtime, kernels
from cc4s.errors import UserError
from cc4s.files import atomic_write, atomic_write_json, check_output_file
from cc4s.report import overlay


def evaluate_checkpoint(trained: Trained, out: Path | None = None) -> dict[str, Any]:
    """Metrics of a trained network on the evaluation split of its configuration's data; {} on other processes.

    Raises:
        UserError: unusable data, or another number of classes.
    """
    if out is not None:
        check_output_file(out, "--out")
    config = trained.config
    runtime = Runtime(config)
    with _opened(trained, splits=("eval",)) as dataset, kernels(config.kernels):
        network = trained.network.to(runtime.device)
        result = evaluation.evaluate(network, dataset, config, runtime, label="evaluation")
    if not runtime.is_main:
        return {}
    if out is not None:
        atomic_write_json(out, result)
    return result


def pseudo_label_folder(trained: Trained, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Pseudo-labels for the training images of the configuration's data, as PNGs in `out`.

    The same call goes on where it was interrupted: pseudo_labels.json says what the PNGs were made with.

    Returns:
        `images`, `coverage` and, where masks exist, the metrics of the labelled pixels; {} on other processes.

    Raises:
        UserError: unusable data, or `out` holds anything else.
    """
    config = trained.config
    runtime = Runtime(config)
    settings = {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "data": asdict(config.data),
        "inference": asdict(config.inference),
        "pseudo": asdict(config.pseudo),
    }
    if config.pseudo.crf:
        settings["crf"] = asdict(config.crf)
    stamp = out / "pseudo_labels.json"
    if runtime.is_main:
        if out.is_dir() and any(out.iterdir()) and not stamp.is_file():
            raise UserError(f"--out {out}: not empty and not written by this command; choose another folder")
        if stamp.is_file() and json.loads(stamp.read_text())["settings"] != settings:
            raise UserError(
                f"--out {out}: holds pseudo-labels of another checkpoint or of other settings; choose another folder"
            )
    with _opened(trained, splits=("train",)) as dataset, kernels(config.kernels):
        network = trained.network.to(runtime.device)
        if runtime.is_main:
            atomic_write_json(stamp, {"settings": settings})
        runtime.barrier()
        result = evaluation.write_pseudo_labels(network, dataset, config, runtime, out)
    if not runtime.is_main:
        return {}
    atomic_write_json(stamp, {"settings": settings, "result": result})
    return result


def predict_images(trained: Trained, inputs: Sequence[Path], out: Path, *, overlays: bool = True) -> int:
    """Writes `out`/masks/<name>.png (palette PNG of class indices) and `out`/overlays/<name>.png for every image.

    Args:
        trained: network and configuration. inputs: image files, or folders of images. out: where to write.
        overlays: write the overlays too.

    Returns:
        Number of images; 0 on other processes.

    Raises:
        UserError: no image, an unreadable one, or two of the same name.
    """
    if (out / "config.yaml").exists():
        raise UserError(f"--out {out}: is the folder of a run; choose another one")
    files = _image_files(inputs)
    config, num_classes = trained.config, len(trained.classes)
    for path in files:
        read_image(path, config.data.channels)
    runtime = Runtime(config)
    palette = voc_palette()
    entries = [Entry(path.stem, path) for path in files]
    (out / "masks").mkdir(parents=True, exist_ok=True)
    with kernels(config.kernels):
        network = trained.network.to(runtime.device)
        for name, probability, sample in evaluation.predictions(
            network, runtime.share(entries), config, runtime, num_classes, "predict"
        ):
            mask = probability.argmax(0).cpu().numpy().astype(np.uint8 if num_classes <= 255 else np.uint16)
            write_index_png(out / "masks" / f"{name}.png", mask, palette, num_classes)
            if overlays:
                picture = overlay(evaluation.as_uint8(sample["image"]), mask, palette)
                (out / "overlays").mkdir(exist_ok=True)
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                atomic_write(out / "overlays" / f"{name}.png", buffer.getvalue())
    runtime.barrier()
    return len(files) if runtime.is_main else 0


def _image_files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no image in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    seen: dict[str, Path] = {}
    for path in files:
        if path.stem in seen:
            raise UserError(f"{path}: has the same name as {seen[path.stem]}; their masks would be one file")
        seen[path.stem] = path
    return files


@contextmanager
def _opened(trained: Trained, *, splits: tuple[str, ...]) -> Iterator[Dataset]:
    """The configuration's data, checked, with as many classes as the network.

    What has to be generated (synthetic scenes, scribbles) is drawn anew, from the run's seed, for the time of use.
    """
    config = trained.config
    with tempfile.TemporaryDirectory() as work:
        dataset = open_dataset(config.data, seed=config.seed, work=Path(work), splits=splits, progress=True)
        if len(dataset.classes) != len(trained.classes):
            raise UserError(
                f"--data {config.data.root}: {len(dataset.classes)} classes, but the checkpoint has"
                f" {len(trained.classes)}"
            )
        check_dataset(dataset, config.data, labels=False, scribbles=False, progress=True)
        yield dataset
