"""Experiment trackers beside the run's own log: TensorBoard and Weights & Biases, where asked for and installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cc4s.config import Config, to_dict
from cc4s.errors import UserError

# Called with the name of a number, its value and the step of its stage.
Tracker = Callable[[str, float, int], None]


def require(config: Config) -> None:
    """Raises UserError where `report.tensorboard` or `report.wandb` asks for a package that is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.report, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"key report.{name}: needs the package {name} (pip install {name})")


def open_trackers(config: Config, folder: Path) -> list[Tracker]:
    """The trackers that `report.tensorboard` and `report.wandb` ask for; `require` has seen that they are there."""
    opened: list[Tracker] = []
    if config.report.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        opened.append(SummaryWriter(str(folder / "tensorboard")).add_scalar)
    if config.report.wandb:
        import wandb

        run: Any = wandb.init(project="cc4s", name=folder.name, dir=str(folder), config=to_dict(config))
        opened.append(lambda name, value, step: run.log({name: value, "step": step}))
    return opened
