"""The CUDA kernels of `color_affinity` on the CPU against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cc4s_kernels.ops.color_affinity import reference
from cc4s_kernels.ops.slic.reference import slic
from tests.cuda_on_cpu.build import library, memory, pointer
from tests.ops.tester import generator, strided_copy

Outputs = tuple[Tensor, ...]


class Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_longlong) for name in ("batch", "channel", "row", "column"))


class Sizes(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_longlong),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("nodes", ctypes.c_int),
        ("places", ctypes.c_longlong),
    )


class Problem(ctypes.Structure):
    _fields_ = (
        ("image", ctypes.c_void_p),
        ("image_strides", Strides),
        ("ids", ctypes.c_void_p),
        ("id_strides", Strides),
        ("sizes", Sizes),
        ("wide_ids", ctypes.c_int),
    )


GUARD = 64
POISON = 113
"""Scratch and outputs hold this byte before, so that what is not written shows."""


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count + 2 * GUARD,), POISON, dtype=torch.uint8)[GUARD : GUARD + count].view(dtype).view(shape)


def assert_guarded(tensor: Tensor) -> None:
    """Nothing was written before or after a tensor of `poisoned`."""
    whole = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    assert bool((whole[:GUARD] == POISON).all())
    assert bool((whole[-GUARD:] == POISON).all())


def run(function: str, image: Tensor, ids: Tensor, k: int, places: int, outputs: Outputs, seed: int) -> None:
    strides = Strides(ids.stride(0), 0, *ids.stride()[1:])
    sizes = Sizes(ids.shape[0], *ids.shape[1:], k, places)
    wide = ids.dtype == torch.int64
    problem = Problem(memory(image), Strides(*image.stride()), memory(ids), strides, sizes, wide)
    kernels = library("color_affinity")
    kernels.scratch_bytes.restype = ctypes.c_longlong
    scratch = poisoned(kernels.scratch_bytes(ctypes.byref(problem)), dtype=torch.uint8)
    arguments = [pointer(tensor) for tensor in (scratch, *outputs)]
    getattr(kernels, function)(ctypes.byref(problem), *arguments, ctypes.c_uint(seed))
    for tensor in (scratch, *outputs):
        assert_guarded(tensor)


def affinity(image: Tensor, ids: Tensor, k: int, places: int, seed: int = 0) -> Outputs:
    """edge_index, weight, num_edges, counts."""
    batch, integers = ids.shape[0], torch.int64
    outputs = (
        poisoned(batch, 2, places, dtype=integers),
        poisoned(batch, places, dtype=torch.float32),
        poisoned(batch, dtype=integers),
        poisoned(batch, k, dtype=integers),
    )
    run("affinity", image, ids, k, places, outputs, seed)
    return outputs


def histograms(image: Tensor, ids: Tensor, k: int, seed: int = 0) -> Outputs:
    """color, texture, counts."""
    outputs = tuple(poisoned(ids.shape[0], k, *bins, dtype=torch.int64) for bins in ((75,), (20,), ()))
    run("histograms", image, ids, k, 0, outputs, seed)
    return outputs


def assert_equals_the_reference(image: Tensor, ids: Tensor, k: int, places: int | None, seed: int) -> Outputs:
    expected = reference.color_affinity(image, ids, k, max_edges=places)
    places = expected.weight.shape[1]
    index, weight, num_edges, counts = affinity(image, ids, k, places, seed)
    assert torch.equal(num_edges, expected.num_edges)
    assert torch.equal(index, expected.edge_index)
    assert torch.equal(counts, expected.counts)
    # Both round a double to float32; they sum in another order.
    torch.testing.assert_close(weight, expected.weight, rtol=0, atol=1.2e-7, equal_nan=True)
    return index, weight, num_edges, counts


def picture(shape: tuple[int, ...], levels: int, seed: int) -> Tensor:
    """Values of a few levels, the first and the last of which are 0 and 255."""
    values = torch.randint(0, levels, shape, generator=generator(seed))
    return (values * 255 // max(levels - 1, 1)).to(torch.uint8)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, int]:
    """ids (B, H, W), with or without padding and ids out of range, connected or not; K."""
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    k = draw(st.sampled_from([1, 2, 5, 40, 300, 1500]))
    random = generator(draw(st.integers(0, 2**20)))
    block = draw(st.integers(1, 5))
    ids = torch.randint(-1, min(k, 100), (batch, height, width), generator=random, dtype=torch.int64)
    ids = ids.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
    # Spread over all K, so that a node has neighbours in several windows of 1024.
    ids = torch.where(ids >= 0, ids * (k // min(k, 100)), ids)
    if draw(st.booleans()):
        wrong = torch.tensor([-7, k, k + 1, 2**31 - 1, -(2**31)])
        some = torch.randint(0, 5, ids.shape, generator=random)
        ids = torch.where(torch.rand(ids.shape, generator=random) < 0.1, wrong[some], ids)
    ids = ids.contiguous()
    if draw(st.booleans()):
        return ids.to(torch.int32), k
    return (torch.where(ids == -7, 2**32 + 1, ids) if draw(st.booleans()) else ids), k


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    drawn=maps(),
    levels=st.integers(1, 256),
    places=st.sampled_from([None, 0, 1, 7, 600]),
    seed=st.integers(0, 2**20),
    strided=st.booleans(),
)
def test_equals_the_reference(
    drawn: tuple[Tensor, int], levels: int, places: int | None, seed: int, strided: bool
) -> None:
    ids, k = drawn
    image = picture((ids.shape[0], 3, *ids.shape[1:]), levels, seed)
    if strided:
        image, ids = strided_copy(image), strided_copy(ids)
    assert_equals_the_reference(image, ids, k, places, seed)
    expected = reference.histograms(image, ids.long(), k)
    for found, wanted in zip(histograms(image, ids, k, seed), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_superpixels_of_slic(seed: int) -> None:
    image = picture((2, 3, 40, 50), 256, 3)
    mask = torch.ones(2, 40, 50, dtype=torch.bool)
    mask[0, :, 40:] = False
    ids = slic(image, mask, 30, 2560, 5)
    _, weight, num_edges, _ = assert_equals_the_reference(image, ids, 30, None, seed)
    assert int(num_edges.min()) > 20
    assert not bool(weight.isnan().any())


def test_no_order_shows() -> None:
    """Bitwise the same result whatever the order of blocks, threads and atomics."""
    image, ids = picture((1, 3, 33, 40), 9, 1), torch.randint(-1, 40, (1, 33, 40), generator=generator(2))
    first = affinity(image, ids, 40, 800, 0)
    for seed in range(1, 6):
        for a, b in zip(affinity(image, ids, 40, 800, seed), first, strict=True):
            assert torch.equal(a, b)


def test_more_nodes_in_a_tile_than_it_has_slots() -> None:
    image = picture((1, 3, 8, 9), 256, 4)
    ids = torch.arange(72).view(1, 8, 9)
    assert_equals_the_reference(image, ids, 72, None, 5)
    # All start at the same slot.
    assert_equals_the_reference(image, ids * 32, 72 * 32, 200, 5)


def test_a_node_that_touches_all_others() -> None:
    """Islands in a sea with the lowest id: one bucket holds everything."""
    ids = torch.zeros(1, 61, 61, dtype=torch.int32)
    ids[0, 1::2, 1::2] = torch.arange(1, 901, dtype=torch.int32).view(30, 30) * 3
    _, _, num_edges, _ = assert_equals_the_reference(picture((1, 3, 61, 61), 256, 6), ids, 2701, None, 7)
    assert int(num_edges) == 900


def test_too_few_places_poison_one_image() -> None:
    ids = torch.randint(0, 6, (2, 20, 20), generator=generator(0))
    ids[1] = 3
    _, weight, num_edges, _ = assert_equals_the_reference(picture((2, 3, 20, 20), 256, 8), ids, 6, None, 9)
    assert num_edges.tolist() == [15, 0]
    assert bool(weight[0].isnan().all())
    assert not bool(weight[1].any())


@pytest.mark.parametrize("value", [-1, 0, 7])
def test_one_pixel(value: int) -> None:
    ids = torch.full((1, 1, 1), value)
    assert_equals_the_reference(picture((1, 3, 1, 1), 256, 10), ids, 1, None, 0)
    assert_equals_the_reference(picture((1, 3, 1, 1), 256, 10), ids, 1, 5, 1)
