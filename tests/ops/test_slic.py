"""`slic` against its specification in plain loops, and its quality against scikit-image on photographs."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.superpixel_quality import Quality, means, quality
from cc4s_kernels import backends
from cc4s_kernels.ops.slic.reference import lab, lab_tables
from tests.ops.tester import Inputs, OpTester, devices_of, generator

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

Pixel = tuple[int, int]


# ---- The specification of docs/kernels/slic.md, one pixel at a time


def round_half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def rounded_root(value: Fraction, degree: int) -> int:
    """The integer n with n - 1/2 <= value^(1/degree) < n + 1/2."""
    n = max(round(float(value) ** (1 / degree)) - 2, 0)
    while Fraction(2 * n + 1, 2) ** degree <= value:
        n += 1
    return n


def linear_level(level: int) -> int:
    s = Fraction(level, 255)
    if s <= Fraction("0.04045"):
        return round_half_up(s / Fraction("12.92") * 2**16)
    return rounded_root(((s + Fraction("0.055")) / Fraction("1.055")) ** 12 * 2**80, 5)


def lab_root(t: int) -> int:
    u = Fraction(t, 2**14)
    if u <= Fraction(216, 24389):
        return round_half_up((Fraction(841, 108) * u + Fraction(4, 29)) * 2**15)
    return rounded_root(u * 2**45, 3)


def loop_lab(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (linear_level(v) for v in rgb)
    fx, fy, fz = (
        lab_root(round_half_up(Fraction(m[0] * r + m[1] * g + m[2] * b, 2**14)))
        for m in ((1777, 1541, 778), (871, 2929, 296), (73, 448, 3575))
    )
    return (
        round_half_up(Fraction(7424 * fy, 2**15)) - 1024,
        round_half_up(Fraction(32000 * (fx - fy), 2**15)) + 8192,
        round_half_up(Fraction(12800 * (fy - fz), 2**15)) + 8192,
    )


def loop_clusters(
    image: np.ndarray, valid: np.ndarray, num_segments: int, compactness: float, iterations: int
) -> tuple[dict[Pixel, int], int]:
    height, width = valid.shape
    n = min(num_segments, height * width)
    rows = 1
    while rows < min(height, n) and Fraction(2 * rows + 1, 2) ** 2 <= Fraction(n * height, width):
        rows += 1
    cols = min(width, n // rows)
    spacing = max(-(-height // rows), -(-width // cols))
    fixed = round_half_up(Fraction(compactness) * 256)
    weight = round_half_up(Fraction(256 * fixed**2, spacing**2))

    pixels = [(y, x) for y in range(height) for x in range(width) if valid[y, x]]
    color = {(y, x): loop_lab(tuple(int(v) for v in image[:, y, x])) for y, x in pixels}
    cell = {(y, x): (y * rows // height, x * cols // width) for y, x in pixels}
    label = {p: cell[p][0] * cols + cell[p][1] for p in pixels}
    for _ in range(iterations):
        members: dict[int, list[Pixel]] = {}
        for p in pixels:
            members.setdefault(label[p], []).append(p)
        center = {
            c: (
                *(round_half_up(Fraction(sum(color[p][i] for p in m), len(m))) for i in range(3)),
                *(round_half_up(Fraction(16 * sum(p[i] for p in m), len(m))) for i in range(2)),
            )
            for c, m in members.items()
        }
        for p in pixels:
            found = []
            for i in range(cell[p][0] - 1, cell[p][0] + 2):
                for j in range(cell[p][1] - 1, cell[p][1] + 2):
                    c = i * cols + j
                    if 0 <= i < rows and 0 <= j < cols and c in center:
                        d = sum((color[p][k] - center[c][k]) ** 2 for k in range(3))
                        d += sum(weight * (16 * p[k] - center[c][3 + k]) ** 2 // 2**20 for k in range(2))
                        found.append((d, c))
            label[p] = min(found)[1]
    return label, len(set(label.values()))


def neighbours(p: Pixel) -> tuple[Pixel, ...]:
    y, x = p
    return (y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)


def loop_merge(region: dict[Pixel, Pixel], selected: set[Pixel]) -> int:
    """One round of step 7 in place; the number of unions. A region is named by its first pixel."""
    border: dict[Pixel, dict[Pixel, int]] = {s: {} for s in selected}
    for p, a in region.items():
        for q in neighbours(p):
            b = region.get(q, a)
            if a != b and a in selected:
                border[a][b] = border[a].get(b, 0) + 1
    groups = {r: {r} for r in set(region.values())}
    unions = 0
    for s in sorted(selected):
        if border[s]:
            target = min(border[s], key=lambda r: (-border[s][r], r))
            if groups[s] is not groups[target]:
                unions += 1
                joined = groups[s] | groups[target]
                for r in joined:
                    groups[r] = joined
    for p, r in region.items():
        region[p] = min(groups[r])
    return unions


def loop_segments(label: dict[Pixel, int], clusters: int, num_segments: int) -> dict[Pixel, int]:
    region: dict[Pixel, Pixel] = {}
    for start in label:  # raster order
        if start not in region:
            stack = [start]
            region[start] = start
            while stack:
                for q in neighbours(stack.pop()):
                    if q in label and q not in region and label[q] == label[start]:
                        region[q] = start
                        stack.append(q)

    def sizes() -> dict[Pixel, int]:
        out: dict[Pixel, int] = {}
        for r in region.values():
            out[r] = out.get(r, 0) + 1
        return out

    while loop_merge(region, {r for r, n in sizes().items() if n * 4 * clusters < len(region)}):
        pass
    while len(sizes()) > num_segments:
        size = sizes()
        movable = {a for p, a in region.items() for q in neighbours(p) if region.get(q, a) != a}
        smallest = sorted(movable, key=lambda r: (size[r], r))[: len(size) - num_segments]
        if not loop_merge(region, set(smallest)):
            break
    size = sizes()
    kept = sorted(sorted(size, key=lambda r: (-size[r], r))[:num_segments])
    return {p: kept.index(r) if r in kept else -1 for p, r in region.items()}


def loop_slic(
    image: Tensor,
    num_segments: int = 800,
    *,
    compactness: float = 10.0,
    iterations: int = 10,
    mask: Tensor | None = None,
) -> Tensor:
    batch, _, height, width = image.shape
    out = np.full((batch, height, width), -1, np.int32)
    for b in range(batch):
        valid = np.ones((height, width), bool) if mask is None else mask[b].numpy()
        label, clusters = loop_clusters(image[b].numpy(), valid, num_segments, compactness, iterations)
        for p, segment in loop_segments(label, clusters, num_segments).items():
            out[b][p] = segment
    return torch.from_numpy(out)


# ---- Inputs


def textured(batch: int, height: int, width: int, seed: int, noise: int = 20) -> Tensor:
    """Coloured blocks under noise: clusters break into pieces of all sizes."""
    random = generator(seed)
    blocks = torch.randint(0, 256, (batch, 3, height // 6 + 1, width // 6 + 1), generator=random)
    image = blocks.repeat_interleave(6, 2).repeat_interleave(6, 3)[:, :, :height, :width]
    return (image + torch.randint(-noise, noise + 1, image.shape, generator=random)).clamp(0, 255).to(torch.uint8)


def random_mask(batch: int, height: int, width: int, seed: int, hidden: float) -> Tensor:
    return torch.rand(batch, height, width, generator=generator(seed)) >= hidden


class TestSlic(OpTester):
    op_name = "slic"
    sizes = (1, 7, 18)
    exact = True
    dtypes = ()
    variants: ClassVar = {
        "default": {"num_segments": 12},
        "loose": {"num_segments": 30, "compactness": 0.1},
        "masked": {"num_segments": 9},
        "cells": {"num_segments": 8, "iterations": 0},
    }

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 5)
        image = textured(batch, size, size + 3, seed)
        return (image.to(device),), {"mask": random_mask(batch, size, size + 3, seed, 0.2).to(device)}

    def inputs(self, variant: str, *args: object, **kwargs: object) -> Inputs:
        found, options = super().inputs(variant, *args, **kwargs)  # type: ignore[arg-type]
        return found, options if variant == "masked" else {**options, "mask": None}

    def naive(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        return (loop_slic(*args, **kwargs),)  # type: ignore[arg-type]

    def custom_op_calls(self) -> list[tuple[object, tuple[object, ...], dict[str, object]]]:
        image, mask = textured(2, 9, 11, 0), random_mask(2, 9, 11, 0, 0.2)
        ops = [torch.ops.cc4s_kernels.slic_reference.default]
        if "cpu" in backends.available("slic"):
            ops.append(torch.ops.cc4s_kernels.slic.default)
        return [(op, (image, m, 6, 2560, 3), {}) for op in ops for m in (None, mask)]


needs_extension = pytest.mark.skipif(
    backends.missing("cpu") is not None, reason=f"C++ extension: {backends.missing('cpu')}"
)


def on_both(image: Tensor, num_segments: int, *, mask: Tensor | None = None, **options: object) -> Tensor:
    """The result of the reference, after comparing every other backend with it."""
    with ck.use_backend("reference"):
        expected = ck.slic(image, num_segments, mask=mask, **options)  # type: ignore[arg-type]
    for name in backends.available("slic"):
        device = devices_of(name)[0]
        with ck.use_backend(name):
            found = ck.slic(image.to(device), num_segments, mask=None if mask is None else mask.to(device), **options)  # type: ignore[arg-type]
        assert torch.equal(found.cpu(), expected), name
    return expected


# ---- Colours


def test_tables_are_exact() -> None:
    linear, root = lab_tables()
    assert linear.tolist() == [linear_level(level) for level in range(256)]
    # Every entry around the switch from line to root, then every 37th.
    steps = [*range(300), *range(300, 2**14 + 1, 37), 2**14]
    assert [int(root[t]) for t in steps] == [lab_root(t) for t in steps]


def test_tables_of_the_extension_are_the_same() -> None:
    header = ROOT / "csrc" / "slic" / "lab_tables.h"
    if not header.is_file():
        pytest.skip("the C++ sources are not beside the tests")
    body = header.read_text().split("kLinear[256] = {")[1].split("}")[0]
    assert [int(v) for v in re.findall(r"\d+", body)] == lab_tables()[0].tolist()


def test_lab_is_close_to_the_real_one() -> None:
    skimage_color = pytest.importorskip("skimage.color")
    image = torch.randint(0, 256, (3, 40, 50), generator=generator(0), dtype=torch.uint8).numpy()
    found = (lab(image) - np.array([0, 8192, 8192])[:, None, None]) / 64
    # Matrix entries in 1/4096, cube roots at steps of 1/16384: under half a unit (2 is just visible).
    assert np.abs(found - np.moveaxis(skimage_color.rgb2lab(image.transpose(1, 2, 0)), 2, 0)).max() < 0.5


def test_grey_has_no_colour() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    levels = lab(grey)
    assert (levels[1:] == 8192).all()
    assert (np.diff(levels[0].ravel()) > 0).all()
    assert levels[0].min() == 0
    assert levels[0].max() == 6400


# ---- Properties


def assert_partition(ids: Tensor, num_segments: int, mask: Tensor | None = None) -> None:
    """One image (H, W): connected segments, at most num_segments, in raster order, -1 outside mask."""
    array = ids.numpy()
    assert ids.dtype == torch.int32
    if mask is not None:
        assert (array[~mask.numpy()] == -1).all()
        pieces = ndimage.label(mask.numpy())[1]
        if pieces <= num_segments:
            assert (array[mask.numpy()] >= 0).all()
    else:
        assert (array >= 0).all()
    values, first = np.unique(array[array >= 0], return_index=True)
    assert values.tolist() == list(range(len(values)))
    assert (np.diff(first) > 0).all()
    assert len(values) <= num_segments
    for value in values:
        assert ndimage.label(array == value)[1] == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    num_segments=st.integers(1, 60),
    compactness=st.sampled_from([0.0, 0.5, 10.0, 100.0]),
    iterations=st.integers(0, 4),
    hidden=st.sampled_from([None, 0.1, 0.5, 0.9, 1.0]),
    noise=st.sampled_from([0, 20, 200]),
    seed=st.integers(0, 1000),
)
def test_properties(
    height: int,
    width: int,
    num_segments: int,
    compactness: float,
    iterations: int,
    hidden: float | None,
    noise: int,
    seed: int,
) -> None:
    image = textured(1, height, width, seed, noise)
    mask = None if hidden is None else random_mask(1, height, width, seed, hidden)
    ids = on_both(image, num_segments, compactness=compactness, iterations=iterations, mask=mask)
    assert_partition(ids[0], num_segments, None if mask is None else mask[0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    num_segments=st.integers(1, 40),
    compactness=st.sampled_from([0.0, 1.7, 10.0]),
    hidden=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 1000),
)
def test_specification(
    height: int, width: int, num_segments: int, compactness: float, hidden: float, seed: int
) -> None:
    image, mask = textured(1, height, width, seed, 60), random_mask(1, height, width, seed, hidden)
    found = on_both(image, num_segments, compactness=compactness, iterations=3, mask=mask)
    assert torch.equal(found, loop_slic(image, num_segments, compactness=compactness, iterations=3, mask=mask))


@pytest.mark.parametrize(
    ("height", "width", "num_segments", "noise"),
    [
        (48, 64, 50, 10),
        (48, 64, 400, 200),
        (1, 300, 20, 30),
        (300, 1, 20, 30),
        (37, 91, 800, 255),
        (64, 48, 2, 5),
    ],
)
def test_backends_agree_on_larger_images(height: int, width: int, num_segments: int, noise: int) -> None:
    image = textured(2, height, width, 5, noise)
    mask = random_mask(2, height, width, 6, 0.02)
    mask[:, : height // 4] = False
    for m in (None, mask):
        found = on_both(image, num_segments, mask=m)
        for b in range(2):
            assert_partition(found[b], num_segments, None if m is None else m[b])
            # An image alone gives the same as in a batch.
            alone = ck.slic(image[b : b + 1], num_segments, mask=None if m is None else m[b : b + 1])
            assert torch.equal(alone[0], found[b])


def test_extreme_colours_do_not_overflow() -> None:
    corners = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    index = torch.randint(0, 8, (1, 40, 60), generator=generator(1))
    image = corners[index].permute(0, 3, 1, 2)
    for compactness in (0.0, 100.0):
        on_both(image, 7, compactness=compactness)


@needs_extension
def test_every_number_of_threads_gives_the_same() -> None:
    image, mask = textured(3, 83, 101, 2), random_mask(3, 83, 101, 2, 0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            with ck.use_backend("cpu"):
                results.append(ck.slic(image, 120, mask=mask))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@needs_extension
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("width", [3, 5, 13, 16, 61])
def test_every_instruction_set_gives_the_same(monkeypatch: pytest.MonkeyPatch, instructions: str, width: int) -> None:
    """Widths below, at and beside those of the vectors; instructions that the processor lacks fall back."""
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    on_both(textured(2, 40, width, 4), 25, mask=random_mask(2, 40, width, 4, 0.1))


def test_constant_image_gives_the_cells() -> None:
    image = torch.full((1, 3, 24, 32), 90, dtype=torch.uint8)
    ids = on_both(image, 12)[0]
    rows, cols = torch.arange(24) // 8, torch.arange(32) // 8
    assert torch.equal(ids, (rows[:, None] * 4 + cols).int())


def test_two_colours_are_separated() -> None:
    image = torch.zeros(1, 3, 30, 40, dtype=torch.uint8)
    image[..., 17:] = 255
    ids = on_both(image, 20)[0]
    assert not set(ids[:, :17].unique().tolist()) & set(ids[:, 17:].unique().tolist())


def test_one_segment() -> None:
    assert not on_both(textured(2, 9, 7, 0), 1).any()


def test_more_segments_than_pixels() -> None:
    image = textured(1, 3, 4, 0)
    assert torch.equal(on_both(image, 1000, iterations=0)[0], torch.arange(12, dtype=torch.int32).view(3, 4))


def test_all_masked() -> None:
    image = textured(2, 6, 5, 0)
    mask = torch.zeros(2, 6, 5, dtype=torch.bool)
    mask[1, 2, 3] = True
    ids = on_both(image, 4, mask=mask)
    assert (ids[0] == -1).all()
    assert ids[1, 2, 3] == 0
    assert int((ids[1] >= 0).sum()) == 1


def test_more_islands_than_segments_lose_the_smallest() -> None:
    mask = torch.zeros(1, 5, 9, dtype=torch.bool)
    mask[0, 0, 0] = True
    mask[0, 2, 2:5] = True
    mask[0, 4, 6:8] = True
    mask[0, 0, 8] = True
    ids = on_both(textured(1, 5, 9, 0, 0), 2, mask=mask)
    assert (ids[0, 2, 2:5] == 0).all()
    assert (ids[0, 4, 6:8] == 1).all()
    assert int((ids >= 0).sum()) == 5


def test_masked_colours_do_not_matter() -> None:
    image, mask = textured(1, 20, 25, 3), random_mask(1, 20, 25, 3, 0.3)
    other = torch.where(mask[:, None], image, 255 - image)
    assert torch.equal(on_both(image, 20, mask=mask), on_both(other, 20, mask=mask))


def test_errors() -> None:
    image = textured(1, 4, 5, 0)
    with pytest.raises(TypeError, match=r"image: got .*float32.*\(image \* 255\)\.round\(\)"):
        ck.slic(image.float() / 255)
    with pytest.raises(ValueError, match=r"image: got .* expected shape \(B, 3, H, W\)"):
        ck.slic(image[0])
    with pytest.raises(ValueError, match=r"expand\(-1, 3, -1, -1\)"):
        ck.slic(image[:, :1])
    with pytest.raises(ValueError, match="at least one pixel"):
        ck.slic(image[:, :, :0])
    with pytest.raises(ValueError, match="num_segments: got 0"):
        ck.slic(image, 0)
    with pytest.raises(TypeError, match="num_segments: got float"):
        ck.slic(image, 5.0)  # type: ignore[arg-type]
    for compactness in (-1.0, 101, float("nan")):
        with pytest.raises(ValueError, match="compactness: got"):
            ck.slic(image, compactness=compactness)
    with pytest.raises(ValueError, match="iterations: got -1"):
        ck.slic(image, iterations=-1)
    with pytest.raises(TypeError, match=r"mask: got .* torch\.bool"):
        ck.slic(image, mask=torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match=r"mask: got .* \(the pixels of image\)"):
        ck.slic(image, mask=torch.ones(1, 5, 4, dtype=torch.bool))


# ---- Quality on photographs


def test_quality_of_a_partition_that_misses_a_corner() -> None:
    truth = np.zeros((8, 8), np.uint8)
    truth[:, 4:] = 1
    truth[0, 0] = 255
    ids = np.zeros((8, 8), np.int64)
    ids[:6, 4:] = 1
    ids[6:, 7:] = 2
    # Boundaries of the truth: 8 of the classes and 2 beside the unknown pixel, which are far from those of the ids; the
    # lowest row is 2 pixels from the other boundary. Wrong: 3 x 2 pixels of class 1 in segment 0.
    assert quality(ids, truth) == Quality(3, 8 / 10, 6 / 63)
    assert np.isnan(quality(ids, np.zeros_like(truth)).recall)
    assert np.isnan(quality(ids, np.full_like(truth, 255)).error)


@pytest.mark.parametrize("name", ["smoke_msrc21", "grabcut20"])
def test_quality_is_no_worse_than_scikit_image(name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"no photographs at {DATA / name}")
    ((ours, theirs),) = means(DATA / name, [400]).values()
    # Equal numbers, but for the steps of the grid of seeds.
    assert ours.segments == pytest.approx(theirs.segments, rel=0.02)
    assert ours.recall >= theirs.recall, f"boundary recall {ours.recall:.4f}, scikit-image {theirs.recall:.4f}"
    assert ours.error <= theirs.error, f"under-segmentation error {ours.error:.4f}, scikit-image {theirs.error:.4f}"
