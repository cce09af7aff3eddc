"""The CUDA kernels of `tree_filter` on the CPU: the trees of the C++ kernel and of SciPy, the filter and the gradients
of the reference, the same bits whatever the order of blocks and threads."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels.ops.tree_filter import reference
from tests.cuda_on_cpu.build import library, memory, pointer
from tests.ops.tester import assert_matches, eps, generator, randn, strided_copy

POISON = 0xA5
ALIGNMENT = 256
needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")

Trees = tuple[Tensor, Tensor, Tensor]


def sizes(*numbers: int) -> list[ctypes.c_longlong]:
    return [ctypes.c_longlong(n) for n in numbers]


def strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_longlong]:
    numbers = list(itertools.chain.from_iterable(tensor.stride() for tensor in tensors))
    return (ctypes.c_longlong * len(numbers))(*numbers)


class Scratch:
    """Memory with values that mean nothing, and as many around it that have to stay."""

    def __init__(self, needed: int) -> None:
        self.values = torch.full((needed + 3 * ALIGNMENT,), POISON, dtype=torch.uint8)
        self.begin = ALIGNMENT - self.values.data_ptr() % ALIGNMENT
        self.end = self.begin + needed
        self.pointer = memory(self.values[self.begin :])

    def check(self) -> None:
        assert (self.values[: self.begin] == POISON).all()
        assert (self.values[self.end :] == POISON).all()


def suffix(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def trees(weight: Tensor, height: int, width: int, seed: int = 0) -> Trees:
    """seed: of the order of blocks and threads, 0 = ascending."""
    functions = library("tree_filter")
    functions.trees_bytes.restype = ctypes.c_longlong
    batch = weight.shape[0]
    wide = ctypes.c_bool(weight.dtype == torch.float64)
    scratch = Scratch(functions.trees_bytes(*sizes(batch, height, width), wide))
    order, parent, edge = torch.full((3, batch, height * width), -77)
    getattr(functions, f"trees_{suffix(weight)}")(
        memory(weight),
        strides(weight),
        *sizes(batch, height, width),
        scratch.pointer,
        *map(pointer, (order, parent, edge)),
        ctypes.c_uint(seed),
    )
    scratch.check()
    return order, parent, edge


def run(
    values: Tensor, decay: Tensor, order: Tensor, parent: Tensor, gradient: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, ...]:
    """The filtered values, or with `gradient` the gradients of values and decay."""
    functions = library("tree_filter")
    functions.filter_bytes.restype = ctypes.c_longlong
    wide, backward = ctypes.c_bool(values.dtype == torch.float64), ctypes.c_bool(gradient is not None)
    scratch = Scratch(functions.filter_bytes(*sizes(*values.shape), wide, backward))
    out, decay_out = (torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (values, decay))
    given = [t for t in (values, decay, order, parent, gradient) if t is not None]
    getattr(functions, f"filter_{suffix(values)}")(
        *map(memory, given),
        *([pointer(None)] if gradient is None else []),
        strides(*given),
        *sizes(*values.shape),
        scratch.pointer,
        pointer(out),
        pointer(None if gradient is None else decay_out),
        ctypes.c_uint(seed),
    )
    scratch.check()
    return (out,) if gradient is None else (out, decay_out)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def edges(height: int, width: int) -> int:
    return height * (width - 1) + (height - 1) * width


def assert_trees(weight: Tensor, height: int, width: int, *seeds: int) -> None:
    """The edges of SciPy's trees, and place by place what the C++ kernel gives."""
    expected = torch.ops.cc4s_kernels.tree_filter_trees(weight, height, width)
    found = reference.trees(weight, height, width)[2]
    assert torch.equal(found.sort(1).values, expected[2].sort(1).values)
    for seed in seeds:
        assert_same(trees(weight, height, width, seed), expected)


sides = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.just(1), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.just(1)),
)


