"""The CUDA kernels of `transition_consistency` on the CPU against a float64 definition."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from cc4s_kernels._cuda import aligned_rows
from cc4s_kernels.ops.transition_consistency import passes
from tests.cuda_on_cpu.build import library, pointer
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
from tests.ops.tester import generator

F, P = ctypes.c_float, ctypes.c_void_p
SIDES = ("q", "k", "q_target", "k_target")
Problem = structure(
    "Problem",
    ("batch", ctypes.c_int),
    ("n", ctypes.c_int),
    ("mask", P),
    ("factor", F),
    *((name, Rows) for name in SIDES),
)
VECTORS = ("kl", "diagonal", "diagonal_target", "lse2", "lse2_target")
Divergences = structure("Divergences", ("problem", Problem), *((name, P) for name in VECTORS))
Scores = structure(
    "Scores",
    ("problem", Problem),
    ("scale", F),
    *((name, P) for name in ("lse2", "lse2_target", "kl_grad", "trace_grad", "unit")),
    ("q_grad", Rows),
    ("k_grad", Rows),
)


class KernelsOnCpu:
    """As `cc4s_kernels.ops.transition_consistency.passes.Kernels` says."""

    rows = staticmethod(aligned_rows)
    library = "transition_consistency"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @staticmethod
    def problem(sides: tuple[Tensor, ...], mask: Tensor | None, scale: float) -> Any:
        return Problem(*sides[0].shape[:2], floats(mask), scale * LOG2_E, *map(rows, sides))

    def divergences(
        self, q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, ...]:
        out = tuple(torch.full(q.shape[:2], torch.nan) for _ in VECTORS)
        arguments = Divergences(self.problem((q, k, q_target, k_target), mask, scale), *map(floats, out))
        library(self.library).divergences(ctypes.byref(arguments), TYPES[q.dtype], self.seed)
        return out

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        lse2_target: Tensor,
        kl_grad: Tensor,
        trace_grad: Tensor,
        unit: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        grads = [torch.full(q.shape, torch.nan, dtype=q.dtype) for _ in "qk"]
        vectors = map(floats, (lse2, lse2_target, kl_grad, trace_grad, unit))
        problem = self.problem((q, k, q_target, k_target), mask, scale)
        arguments = Scores(problem, scale, *vectors, *map(rows, grads))
        library(self.library).scores(ctypes.byref(arguments), TYPES[q.dtype], self.seed)
        return grads[0], grads[1]


NAMES = (*VECTORS[:3], "q_grad", "k_grad")
SCALE = 0.8


def run(
    sides: tuple[Tensor, ...], grads: tuple[Tensor, Tensor], mask: Tensor | None, kernels: KernelsOnCpu
) -> tuple[Tensor, ...]:
    """kl, P_ii, P'_ii and the gradients of q and k."""
    found = passes.forward(kernels, *sides, mask, SCALE)
    kl, diagonal, diagonal_target, lse2, lse2_target = found
    gradients = passes.backward(kernels, *sides, mask, diagonal, lse2, lse2_target, *grads, SCALE)
    return kl, diagonal, diagonal_target, *gradients


def eager(
    sides: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
    normalize: str = "row",
) -> tuple[Tensor, ...]:
    """The same through the matrices, in `dtype`; the gradients are rounded to that of the inputs."""
    over = -1 if normalize == "row" else -2
    clean = [x.nan_to_num().to(dtype) for x in sides]
    q, k = leaves = [x.requires_grad_() for x in clean[:2]]
    log_p, log_target = (
        (
            (SCALE * (a @ b.mT))
            if mask is None
            else (SCALE * (a @ b.mT)).masked_fill(~mask.unsqueeze(-3 - over), torch.finfo(dtype).min)
        ).log_softmax(over)
        for a, b in ((q, k), clean[2:])
    )
    p, target = log_p.exp(), log_target.exp()
    kl = (target * (log_target - log_p).masked_fill(target == 0, 0.0)).sum(over)
    outputs = [kl, *(x.diagonal(dim1=-2, dim2=-1) for x in (p, target))]
    if mask is not None:
        outputs = [x.masked_fill(~mask, 0.0) for x in outputs]
    found = torch.autograd.grad(outputs[:2], leaves, [x.to(dtype) for x in grads])
    return tuple(x.detach() for x in (*outputs, *found))


