"""The CUDA kernels of `slic` on the CPU: the same bits as the reference, whatever the order of blocks and threads."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cc4s_kernels.ops.slic.reference import slic as reference
from tests.cuda_on_cpu.build import library, memory, pointer
from tests.ops.test_slic import random_mask, textured
from tests.ops.tester import generator, strided_copy

POISON = 0xA5
ALIGNMENT = 256


def on_cpu(
    image: Tensor, mask: Tensor | None, num_segments: int, compactness: int, iterations: int, seed: int
) -> Tensor:
    """compactness: in 1/256. seed: of the order of blocks and threads, 0 = ascending."""
    functions = library("slic")
    functions.slic_bytes.restype = ctypes.c_longlong
    batch, _, height, width = image.shape
    sizes = [ctypes.c_longlong(n) for n in (batch, height, width, num_segments)]
    needed = functions.slic_bytes(*sizes)
    # Scratch with values that mean nothing, and as many around it that have to stay.
    scratch = torch.full((needed + 3 * ALIGNMENT,), POISON, dtype=torch.uint8)
    begin = ALIGNMENT - scratch.data_ptr() % ALIGNMENT
    labels = torch.full((batch, height, width), -77, dtype=torch.int32)
    strides = [*image.stride(), *((0, 0, 0) if mask is None else mask.stride())]
    functions.slic_run(
        memory(image),
        pointer(None) if mask is None else memory(mask),
        (ctypes.c_longlong * 7)(*strides),
        *sizes,
        ctypes.c_longlong(compactness),
        ctypes.c_longlong(iterations),
        memory(scratch[begin:]),
        pointer(labels),
        ctypes.c_uint(seed),
    )
    assert (scratch[:begin] == POISON).all()
    assert (scratch[begin + needed :] == POISON).all()
    return labels


def assert_equals_the_reference(
    image: Tensor, mask: Tensor | None, num_segments: int, compactness: int, iterations: int, *seeds: int
) -> None:
    expected = reference(image, mask, num_segments, compactness, iterations)
    for seed in seeds:
        assert torch.equal(on_cpu(image, mask, num_segments, compactness, iterations, seed), expected), seed


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 26), st.integers(1, 26)))
    kind = draw(st.sampled_from(["blocks", "noise", "flat", "gradient", "corners"]))
    seed = draw(st.integers(0, 1000))
    if kind == "blocks":
        return textured(*shape, seed, draw(st.sampled_from([0, 10, 60])))
    if kind == "noise":
        return textured(*shape, seed, 255)
    if kind == "flat":
        return torch.full((shape[0], 3, *shape[1:]), seed % 256, dtype=torch.uint8)
    if kind == "gradient":
        ramp = torch.arange(shape[1])[:, None] * 9 + torch.arange(shape[2]) * 5 + seed
        return torch.stack([ramp, ramp // 2, 255 - ramp]).remainder(256).to(torch.uint8).expand(shape[0], -1, -1, -1)
    # Colours that are as far from each other as any.
    return torch.randint(0, 2, (shape[0], 3, *shape[1:]), generator=generator(seed)).mul(255).to(torch.uint8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    image=images(),
    hidden=st.sampled_from([None, 0.02, 0.3, 0.6, 0.95, 1.0]),
    num_segments=st.sampled_from([1, 2, 3, 7, 20, 60, 300, 2**31 - 1]),
    compactness=st.sampled_from([0, 30, 2560, 25600]),
    iterations=st.sampled_from([0, 1, 2, 3, 10]),
    seed=st.integers(0, 2**31 - 1),
    strided=st.booleans(),
)
def test_equals_the_reference(
    image: Tensor,
    hidden: float | None,
    num_segments: int,
    compactness: int,
    iterations: int,
    seed: int,
    strided: bool,
) -> None:
    mask = None if hidden is None else random_mask(image.shape[0], *image.shape[2:], seed % 1000, hidden)
    if strided:
        image, mask = strided_copy(image), None if mask is None else strided_copy(mask)
    assert_equals_the_reference(image, mask, num_segments, compactness, iterations, 0, seed)


@pytest.mark.parametrize(
    ("height", "width", "num_segments", "noise", "hidden"),
    [
        # Cells of 16 or 17 pixels, as at the published size: tiles of 64 columns with rows in both halves.
        (67, 150, 36, 40, 0.0),
        # A cell higher than a tile: parts of it, several words of roots and several warps that merge.
        (150, 70, 2, 30, 0.02),
        # Cells of 1, 2 and 3 pixels: tiles narrower than a block.
        (5, 200, 1000, 60, 0.0),
        (6, 130, 130, 60, 0.1),
        (9, 125, 120, 255, 0.1),
        # Rows that are single pixels, and more islands than segments.
        (1, 400, 30, 60, 0.3),
        (400, 1, 30, 60, 0.3),
    ],
)
def test_tiles_of_all_shapes(height: int, width: int, num_segments: int, noise: int, hidden: float) -> None:
    image = textured(1, height, width, 3, noise)
    mask = random_mask(1, height, width, 4, hidden) if hidden else None
    assert_equals_the_reference(image, mask, num_segments, 2560, 3, 0, 11)


def test_a_full_block_merges() -> None:
    """Enough pixels for the most threads that merge, and noise that leaves several regions to each."""
    assert_equals_the_reference(textured(1, 256, 256, 1, 90), None, 300, 500, 2, 5)


def test_a_winding_region() -> None:
    """A corridor that is one region, whose parts are only joined by many unions."""
    image = torch.zeros(1, 3, 41, 60, dtype=torch.uint8)
    image[:, :, 1::2] = 255
    image[:, :, 1::4, -1:] = 0
    image[:, :, 3::4, :1] = 0
    for seed in range(6):
        # One cluster, in the mask's shape: step 6 alone decides.
        assert_equals_the_reference(image, image[:, 0] == 0, 1, 2560, 1, seed)
    assert (on_cpu(image, image[:, 0] == 0, 1, 2560, 1, 9)[image[:, 0] == 0] == 0).all()


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_ties_go_to_the_lowest_cluster(iterations: int) -> None:
    """One colour and no weight of the distance in the plane: every candidate is as near as any other."""
    assert_equals_the_reference(torch.full((1, 3, 24, 36), 90, dtype=torch.uint8), None, 24, 0, iterations, 0, 3)
