"""Tiny runs for the tests of the engine and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The smallest run that still has every stage.
TINY = (
    "budget=smoke",
    "augment.crop=33",
    "data.synthetic_size=32",
    "data.synthetic_train=4",
    "data.synthetic_eval=2",
    "model.width=4",
    "model.head_channels=16",
    "loss.superpixels=9",
    "train.batch_size=2",
    "train.iterations=4",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.workers=0",
    "inference.scales=[1.0]",
    "inference.long_side=0",
    "inference.window=65",
    "inference.flip=false",
    "report.images=1",
    "report.eigenvectors=2",
)


def command(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m cc4s ...` in a process of its own, one thread."""
    return subprocess.run(
        [sys.executable, "-m", "cc4s", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(env),
    )


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **(extra or {})}


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def loss_curve(out: Path) -> dict[tuple[str, int], float]:
    """(stage, step) -> loss; the last entry counts."""
    return {(e["stage"], e["step"]): e["loss"] for e in read_log(out) if e["event"] == "step"}