@needs_extension
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sides=sides,
    levels=st.sampled_from([1, 2, 5, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31 - 1),
    strided=st.booleans(),
)
def test_same_trees(
    batch: int, sides: tuple[int, int], levels: int, dtype: torch.dtype, seed: int, strided: bool
) -> None:
    """Few levels: most edges have equal weights, and the number of an edge decides."""
    weight = torch.randint(0, levels, (batch, edges(*sides)), generator=generator(seed)).to(dtype)
    assert_trees(strided_copy(weight) if strided and weight.numel() else weight, *sides, 0, seed)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_all_kinds(dtype: torch.dtype) -> None:
    """Neighbours in the last bit, the largest and smallest ones, both zeros, and signs."""
    limits = torch.finfo(dtype)
    some = [0.0, -0.0, 1.0, 1 + limits.eps, limits.max, limits.tiny, limits.tiny * limits.eps, -1.0, -1 - limits.eps]
    place = torch.randint(0, len(some), (2, edges(9, 8)), generator=generator(3))
    assert_trees(torch.tensor(some, dtype=dtype)[place], 9, 8, 0, 5)


@needs_extension
@pytest.mark.parametrize("falling", [False, True])
def test_a_chain_of_components_is_joined_in_one_round(falling: bool) -> None:
    """Each pixel of a row of 300 joins the next one: two blocks, and 300 levels."""
    weight = torch.arange(299.0)[None]
    assert_trees(weight.flip(1) if falling else weight, 1, 300, 0, 7)


@needs_extension
def test_levels_wider_than_a_block() -> None:
    """Equal weights: rows that hang on the first column. Levels of up to 258 places are two steps of a block."""
    assert_trees(torch.zeros(1, edges(258, 258)), 258, 258, 0)


def problem(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int, levels: int = 2**20
) -> tuple[Tensor, ...]:
    """values, decay, order, parent, gradient. With one level the tree is a comb."""
    weight = torch.randint(0, levels, (batch, edges(height, width)), generator=generator(seed)).to(dtype) / levels
    order, parent, edge = reference.trees(weight, height, width)
    values, gradient = (
        randn(batch, channels, height * width, dtype=dtype, device="cpu", seed=seed + i) for i in range(2)
    )
    return values, reference.decays(weight, edge, 0.4), order, parent, gradient


def expected(values: Tensor, decay: Tensor, order: Tensor, parent: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Of the reference in float64: what is filtered, and the gradients of values and decay."""
    leaves = [t.double().requires_grad_() for t in (values, decay)]
    out = reference.filtered(*leaves, order, parent)
    slopes = torch.autograd.grad(out, leaves, gradient.double()) if out.numel() else (values, torch.zeros_like(decay))
    # Nothing is above the root: the C++ kernel has 0 there, and the definition does not use its decay.
    slopes[1][:, 0] = 0
    return (out.detach(), *slopes)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([0, 1, 3, 4, 9]),
    sides=sides,
    levels=st.sampled_from([1, 3, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31 - 1),
    strided=st.booleans(),
)
def test_equals_the_reference(
    batch: int,
    channels: int,
    sides: tuple[int, int],
    levels: int,
    dtype: torch.dtype,
    seed: int,
    strided: bool,
) -> None:
    values, decay, order, parent, gradient = problem(batch, channels, *sides, dtype, seed % 1000, levels)
    if strided:
        values, decay, order, parent, gradient = map(strided_copy, (values, decay, order, parent, gradient))
    truth = expected(values, decay, order, parent, gradient)
    found = (*run(values, decay, order, parent), *run(values, decay, order, parent, gradient))
    # Sums over up to 144 pixels and ten channels; the gradient of decay adds four products for each.
    for name, ours, theirs in zip(("filtered", "gradient of values", "gradient of decay"), found, truth, strict=True):
        assert_matches(name, ours, theirs, atol=64 * eps(dtype), rtol=64 * eps(dtype))
    shuffled = (*run(values, decay, order, parent, seed=seed), *run(values, decay, order, parent, gradient, seed=seed))
    assert_same(shuffled, found)


@pytest.mark.parametrize(("side", "levels"), [(132, 1), (70, 2**20)], ids=["comb", "random"])
def test_levels_wider_than_a_step(side: int, levels: int) -> None:
    """Several blocks of pixels; in the comb levels of up to 132 places, where a block takes 128 at a time."""
    inputs = problem(1, 3, side, side, torch.float64, 2, levels)
    found = (*run(*inputs[:4], seed=3), *run(*inputs, seed=4))
    for name, ours, theirs in zip(("filtered", "of values", "of decay"), found, expected(*inputs), strict=True):
        assert_matches(name, ours, theirs, atol=1e-12, rtol=1e-12)
