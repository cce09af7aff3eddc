"""The Hopper kernels of `transition_consistency` on the CPU against a float64 definition."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.build import library
from tests.cuda_on_cpu.pairwise import DTYPES
from tests.cuda_on_cpu.test_transition_consistency import (
    NAMES,
    VECTORS,
    Divergences,
    KernelsOnCpu,
    assert_defined,
    inputs,
    run,
)


class HopperOnCpu(KernelsOnCpu):
    library = "transition_consistency_sm90"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "key", "masked"),
    [
        (1, 128, 64, False),  # tiles without a rest
        (2, 133, 64, True),  # a second block, an odd number of tiles; an image without a valid position
        (1, 70, 40, True),  # a part of a slab unused
        (1, 65, 128, False),  # d = 128
        (1, 200, 72, True),  # two slabs, one of them partly used
        (1, 1, 8, False),
    ],
)
def test_equals_the_definition(batch: int, n: int, key: int, masked: bool, dtype: torch.dtype) -> None:
    given = inputs(batch, n, key, dtype, masked, n)
    assert_defined(given, run(*given, HopperOnCpu(n % 5)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_swap_queries_and_keys(dtype: torch.dtype) -> None:
    given = inputs(1, 133, 64, dtype, True, 8)
    (q, k, q_target, k_target), grads, mask = given
    kl, diagonal, diagonal_target, k_grad, q_grad = run((k, q, k_target, q_target), grads, mask, HopperOnCpu(2))
    assert_defined(given, (kl, diagonal, diagonal_target, q_grad, k_grad), "column")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_are_at_distance_zero(dtype: torch.dtype) -> None:
    (q, k, *_), grads, mask = inputs(1, 140, 40, dtype, True, 3)
    given = (grads[0], torch.zeros_like(grads[0]))
    kl, diagonal, diagonal_target, *gradients = run((q, k, q, k), given, mask, HopperOnCpu(0))
    assert bool((kl == 0).all())
    assert torch.equal(diagonal, diagonal_target)
    assert all(bool((x == 0).all()) for x in gradients)


def test_first_keys_hidden() -> None:
    """Whole tiles without a key before the first one, and behind the last."""
    sides, grads, _ = inputs(1, 330, 16, torch.bfloat16, False, 4)
    mask = torch.zeros(1, 330, dtype=torch.bool)
    mask[:, 150:160] = True
    hidden = tuple(x.masked_fill(~mask[..., None], torch.nan) for x in sides)
    assert_defined((hidden, grads, mask), run(hidden, grads, mask, HopperOnCpu(1)))


def test_peaks_that_grow() -> None:
    """The scores of a later tile are far above those of an earlier one, and far below."""
    sides, grads, mask = inputs(1, 260, 32, torch.float16, False, 6)
    factors = torch.linspace(0.0, 6.0, 260, dtype=torch.float16)[:, None]
    for turned in (factors, factors.flip(0)):
        given = (sides[0], sides[1] * turned, sides[2], sides[3] * turned), grads, mask
        assert_defined(given, run(*given, HopperOnCpu(3)))


@pytest.mark.parametrize(
    ("shape", "scale", "taken"),
    [
        ((2, 9, 128), 1.0, True),
        ((2, 9, 136), 1.0, False),
        ((2, 9, 64), 0.0, False),
        ((2, 9, 64), -1.0, False),
        ((2, 9, 64), 1e-7, False),  # hidden scores would not be far below the others
    ],
)
def test_which_calls_run_here(shape: tuple[int, int, int], scale: float, taken: bool) -> None:
    assert takes((torch.zeros(shape, dtype=torch.bfloat16),) * 4, scale) == taken


def test_expanded_tensors_run_elsewhere() -> None:
    """A stride of 0 is none that TMA reads."""
    x = torch.zeros(2, 9, 64, dtype=torch.bfloat16)
    assert not takes((x, x, x, x[:1].expand(2, 9, 64)), 1.0)


def takes(sides: tuple[Tensor, ...], scale: float) -> bool:
    arguments = Divergences(HopperOnCpu.problem(sides, None, scale), *[None] * len(VECTORS))
    return bool(library(HopperOnCpu.library).takes(ctypes.byref(arguments)))


@functools.cache
def in_order() -> tuple[Tensor, ...]:
    return run(*inputs(1, 460, 64, torch.bfloat16, True, 5), HopperOnCpu(0))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_changes_a_bit(seed: int) -> None:
    """Copies and products that run early or late, and warps that are slow; more tiles than buffers in a ring."""
    found = run(*inputs(1, 460, 64, torch.bfloat16, True, 5), HopperOnCpu(seed))
    for name, x, expected in zip(NAMES, found, in_order(), strict=True):
        assert torch.equal(x, expected), name
