"""`tree_filter` against products along all paths of a tree that is found edge by edge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from tests.ops.tester import Inputs, OpTester, Result, assert_matches, backend_params, eps, generator, gpu_params, randn

CHANNELS = 3
every_backend = pytest.mark.parametrize(("backend", "device"), backend_params("tree_filter"))
needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")


def similarities(guide: np.ndarray, sigma: float) -> np.ndarray:
    """S (N, N) of one image: Prim's tree from pixel 0, and the sum of weights along each path."""
    _, height, width = guide.shape
    edges = [((y, x), (y, x + 1)) for y in range(height) for x in range(width - 1)]
    edges += [((y, x), (y + 1, x)) for y in range(height - 1) for x in range(width)]
    pixels = guide.transpose(1, 2, 0)
    weight = [math.fsum((pixels[p] - pixels[q]) ** 2) for p, q in edges]
    distance = {(0, 0): {(0, 0): 0.0}}
    while len(distance) < height * width:
        # The lightest edge with one end in the tree, ties by its number.
        w, _, p, q = min(
            (w, e, p, q)
            for e, (w, (p, q)) in enumerate(zip(weight, edges, strict=True))
            if (p in distance) != (q in distance)
        )
        inside, new = (p, q) if p in distance else (q, p)
        distance[new] = {other: d + w for other, d in distance[inside].items()} | {new: 0.0}
        for other in distance:
            distance[other][new] = distance[new][other]
    places = [(y, x) for y in range(height) for x in range(width)]
    return np.array([[math.exp(-distance[i][j] / sigma) for j in places] for i in places])


def naive(values: Tensor, guide: Tensor, sigma: float) -> Tensor:
    out = []
    for v, g in zip(values.double().numpy(), guide.double().numpy(), strict=True):
        s = similarities(g, sigma)
        out.append((v.reshape(len(v), -1) @ s.T / s.sum(1)).reshape(v.shape))
    return torch.from_numpy(np.array(out)).reshape(values.shape)


class TestTreeFilter(OpTester):
    op_name = "tree_filter"
    sizes = (1, 3, 6)
    common_size = 4
    gradcheck_size = 3
    differentiable = (0, 1)
    # Sums over 42 pixels; gradients of the guide of up to ten.
    low_precision_slack = 64.0

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 3)
        values = randn(batch, CHANNELS, size, size + 1, dtype=dtype, device=device, seed=seed)
        # Away from ties, so that rounding does not change the tree.
        guide = randn(batch, 2, size, size + 1, dtype=dtype, device=device, seed=seed + 1, scale=0.5)
        return (values, guide), {"sigma": 0.7}

    def naive(self, values: Tensor, guide: Tensor, sigma: float) -> tuple[Tensor, ...]:
        return (naive(values, guide, sigma),)


def run(backend: str, values: Tensor, guide: Tensor, sigma: float) -> Result:
    leaves = values.detach().requires_grad_(), guide.detach().requires_grad_(guide.is_floating_point())
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with ck.use_backend(backend):
        out = ck.tree_filter(*leaves, sigma=sigma)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out).sin()
        return Result((out.detach(),), torch.autograd.grad(out, wanted, cotangent))


