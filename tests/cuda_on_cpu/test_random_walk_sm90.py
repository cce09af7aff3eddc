"""The Hopper kernels of `random_walk` on the CPU against a float64 definition."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from cc4s_kernels.ops.random_walk import steps as walk
from tests.cuda_on_cpu.build import library
from tests.cuda_on_cpu.pairwise import DTYPES, TYPES, relative_error
from tests.cuda_on_cpu.test_random_walk import NAMES, KernelsOnCpu, definition, eager, inputs

Options = tuple[float, int, float]


class HopperOnCpu(KernelsOnCpu):
    def run(self, function: str, arguments: Any, like: Tensor, *options: int) -> None:
        kernels = library("random_walk_sm90")
        getattr(kernels, function)(ctypes.byref(arguments), TYPES[like.dtype], *options, self.seed)


def run(inputs: tuple[Any, ...], options: Options, seed: int) -> tuple[Tensor, ...]:
    """y, lse2 and the gradients of q, k and v."""
    q, k, v, grads, mask = inputs
    kernels = HopperOnCpu(seed, 0)
    y, lse2, states = walk.forward(kernels, q, k, v, mask, *options)
    found = walk.backward(kernels, q, k, v, mask, y, lse2, states, *grads, *options, True, True)
    return y, lse2, *found


def without_nan(given: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, (y_grad, lse_grad), mask = given
    return q.nan_to_num(), k.nan_to_num(), v.nan_to_num(), (y_grad.nan_to_num(), lse_grad), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "key", "value", "masked"),
    [
        (1, 128, 64, 512, False),  # the published widths, tiles without a rest
        (2, 133, 64, 256, True),  # a second block; an image without a valid position
        (1, 70, 40, 136, True),  # widths that leave a part of a slab unused, two parts of columns
        (1, 65, 128, 320, False),  # d = 128
        (1, 1, 8, 8, False),
    ],
)
def test_equals_the_definition(batch: int, n: int, key: int, value: int, masked: bool, dtype: torch.dtype) -> None:
    """At most twice the error of the same in PyTorch, plus eps."""
    given = inputs(batch, n, key, value, dtype, masked, n)
    options = (0.8, 1, 0.0)
    found = run(given, options, n % 5)
    clean = without_nan(given)
    exact, other = definition(*clean, options), eager(*clean, options[0])
    for name, x, expected, theirs in zip(NAMES, found, exact, other, strict=True):
        eps = torch.finfo(torch.float32 if name == "lse2" else dtype).eps
        assert relative_error(x, expected) <= 2 * relative_error(theirs, expected) + eps, name


def test_two_steps_with_a_restart() -> None:
    """The sums of gradients are float32; states, their gradients and what is rounded in between have 8 bits."""
    given = inputs(1, 70, 64, 72, torch.bfloat16, True, 3)
    options = (0.8, 2, 0.25)
    for name, x, expected in zip(NAMES, run(given, options, 1), definition(*without_nan(given), options), strict=True):
        assert relative_error(x, expected) <= 4 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_changes_a_bit(seed: int) -> None:
    """Copies and products that run early or late, and warps that are slow; more tiles than buffers in a ring."""
    given = inputs(1, 460, 64, 64, torch.bfloat16, True, 5)
    for name, x, expected in zip(NAMES, run(given, (0.8, 1, 0.0), seed), in_order(), strict=True):
        assert torch.equal(x, expected), name


def in_order() -> tuple[Tensor, ...]:
    return run(inputs(1, 460, 64, 64, torch.bfloat16, True, 5), (0.8, 1, 0.0), 0)
