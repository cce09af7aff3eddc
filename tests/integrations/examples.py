"""Runs a script of examples/ in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def losses_of(name: str) -> list[float]:
    """The losses of each step of an example's training."""
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / name))["losses"]
    finally:
        sys.path.remove(str(FOLDER))
