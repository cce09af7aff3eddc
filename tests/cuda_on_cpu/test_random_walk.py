"""The CUDA kernels of `random_walk` on the CPU against a float64 definition."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from cc4s_kernels._cuda import aligned_rows
from cc4s_kernels.ops.random_walk import steps as walk
from cc4s_kernels.ops.random_walk.reference import random_walk as reference
from tests.cuda_on_cpu.build import library
from tests.cuda_on_cpu.pairwise import (
    DTYPES,
    LOG2_E,
    TYPES,
    Rows,
    draw,
    draw_mask,
    floats,
    hidden_as_nan,
    relative_error,
    rows,
    structure,
)

# Owned rows of more than 192 value columns stay in shared memory, or come through it with the others.
MOST_SHARED = {"resident": 227 * 1024, "streamed": 81 * 1024}

F, P = ctypes.c_float, ctypes.c_void_p
Problem = structure(
    "Problem", ("batch", ctypes.c_int), ("n", ctypes.c_int), ("mask", P), ("factor", F), ("keep", F), ("restart", F)
)
Step = structure("Step", ("problem", Problem), *((name, Rows) for name in ("q", "k", "x", "start", "y")), ("lse2", P))
Level = structure(
    "Level", ("problem", Problem), ("g", Rows), ("y", Rows), ("start", Rows), ("lse_grad", P), ("level", P)
)
Scores = structure(
    "Scores",
    ("problem", Problem),
    ("scale", F),
    *((name, Rows) for name in ("q", "k", "g", "x")),
    ("lse2", P),
    ("level", P),
    *((name, Rows) for name in ("q_grad", "k_grad", "q_sum", "k_sum")),
)


class KernelsOnCpu:
    """As `cc4s_kernels.ops.random_walk.steps.Kernels` says."""

    rows = staticmethod(aligned_rows)

    def __init__(self, seed: int, most_shared: int) -> None:
        self.seed, self.most_shared = seed, most_shared

    def run(self, function: str, arguments: Any, like: Tensor, *options: int) -> None:
        getattr(library("random_walk"), function)(ctypes.byref(arguments), TYPES[like.dtype], *options, self.seed)

    @staticmethod
    def problem(q: Tensor, mask: Tensor | None, scale: float, keep: float, restart: float) -> Any:
        return Problem(q.shape[0], q.shape[1], floats(mask), scale * LOG2_E, keep, restart)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        x: Tensor,
        start: Tensor,
        mask: Tensor | None,
        y: Tensor,
        lse2: Tensor,
        scale: float,
        restart: float,
    ) -> None:
        y.fill_(torch.nan)
        problem = self.problem(q, mask, scale, 1.0 - restart, restart)
        self.run("step", Step(problem, *map(rows, (q, k, x, start, y)), floats(lse2.fill_(torch.nan))), q, 0)

    def transposed(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        scale: float,
        keep: float,
        restart: float,
    ) -> Tensor:
        out = torch.full_like(g, torch.nan, memory_format=torch.contiguous_format)
        problem = self.problem(q, mask, scale, keep, restart)
        self.run("step", Step(problem, *map(rows, (q, k, g, g, out)), floats(lse2)), q, 1)
        return out

    def level(
        self, g: Tensor, y: Tensor, start: Tensor, mask: Tensor | None, lse_grad: Tensor | None, restart: float
    ) -> Tensor:
        level = torch.full(g.shape[:-1], torch.nan)
        problem = self.problem(g, mask, 1.0, 1.0 - restart, restart)
        self.run("level", Level(problem, rows(g), rows(y), rows(start), floats(lse_grad), floats(level)), g)
        return level

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        x: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        level: Tensor,
        q_grad: Tensor,
        k_grad: Tensor,
        scale: float,
        keep: float,
        accumulate: bool,
    ) -> None:
        nothing = rows(None)
        sums = (nothing, nothing, rows(q_grad), rows(k_grad))
        once = (rows(q_grad), rows(k_grad), nothing, nothing)
        if not accumulate:
            q_grad.fill_(torch.nan), k_grad.fill_(torch.nan)
        problem = self.problem(q, mask, scale, keep, 1.0 - keep)
        vectors = (floats(lse2), floats(level))
        arguments = Scores(problem, scale, *map(rows, (q, k, g, x)), *vectors, *(sums if accumulate else once))
        self.run("scores", arguments, q, self.most_shared)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grads: tuple[Tensor, Tensor],
    mask: Tensor | None,
    options: tuple[float, int, float],
    seed: int = 0,
    most_shared: int = MOST_SHARED["resident"],
) -> tuple[Tensor, ...]:
    """y, lse2 and the gradients of q, k and v."""
    kernels = KernelsOnCpu(seed, most_shared)
    y, lse2, states = walk.forward(kernels, q, k, v, mask, *options)
    found = walk.backward(kernels, q, k, v, mask, y, lse2, states, *grads, *options, True, True)
    return y, lse2, *found


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grads: tuple[Tensor, Tensor],
    mask: Tensor | None,
    options: tuple[float, int, float],
) -> tuple[Tensor, ...]:
    """The same in float64, by autograd through the matrix."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scale, steps, restart = options
    y, lse = reference(*leaves, mask=mask, scale=scale, steps=steps, restart=restart, return_lse=True)
    grad = grads[0].double(), grads[1].double()
    found = torch.autograd.grad((y, lse), leaves, grad, allow_unused=True)
    return tuple(x.detach() for x in (y, lse * LOG2_E, *found))


