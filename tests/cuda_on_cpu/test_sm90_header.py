"""`sm90_on_cpu.h` itself: copies and products do what Hopper's do, and mistakes show."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.build import library, pointer
from tests.ops.tester import generator


def products(function: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """a bᵀ b of 64 rows as the kernel finds it, and exactly; integers, so that nothing is rounded."""
    g = generator(rows)
    a, b = (torch.randint(-2, 3, (rows, 64), generator=g).half() for _ in "ab")
    out = torch.full((64, 64), torch.nan)
    getattr(library("sm90_header"), function)(pointer(a), pointer(b), rows, pointer(out), seed)
    whole = [torch.nn.functional.pad(x.float(), (0, 0, 0, max(0, 64 - rows)))[:64] for x in (a, b)]
    return out, whole[0] @ whole[1].mT @ whole[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [128, 41])
def test_products_of_copies(rows: int, seed: int) -> None:
    found, expected = products("run_products", rows, seed)
    assert torch.equal(found, expected)


def test_sums_that_are_read_too_early_are_nan() -> None:
    assert bool(products("run_no_wait", 128, 0)[0].isnan().all())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("run_no_fence", "a product without a fence after the last wait"),
        ("run_no_copy", "a thread waits for what never comes"),
    ],
)
def test_errors_end_the_process(function: str, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({library('sm90_header')._name!r}).{function}()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert f": {message}" in result.stderr
