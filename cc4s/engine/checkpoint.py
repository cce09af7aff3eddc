"""Checkpoints: written atomically, read without ever running pickled code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cc4s import config as configuration
from cc4s.config import Config
from cc4s.errors import UserError
from cc4s.files import atomic_write
from cc4s.models import build_model, is_released_checkpoint, load_released_checkpoint, read_torch_file
from cc4s.models.weights import load_state

FORMAT = "cc4s-checkpoint-1"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds either the old or the new one, never a part."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    atomic_write(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint file onto the CPU.

    Raises:
        UserError: missing, damaged, holding pickled code, or not a cc4s checkpoint.
    """
    return _ours(read_torch_file(path), path)


def _ours(content: Any, path: Path) -> dict[str, Any]:
    """What was read from `path`, if it is a checkpoint of cc4s."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of cc4s (expected format {FORMAT})")
    return content


def load_weights(network: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Loads the weights of a checkpoint's content into a network, all or none.

    Raises:
        UserError: naming keys that are missing, unknown or of another shape.
    """
    load_state(network, content["model"], path, "this architecture")


class Trained:
    """A trained network with what is needed to use it.

    Attributes:
        network: in eval mode, on the CPU. config: the configuration it was trained with.
        classes: class names. stage: the training stage that wrote it.
    """

    def __init__(self, network: nn.Module, config: Config, classes: list[str], stage: str) -> None:
        self.network = network.eval()
        self.config = config
        self.classes = classes
        self.stage = stage


def load_trained(
    path: Path, overrides: list[str] | None = None, *, recipe: str | None = None, data: str | None = None
) -> Trained:
    """A network from a checkpoint of cc4s or of the authors, with a configuration to use it.

    Args:
        path: the checkpoint.
        overrides: key=value words over the configuration (inference options, data options).
        recipe: the recipe of an authors' checkpoint. If None: folder where `data` has that layout, else
            pascal_context for 60 classes, else voc2012. A checkpoint of cc4s holds its own configuration.
        data: the data folder; the configuration's if None.

    Raises:
        UserError: see `load` and `load_weights`; bad overrides.
    """
    path, words = Path(path), list(overrides or [])
    stored = read_torch_file(path)
    if not (isinstance(stored, dict) and is_released_checkpoint(stored)):
        content = _ours(stored, path)
        config = configuration.from_dict(content["config"], f"checkpoint {path}")
        if data is not None:
            config.data.root = data
        config = configuration.override(config, words)
        network: nn.Module = build_model(
            config.model,
            num_classes=len(content["classes"]),
            in_channels=config.data.channels,
            random_walk=content["random_walk"],
        )
        load_weights(network, content, path)
        return Trained(network, config, content["classes"], content["stage"])

    network = load_released_checkpoint(path)
    num_classes = network.state_dict()["head.conv6.1.weight"].shape[0]
    if recipe is None:
        recipe = "pascal_context" if num_classes == 60 else "voc2012"
        if data is not None and (Path(data) / "images").is_dir():
            recipe = "folder"
    config = configuration.load_config(recipe, words, data__root=data)
    if config.model.shrink != 1:
        network = load_released_checkpoint(path, shrink=config.model.shrink)
    classes = config.data.classes or [f"class {index}" for index in range(num_classes)]
    return Trained(network, config, classes[:num_classes], "released")
