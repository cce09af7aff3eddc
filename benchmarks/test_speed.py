"""The fastest backend of every op at a middle size, for pytest-benchmark: regressions of our own kernels.

`make bench-baseline` writes the times of this kind of processor into benchmarks/results/speed, `make bench-compare`
compares with them and fails where a median is slower by a third.
"""

from __future__ import annotations

import pytest
import torch

import cc4s_kernels as ck
from benchmarks.harness import Case
from benchmarks.registry import BENCHMARKS

# Large enough that the kernel is what is measured, small enough for some milliseconds a call.
MIDDLE = {"N": 1024, "h": 33, "w": 33, "H": 257, "W": 257, "K": 200}
CPU = torch.device("cpu")


def middle_cases() -> list[Case]:
    """The first size and dtype of each op, both passes, where it has a kernel."""
    cases = []
    for op, module in BENCHMARKS.items():
        if "cpu" in ck.backends.available(op):
            made = module.cases([{key: MIDDLE.get(key, value) for key, value in module.SIZES[0].items()}])
            cases += [case for case in made if case.dtype == made[0].dtype]
    return cases


@pytest.mark.parametrize("case", middle_cases(), ids=lambda case: f"{case.op}-{case.pass_}")
def test_speed(case: Case, benchmark: pytest.FixtureRequest) -> None:
    provider = next(p for p in BENCHMARKS[case.op].providers(case, CPU) if p.name == "cc4s cpu")
    run = provider.make(case, CPU)
    assert benchmark(run)
