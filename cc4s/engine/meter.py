"""Peak memory of a part of the program."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Starts the high-water mark again from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        # Some containers forbid it: the mark is then that of the whole process.
        with contextlib.suppress(OSError):
            _RESET.write_text("5")


def peak_memory_mb(device: torch.device) -> float | None:
    """The high-water mark in MB: of PyTorch's tensors on a GPU, of the process (Linux) on a CPU; None elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if not _STATUS.exists():
        return None
    return round(int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) / 1024, 1)
