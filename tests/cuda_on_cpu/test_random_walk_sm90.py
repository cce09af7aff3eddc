"""The Hopper kernels of `random_walk` on the CPU, against the reference in float64."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cc4s_kernels.ops.random_walk.reference import random_walk
from tests.cuda_on_cpu.build import library, pointer
from tests.ops.tester import generator

SCALE, RESTART = 0.3, 0.25
LN_2 = math.log(2.0)


class Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("batch", "n", "key", "value"))


class Options(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_float),
        ("keep", ctypes.c_float),
        ("restart", ctypes.c_float),
        ("bfloat16", ctypes.c_int),
        ("seed", ctypes.c_uint),
    )


class Case(NamedTuple):
    """Rows of q, k, v and the gradient g that are no state are 0, as the launcher makes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    mask: Tensor | None
    lse_grad: Tensor
    restart: float

    @classmethod
    def make(
        cls, sizes: tuple[int, int, int, int], dtype: torch.dtype, masked: bool = False, restart: float = 0.0
    ) -> Case:
        batch, n, key, value = sizes
        g = generator(n)
        mask = torch.rand(batch, n, generator=g) > 0.3 if masked else None
        tensors = [torch.randn(batch, n, width, generator=g).to(dtype) for width in (key, key, value, value)]
        if mask is not None:
            tensors = [x.masked_fill(~mask[..., None], 0.0) for x in tensors]
        return cls(*tensors, mask, torch.randn(batch, n, generator=g), restart)

    def gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """y, lse, and the gradients of q, k and v of the reference, computed in `dtype`."""
        q, k, v = (x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        options = {"mask": self.mask, "scale": SCALE, "restart": self.restart, "return_lse": True}
        y, lse = random_walk(q, k, v, **options)
        grads = torch.autograd.grad((y, lse), (q, k, v), (self.g.to(dtype), self.lse_grad.to(lse.dtype)))
        return y.detach(), lse.detach(), *grads


class Kernels:
    """The kernels on one case, with outputs that are NaN before."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.functions = library("random_walk_sm90")
        self.sizes = Sizes(*case.q.shape, case.v.shape[-1])
        self.options = Options(SCALE, 1.0 - case.restart, case.restart, case.q.dtype == torch.bfloat16, seed)

    def run(self, function: str, *arguments: Tensor | int | None) -> None:
        given = [a if isinstance(a, int) else pointer(a) for a in arguments]
        getattr(self.functions, function)(ctypes.byref(self.sizes), ctypes.byref(self.options), *given)

    def forward(self) -> tuple[Tensor, Tensor]:
        q, k, v, _, mask, _, _ = self.case
        y, lse2 = torch.full_like(v, torch.nan), torch.full(v.shape[:2], torch.nan)
        self.run("walk", 0, q, k, v, v, mask, lse2, y)
        return y, lse2

    def backward(self, y: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, g, mask, lse_grad, _ = self.case
        level = torch.full_like(lse2, torch.nan)
        self.run("level", g, y, v, mask, lse_grad, level)
        q_grad, k_grad, v_grad = (torch.full_like(x, torch.nan) for x in (q, k, v))
        self.run("scores", 1, q, k, g, v, mask, lse2, level, q_grad, None)
        self.run("scores", 0, k, q, v, g, mask, lse2, level, k_grad, None)
        self.run("walk", 1, k, q, g, g, mask, lse2, v_grad)
        return q_grad, k_grad, v_grad


def everything(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    kernels = Kernels(case, seed)
    y, lse2 = kernels.forward()
    return y, lse2 * LN_2, *kernels.backward(y, lse2)


def assert_as_exact_as_eager(case: Case, found: tuple[Tensor, ...]) -> None:
    """At most twice the error of the reference in the same dtype, plus 4 eps of the result's dtype."""
    exact, eager = case.gradients(torch.float64), case.gradients(case.q.dtype)
    for name, ours, theirs, right in zip(("y", "lse", "q", "k", "v"), found, eager, exact, strict=True):
        size = right.abs().max()
        allowed = 2 * (theirs.double() - right).abs().max() + 4 * torch.finfo(ours.dtype).eps * size
        error = (ours.double() - right).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "masked", "restart"),
    [
        ((1, 128, 64, 512), False, 0.0),  # the published widths, tiles without a rest
        ((2, 133, 64, 256), True, RESTART),  # a second block, and several images
        ((1, 70, 40, 136), True, 0.0),  # widths that leave part of a slab unused; two parts of columns
        ((1, 65, 128, 320), False, RESTART),  # d = 128
        ((1, 1, 8, 8), False, 0.0),
    ],
)
def test_against_float64(sizes: tuple[int, int, int, int], masked: bool, restart: float, dtype: torch.dtype) -> None:
    case = Case.make(sizes, dtype, masked, restart)
    assert_as_exact_as_eager(case, everything(case))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_changes_a_bit(seed: int) -> None:
    """Copies and products that run early or late, and warps that are slow."""
    case = Case.make((1, 200, 64, 192), torch.bfloat16, masked=True)
    for found, expected in zip(everything(case, seed), everything(case), strict=True):
        assert torch.equal(found, expected)