def eager(
    q: Tensor, k: Tensor, v: Tensor, grads: tuple[Tensor, Tensor], mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """One step as PyTorch does it in the dtype of the inputs, with P stored in it."""
    leaves = [(x if mask is None else x.masked_fill(~mask[..., None], 0.0)).requires_grad_() for x in (q, k, v)]
    scores = scale * (leaves[0] @ leaves[1].mT)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, :], torch.finfo(q.dtype).min)
    y, lse = scores.softmax(-1) @ leaves[2], scores.float().logsumexp(-1)
    if mask is not None:
        y, lse = y.masked_fill(~mask[..., None], 0.0), lse.masked_fill(~mask, 0.0)
    found = torch.autograd.grad((y, lse), leaves, grads)
    return tuple(x.detach() for x in (y, lse * LOG2_E, *found))


NAMES = ("y", "lse2", "q_grad", "k_grad", "v_grad")


def inputs(batch: int, n: int, key: int, value: int, dtype: torch.dtype, masked: bool, seed: int) -> Any:
    """q, k, v, (y_grad, lse_grad), mask; what is hidden is NaN."""
    mask = draw_mask(batch, n, seed) if masked else None
    q, k = (draw(batch, n, key, dtype=dtype, seed=seed + i, scale=1.5 * key**-0.25) for i in (1, 2))
    v, y_grad = (draw(batch, n, value, dtype=dtype, seed=seed + i) for i in (3, 4))
    q, k, v, y_grad = (hidden_as_nan(x, mask) for x in (q, k, v, y_grad))
    lse_grad = draw(batch, n, dtype=torch.float32, seed=seed + 5)
    return q, k, v, (y_grad, lse_grad), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "key", "value", "masked", "shared"),
    [
        (2, 1, 5, 3, False, "resident"),
        (2, 7, 64, 40, True, "resident"),
        (1, 65, 24, 264, False, "resident"),
        (2, 130, 72, 200, True, "streamed"),
    ],
)
def test_equals_the_definition(
    batch: int, n: int, key: int, value: int, masked: bool, shared: str, dtype: torch.dtype
) -> None:
    q, k, v, grads, mask = inputs(batch, n, key, value, dtype, masked, n)
    found = run(q, k, v, grads, mask, (0.8, 1, 0.0), n % 5, MOST_SHARED[shared])
    clean = [x.nan_to_num() for x in (q, k, v, grads[0])]
    exact = definition(*clean[:3], (clean[3], grads[1]), mask, (0.8, 1, 0.0))
    other = eager(*clean[:3], (clean[3], grads[1]), mask, 0.8)
    for name, x, expected, theirs in zip(NAMES, found, exact, other, strict=True):
        eps = torch.finfo(torch.float32 if name == "lse2" else dtype).eps
        assert relative_error(x, expected) <= 2 * relative_error(theirs, expected) + eps, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_steps_with_restart(dtype: torch.dtype) -> None:
    q, k, v, grads, mask = inputs(1, 33, 16, 24, dtype, True, 8)
    options = (-0.7, 3, 0.25)
    found = run(q, k, v, grads, mask, options)
    clean = [x.nan_to_num() for x in (q, k, v, grads[0])]
    exact = definition(*clean[:3], (clean[3], grads[1]), mask, options)
    for name, x, expected in zip(NAMES, found, exact, strict=True):
        # States and gradients are rounded at each of the three steps, in both directions.
        eps = torch.finfo(torch.float32 if name == "lse2" else dtype).eps
        assert relative_error(x, expected) <= 2 * 3 * eps, name


@pytest.mark.parametrize("shared", MOST_SHARED)
def test_the_order_of_blocks_and_threads_changes_no_bit(shared: str) -> None:
    q, k, v, grads, mask = inputs(1, 70, 72, 200, torch.bfloat16, True, 6)
    options = (1.0, 1, 0.0)
    first, *others = (run(q, k, v, grads, mask, options, seed, MOST_SHARED[shared]) for seed in (0, 1, 2))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_large_scores_stay_finite() -> None:
    q, k, v, grads, _ = inputs(1, 40, 8, 8, torch.bfloat16, False, 4)
    y, lse2, *gradients = run(q, k, v, grads, None, (1e4, 1, 0.0))
    exact = (1e4 * LOG2_E * (q.double() @ k.double().mT)).amax(-1)
    assert relative_error(lse2, exact) < 1e-6
    assert all(bool(torch.isfinite(x).all()) for x in (y, *gradients))