@every_backend
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    levels=st.sampled_from([1, 2, 3, 256]),
    sigma=st.sampled_from([0.02, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_products_along_paths(
    backend: str, device: str, shape: tuple[int, int, int], levels: int, sigma: float, seed: int
) -> None:
    """Few levels: most edges have equal weights, and the number of an edge decides."""
    batch, height, width = shape
    guide = torch.randint(0, levels, (batch, 3, height, width), generator=generator(seed), dtype=torch.uint8)
    values = randn(batch, 9, height, width, dtype=torch.float64, device="cpu", seed=seed)
    with ck.use_backend(backend):
        found = ck.tree_filter(values.to(device), guide.to(device).double(), sigma=sigma)
        assert_matches("filtered", found, naive(values, guide, sigma), atol=1e-12, rtol=1e-12)


@every_backend
def test_gradients_are_those_of_the_dense_matrix(backend: str, device: str) -> None:
    """With y = S v / S 1 written out, and finite differences of the guide."""
    values = randn(1, 10, 4, 5, dtype=torch.float64, device="cpu", seed=0)
    guide = randn(1, 2, 4, 5, dtype=torch.float64, device="cpu", seed=1, scale=0.5)
    found = run(backend, values.to(device), guide.to(device), 0.7)
    cotangent = torch.linspace(-1, 1, values.numel(), dtype=torch.float64).view_as(values).sin()
    s = torch.from_numpy(similarities(guide[0].numpy(), 0.7))
    expected = ((cotangent.flatten(2) / s.sum(1)) @ s).view_as(values)
    assert_matches("gradient of values", found.gradients[0], expected, atol=1e-12)
    step, slopes = 1e-6, torch.zeros_like(guide)
    for place in np.ndindex(*guide.shape):
        moved = []
        for sign in (1, -1):
            other = guide.clone()
            other[place] += sign * step
            moved.append(float((naive(values, other, 0.7) * cotangent).sum()))
        slopes[place] = (moved[0] - moved[1]) / (2 * step)
    # A central difference: step^2 and rounding over step.
    assert_matches("gradient of guide", found.gradients[1], slopes, atol=1e-7, rtol=1e-7)


@every_backend
def test_constants_stay(backend: str, device: str) -> None:
    values = torch.full((2, 2, 5, 6), 0.375, device=device)
    guide = torch.rand(2, 3, 5, 6, generator=generator(0)).to(device)
    with ck.use_backend(backend):
        found = ck.tree_filter(values, guide, sigma=0.1)
    assert_matches("filtered", found, values, atol=4 * eps(torch.float32))


@every_backend
def test_regions_of_one_colour_are_averaged(backend: str, device: str) -> None:
    """Two halves that differ by 100 sigma: the mean of each."""
    guide = torch.zeros(1, 1, 4, 6, device=device)
    guide[..., 3:] = 1
    values = randn(1, 2, 4, 6, dtype=torch.float32, device=device, seed=0)
    with ck.use_backend(backend):
        found = ck.tree_filter(values, guide, sigma=0.01)
    for part in (slice(0, 3), slice(3, 6)):
        mean = values[..., part].mean((2, 3), keepdim=True).expand(-1, -1, 4, 3)
        assert_matches("mean", found[..., part], mean, atol=1e-6)


@needs_extension
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 30), width=st.integers(1, 30), levels=st.sampled_from([1, 3, 2**20]), seed=st.integers(0, 99)
)
def test_both_trees_have_the_same_edges(height: int, width: int, levels: int, seed: int) -> None:
    edges = height * (width - 1) + (height - 1) * width
    weight = torch.randint(0, levels, (2, edges), generator=generator(seed)).float()
    found = torch.ops.cc4s_kernels.tree_filter_trees(weight, height, width)
    expected = torch.ops.cc4s_kernels.tree_filter_trees_reference(weight, height, width)
    assert torch.equal(found[2].sort(1).values, expected[2].sort(1).values)
    for order, parent, _ in (found, expected):
        assert torch.equal(order.sort(1).values, torch.arange(height * width).expand(2, -1))
        assert bool((parent[:, 1:] < torch.arange(1, height * width)).all())


@needs_extension
@pytest.mark.parametrize(("backend", "device"), gpu_params("tree_filter"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trees_of_a_gpu_are_those_of_the_cpu(backend: str, device: str, dtype: torch.dtype) -> None:
    for height, width, levels in ((1, 1, 1), (1, 500, 3), (300, 1, 2**20), (258, 258, 1), (120, 333, 2**20)):
        edges = height * (width - 1) + (height - 1) * width
        weight = torch.randint(0, levels, (3, edges), generator=generator(0)).to(dtype)
        found = torch.ops.cc4s_kernels.tree_filter_trees(weight.to(device), height, width)
        expected = torch.ops.cc4s_kernels.tree_filter_trees(weight, height, width)
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))


@needs_extension
def test_every_number_of_threads_gives_the_same() -> None:
    values = randn(2, 21, 20, 30, dtype=torch.float32, device="cpu", seed=0)
    guide = torch.rand(2, 3, 20, 30, generator=generator(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run("cpu", values, guide, 0.1))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        OpTester().assert_bitwise(result, results[0])


def test_errors() -> None:
    values, guide = torch.rand(1, 2, 3, 4), torch.rand(1, 3, 3, 4)
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "values: got .* floating", lambda: ck.tree_filter(values.long(), guide, sigma=1)),
        (ValueError, "guide: got .*the pixels of values", lambda: ck.tree_filter(values, guide[..., 1:], sigma=1)),
        (TypeError, "guide: got .* torch.uint8", lambda: ck.tree_filter(values, guide.int(), sigma=1)),
        (ValueError, "sigma: got 0, expected a value", lambda: ck.tree_filter(values, guide, sigma=0)),
        (ValueError, "values: got .* 1 to", lambda: ck.tree_filter(values[..., :0], guide[..., :0], sigma=1)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
