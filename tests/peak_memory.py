"""Peak memory of a call, C++ allocations included, measured in a process of its own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def grown_mb(run: Callable[[], object]) -> float:
    """MB by which the memory of this process exceeds, at its peak inside `run`, what it was before.

    Not from getrusage: a child process inherits the high-water mark of its parent. Linux only.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_mb("VmRSS")
    # Kept until the peak is read.
    result = run()
    peak = _status_mb("VmHWM")
    del result
    return peak - before


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def printed_by(code: str, *arguments: str, threads: int = 2) -> str:
    """What `code` prints in a process of its own; it can import this module."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
