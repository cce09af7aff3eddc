"""Experiment trackers beside the run's own log: TensorBoard and Weights & Biases, where asked for and installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cc4s.config import Config, to_dict
from cc4s.errors import UserError

# Called with the name of a number, its value and the step of its stage.
Tracker = Callable[[str, float, int], None]


def open_trackers(config: Config, folder: Path) -> list[Tracker]:
    """The trackers that `report.tensorboard` and `report.wandb` ask for.

    Raises:
        UserError: the package is not installed.
    """
    trackers: list[Tracker] = []
    if config.report.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "key report.tensorboard: needs the package tensorboard (pip install tensorboard)"
            ) from error
        trackers.append(SummaryWriter(str(folder / "tensorboard")).add_scalar)
    if config.report.wandb:
        try:
            import wandb
        except ImportError as error:
            raise UserError("key report.wandb: needs the package wandb (pip install wandb)") from error
        run: Any = wandb.init(project="cc4s", name=folder.name, dir=str(folder), config=to_dict(config))
        trackers.append(lambda name, value, step: run.log({name: value, "step": step}))
    return trackers
