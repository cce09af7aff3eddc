"""`cuda_on_cpu.h` itself: collectives and atomics do what CUDA's do, and mistakes show."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.build import library, pointer
from tests.ops.tester import generator

SEEDS = range(6)
"""0: everything in ascending order."""

LANES = torch.arange(32)


def run(function: str, *arguments: Tensor | int) -> None:
    getattr(library("header"), function)(*(pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def reversed_blocks(barrier: bool, seed: int) -> Tensor:
    out = torch.full((3, 64), -2, dtype=torch.int32)
    run("run_reverse", torch.arange(192, dtype=torch.int32), out, int(barrier), seed)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_block_barrier(seed: int) -> None:
    assert torch.equal(reversed_blocks(True, seed), torch.arange(192, dtype=torch.int32).view(3, 64).flip(1))


def test_a_missing_barrier_shows() -> None:
    found = [reversed_blocks(False, seed) for seed in SEEDS]
    assert all(bool((out == -1).any()) for out in found), "a value that is not there yet"
    assert len({tuple(out.flatten().tolist()) for out in found}) == len(SEEDS), "depends on the seed"


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(seed: int) -> None:
    values = torch.randn(32, dtype=torch.float64, generator=generator(1))
    out = torch.full((6, 32), torch.nan, dtype=torch.float64)
    run("run_shuffles", values, out, seed)
    # A lane without a source keeps its value.
    sources = [
        torch.full((32,), 5),
        LANES // 8 * 8 + 3,
        torch.where(LANES >= 3, LANES - 3, LANES),
        torch.where(LANES % 16 < 13, LANES + 3, LANES),
        LANES ^ 6,
        LANES,
    ]
    for found, source in zip(out, sources, strict=True):
        assert torch.equal(found, values[source])


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_and_reductions_of_some_lanes(seed: int) -> None:
    values = torch.randint(0, 9, (64,), generator=generator(2), dtype=torch.int32)
    values[40] = 9
    out = torch.full((7, 64), -2, dtype=torch.int32)
    run("run_votes", values, out, seed)
    for warp in (0, 32):
        own = values[warp : warp + 20]
        bits = 2 ** torch.arange(20)
        expected = [
            (bits * (own > 3)).sum().expand(20),
            (own > 8).any().expand(20),
            torch.ones(20),
            (bits * (own == own[:, None])).sum(1),
            own.sum().expand(20),
            own.min().expand(20),
            own.max().expand(20),
        ]
        assert torch.equal(out[:, warp : warp + 20], torch.stack([e.int() for e in expected]))
        assert bool((out[:, warp + 20 : warp + 32] == -2).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_of_a_block(seed: int) -> None:
    values = torch.randint(0, 8, (64,), generator=generator(3), dtype=torch.int32)
    out = torch.full((2, 64), -2, dtype=torch.int32)
    run("run_block_votes", values, out, seed)
    assert torch.equal(out[0], (values > 3).sum().int().expand(64))
    assert not bool(out[1].any())


def test_atomics() -> None:
    values = torch.randint(3, 20, (64,), generator=generator(4), dtype=torch.int32)
    orders = set()
    for seed in SEEDS:
        totals = torch.tensor([0, 99, -99, 0, -1, -1], dtype=torch.int32)
        tickets = torch.full((64,), -2, dtype=torch.int32)
        run("run_atomics", values, totals, tickets, seed)
        assert torch.equal(tickets.sort().values, torch.arange(64, dtype=torch.int32))
        bits = sum(1 << value for value in set(values.tolist()))
        assert totals[:4].tolist() == [64, int(values.min()), int(values.max()), bits]
        assert totals[4] in values
        assert totals[5] in values
        orders.add(tuple(tickets.tolist()))
        if seed == 0:
            assert tickets.tolist() == list(range(64))
    assert len(orders) == len(SEEDS), "a seed is an order"


def test_a_copy_happens_when_it_is_waited_for() -> None:
    values = torch.arange(1, 9, dtype=torch.int32)
    for groups, expected in ((0, [-1, -1, -1, -1]), (1, [1, 3, -1, -1]), (2, [1, 3, 0, 0])):
        out = torch.full((4,), -2, dtype=torch.int32)
        run("run_copies", values, out, groups, 0)
        assert out.tolist() == expected


def test_half_precision_numbers() -> None:
    """All of both kinds, and roundings of floats of every size, ties among them."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    out = torch.full((2, 65536), torch.nan)
    run("widen_all", out)
    for found, dtype in zip(out, (torch.bfloat16, torch.float16), strict=True):
        assert torch.equal(found.nan_to_num(nan=7), bits.view(dtype).float().nan_to_num(nan=7))
    ties = (out[1, :31744] + out[1, 1:31745]) / 2
    wide = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator(5), dtype=torch.int32).view(torch.float32)
    values = torch.cat([ties, -ties, wide, 4 * torch.randn(50_000, generator=generator(6))])
    rounded = [torch.zeros(len(values), dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    run("round_all", values, *rounded, len(values))
    for found in rounded:
        assert torch.equal(found.nan_to_num(nan=7), values.to(found.dtype).nan_to_num(nan=7))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("run_half_of_a_warp", "a mask names a lane that has ended"),
        ("run_not_in_the_mask", "a lane calls a collective whose mask does not name it"),
        ("run_two_barriers", "a lane waits in a collective that the others of its mask do not reach"),
        ("run_no_blocks", "an empty grid"),
        ("run_large_block", "a block of this size"),
    ],
)
def test_errors_end_the_process(function: str, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({library('header')._name!r}).{function}()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert f": {message}" in result.stderr