def inputs(batch: int, n: int, key: int, dtype: torch.dtype, masked: bool, seed: int) -> Any:
    """Four sides, (kl_grad, diagonal_grad), mask; what is hidden is NaN."""
    mask = draw_mask(batch, n, seed) if masked else None
    q, k = (draw(batch, n, key, dtype=dtype, seed=seed + i, scale=1.5 * key**-0.25) for i in (1, 2))
    near = [x + 0.3 * draw(*x.shape, dtype=dtype, seed=seed + i) for i, x in ((3, q), (4, k))]
    grads = tuple(draw(batch, n, dtype=torch.float32, seed=seed + i) for i in (5, 6))
    return tuple(hidden_as_nan(x, mask) for x in (q, k, *near)), grads, mask


def assert_defined(given: Any, found: tuple[Tensor, ...], normalize: str = "row") -> None:
    """The error is at most twice that of the same in PyTorch, plus eps."""
    sides, grads, mask = given
    dtype = sides[0].dtype
    exact = eager(sides, grads, mask, torch.float64, normalize)
    single, rounded = (eager(sides, grads, mask, other, normalize) for other in (torch.float32, dtype))
    # A rounding of a score is a relative error of a probability, and where scores cancel in kl it is left (METHOD 5).
    largest = max(float((a.nan_to_num().float() @ b.nan_to_num().float().mT).abs().max()) for a, b in pairs(sides))
    for name, x, expected, *theirs in zip(NAMES, found, exact, single, rounded, strict=True):
        gradient = name.endswith("grad")
        # Scores and sums are float32; the gradients of scores are rounded.
        other = relative_error(theirs[1] if gradient else theirs[0], expected)
        eps = torch.finfo(dtype if gradient else torch.float32).eps
        # Relative to the largest probability, and absolute for kl.
        size = 1.0 if gradient else max(1.0, SCALE * largest)
        unit = max(expected.abs().max().item(), 1e-30) if name == "kl" else 1.0
        assert relative_error(x, expected) * unit <= 2 * other * unit + size * eps, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "key", "masked"), [(2, 1, 5, False), (2, 7, 64, True), (1, 65, 24, False), (2, 130, 72, True)]
)
def test_equals_the_definition(batch: int, n: int, key: int, masked: bool, dtype: torch.dtype) -> None:
    given = inputs(batch, n, key, dtype, masked, n)
    assert_defined(given, run(*given, KernelsOnCpu(n % 5)))


def pairs(sides: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    return sides[:2], sides[2:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_are_at_distance_zero(dtype: torch.dtype) -> None:
    (q, k, *_), grads, mask = inputs(1, 70, 40, dtype, True, 3)
    zero = torch.zeros_like(grads[0])
    kl, diagonal, diagonal_target, *gradients = run((q, k, q, k), (grads[0], zero), mask, KernelsOnCpu(0))
    assert bool((kl == 0).all())
    assert torch.equal(diagonal, diagonal_target)
    assert all(bool((x == 0).all()) for x in gradients)


def test_the_order_of_blocks_and_threads_changes_no_bit() -> None:
    sides, grads, mask = inputs(1, 70, 64, torch.bfloat16, True, 5)
    first, *others = (run(sides, grads, mask, KernelsOnCpu(seed)) for seed in (0, 1, 2))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_error_of_the_polynomial_exponential() -> None:
    """Every step of 2^-12 down to the smallest normal number, and random values between."""
    x = torch.cat([torch.arange(-126 * 4096, 4096) / 4096, -126 * torch.rand(300_000, generator=generator(1))])
    found = torch.full_like(x, torch.nan)
    library("transition_consistency").exp2_values(pointer(x), pointer(found), x.numel())
    error = (found.double() / x.double().exp2() - 1).abs().max().item()
    # 0.9e-7 of the polynomial, and the roundings of its evaluation.
    assert error < 1.7e-7
    special = torch.tensor([0.0, -127.0, -1000.0, -1e30, -torch.inf, -3.0])
    found = torch.full_like(special, torch.nan)
    library("transition_consistency").exp2_values(pointer(special), pointer(found), special.numel())
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.125]
