"""`color_affinity` against loops over pixels and edges."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from cc4s_kernels.ops.color_affinity.reference import color_affinity, histograms
from tests.ops.tester import Inputs, OpTester, devices_of, generator, strided_copy

needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")


def gradients(luma: list[list[int]], valid: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """(x, y) gradient of each valid pixel."""
    height, width = valid.shape
    out = {}

    def along(y: int, x: int, dy: int, dx: int) -> int:
        def there(v: int, u: int) -> int | None:
            return luma[v][u] if 0 <= v < height and 0 <= u < width and valid[v, u] else None

        before, after = there(y - dy, x - dx), there(y + dy, x + dx)
        if before is not None and after is not None:
            return after - before
        if after is not None:
            return 2 * (after - luma[y][x])
        if before is not None:
            return 2 * (luma[y][x] - before)
        return 0

    for y in range(height):
        for x in range(width):
            if valid[y, x]:
                out[y, x] = (along(y, x, 0, 1), along(y, x, 1, 0))
    return out


def naive_histograms(image: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """image (3, H, W), ids (H, W) -> (K, 75), (K, 20), (K,)."""
    color, texture = np.zeros((k, 75), np.int64), np.zeros((k, 20), np.int64)
    counts = np.zeros(k, np.int64)
    height, width = ids.shape
    rgb = [[[int(v) for v in row] for row in plane] for plane in image]
    luma = [[299 * rgb[0][y][x] + 587 * rgb[1][y][x] + 114 * rgb[2][y][x] for x in range(width)] for y in range(height)]
    g = gradients(luma, ids >= 0)
    values = [v for pair in g.values() for v in pair]
    for (y, x), pair in g.items():
        node = ids[y, x]
        counts[node] += 1
        for channel in range(3):
            color[node, 25 * channel + min(24, rgb[channel][y][x] * 25 // 255)] += 1
        low, high = min(values), max(values)
        for direction, v in enumerate(pair):
            b = min(9, (v - low) * 10 // (high - low)) if high > low else 0
            texture[node, 10 * direction + b] += 1
    return color, texture, counts


def naive_graph(image: np.ndarray, ids: np.ndarray, k: int) -> tuple[dict[tuple[int, int], float], np.ndarray]:
    """Weights of the edges (i, j), i < j, and the pixel counts."""
    color, texture, counts = naive_histograms(image, ids, k)
    height, width = ids.shape
    pairs = set()
    for y in range(height):
        for x in range(width):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < height and u < width:
                    i, j = sorted((int(ids[y, x]), int(ids[v, u])))
                    if 0 <= i < j:
                        pairs.add((i, j))

    def norm(h: np.ndarray, i: int, j: int) -> float:
        parts = (
            Fraction(int(a), int(counts[i])) - Fraction(int(b), int(counts[j])) for a, b in zip(h[i], h[j], strict=True)
        )
        return math.sqrt(float(sum(part * part for part in parts)))

    w = {(i, j): math.exp(-5 * (norm(color, i, j) / 25 + norm(texture, i, j) / 100)) for i, j in pairs}
    if not w:
        return {}, counts
    lowest = min(w.values())
    u = {pair: max(value - 0.8 * lowest, 0) for pair, value in w.items()}
    return {pair: 0.8 * value / max(u.values()) for pair, value in sorted(u.items())}, counts


def smooth_image(shape: tuple[int, ...], seed: int) -> Tensor:
    """A few levels only, in blocks: equal histograms and zero gradients happen."""
    blocks = torch.randint(0, 256, (*shape[:-2], (shape[-2] + 3) // 4, (shape[-1] + 3) // 4), generator=generator(seed))
    image = blocks.repeat_interleave(4, -2).repeat_interleave(4, -1)[..., : shape[-2], : shape[-1]]
    return (image + torch.randint(0, 9, shape, generator=generator(seed + 1))).clamp(max=255).to(torch.uint8)


class TestColorAffinity(OpTester):
    op_name = "color_affinity"
    sizes = (1, 7, 24)
    dtypes = ()
    variants: ClassVar = {"planar": {}, "many_places": {"max_edges": 40}}
    # The weights are rounded to float32.
    value_tolerance = 1e-7

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 4)
        height, width = size, size + 3
        image = smooth_image((batch, 3, height, width), seed)
        # A grid of 3 x 4 regions, the last id absent, one column without ids.
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ids = (y * 3 // height * 4 + x * 4 // width).to(torch.int32).expand(batch, -1, -1).clone()
        ids[:, :, width // 2] = -1
        return (image.to(device), ids.to(device), 13), {}

    def naive(
        self, image: Tensor, superpixels: Tensor, num_superpixels: int, *, max_edges: int | None = None
    ) -> tuple[Tensor, ...]:
        k = num_superpixels
        places = max(k - 1, 3 * k - 6) if max_edges is None else max_edges
        index = np.zeros((len(image), 2, places), np.int64)
        weight = np.zeros((len(image), places))
        number, counts = np.zeros(len(image), np.int64), np.zeros((len(image), k), np.int64)
        for b in range(len(image)):
            edges, counts[b] = naive_graph(image[b].numpy(), superpixels[b].numpy(), k)
            number[b] = len(edges)
            for e, (pair, w) in enumerate(sorted(edges.items())):
                index[b, :, e], weight[b, e] = pair, w
        return tuple(torch.from_numpy(a) for a in (index, weight, number, counts))

    def custom_op_calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        if "cpu" not in backends.available("color_affinity"):
            return []
        args, _ = self.make_inputs(torch.float32, "cpu", 7, 0)
        ops = torch.ops.cc4s_kernels
        return [(ops.color_affinity.default, (*args, 40), {}), (ops.color_histograms.default, args, {})]


@pytest.mark.parametrize("seed", range(3))
def test_integer_histograms(seed: int) -> None:
    image = torch.randint(0, 256, (1, 3, 13, 17), generator=generator(seed), dtype=torch.uint8)
    image[0, :, 0, :3] = 255
    ids = torch.randint(-1, 5, (1, 13, 17), generator=generator(seed + 9))
    found = histograms(image, ids, 5)
    expected = naive_histograms(image[0].numpy(), ids[0].numpy(), 5)
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a[0], torch.from_numpy(e))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (67, 83)])
def test_integer_histograms_on_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every number of threads, and strided inputs, give the integers of the definition."""
    image = torch.randint(0, 256, (2, 3, *shape), generator=generator(1), dtype=torch.uint8)
    image[0] = smooth_image((3, *shape), 5)
    ids = torch.randint(-1, 7, (2, *shape), generator=generator(2)).repeat_interleave(3, 2)[:, :, : shape[1]].to(dtype)
    expected = histograms(image, ids.long(), 7)
    turned = image.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    turned_ids = ids.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            for a, b in ((image, ids), (turned, turned_ids)):
                found = torch.ops.cc4s_kernels.color_histograms(a, b, 7)
                assert all(torch.equal(x, e) for x, e in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in backends.available("color_affinity"), reason="no CUDA device or extension"),
]


def wild_maps() -> tuple[Tensor, Tensor]:
    """Maps of 300 nodes that are not connected, with padding and ids out of range; the second image has one node."""
    random = generator(7)
    ids = torch.randint(-1, 300, (2, 101, 67), generator=random).repeat_interleave(2, 2)
    ids[0, :5, ::3] = torch.tensor([-7, 300, 2**31, 2**32 + 1, -(2**40)])[:, None]
    ids[1] = 4
    return torch.randint(0, 256, (2, 3, 101, 134), generator=random, dtype=torch.uint8), ids


@pytest.mark.parametrize("layout", [torch.clone, strided_copy])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_integer_histograms_on_a_gpu(device: str, layout: Any) -> None:
    image, ids = wild_maps()
    found = torch.ops.cc4s_kernels.color_histograms(layout(image.to(device)), layout(ids.to(device)), 300)
    for a, e in zip(found, histograms(image, ids, 300), strict=True):
        assert torch.equal(a.cpu(), e)


@pytest.mark.parametrize("places", [40, 30_000])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_any_map_on_a_gpu(device: str, places: int) -> None:
    """No value of an id is an error where values are not read; too few places are NaN; on a stream of its own."""
    image, ids = wild_maps()
    expected = color_affinity(image, ids, 300, max_edges=places)
    assert 40 < int(expected.num_edges[0]) < 30_000
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ck.use_backend("cuda"):
        found = ck.color_affinity(image.to(device), ids.to(device), 300, max_edges=places)
    stream.synchronize()
    for a, e in zip((found.edge_index, found.num_edges, found.counts), expected[:1] + expected[3:], strict=True):
        assert torch.equal(a.cpu(), e)
    torch.testing.assert_close(found.weight.cpu(), expected.weight, rtol=0, atol=1e-6, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("shape", [(2, 1100), (1, 255), (1, 256), (150, 130)])
def test_many_pixels_of_one_superpixel(shape: tuple[int, int], hidden: bool) -> None:
    """Runs and superpixels of more pixels than a counter of a byte holds; rows with and without invalid pixels."""
    image = torch.randint(0, 256, (1, 3, *shape), generator=generator(3), dtype=torch.uint8)
    # Long runs of one colour: every count of a bin overflows a byte too.
    image[:, :, :, 60:] = image[:, :, :1, 60:61]
    ids = torch.zeros(1, *shape, dtype=torch.int32)
    ids[:, :, :7] = 1
    if hidden:
        ids[:, shape[0] // 2, 20:23] = -1
    found = torch.ops.cc4s_kernels.color_histograms(image, ids, 3)
    for a, e in zip(found, histograms(image, ids.long(), 3), strict=True):
        assert torch.equal(a, e)


def test_every_gradient_bin_boundary() -> None:
    """Texture bins of extreme gradients on all backends: the quotient is exact."""
    image = torch.randint(0, 2, (1, 3, 90, 110), generator=generator(4)).mul(255).to(torch.uint8)
    image[:, :, :, ::2] = torch.randint(0, 256, (1, 3, 90, 55), generator=generator(5), dtype=torch.uint8)
    ids = ck.slic(image, 30)
    with ck.use_backend("reference"):
        expected = ck.color_affinity(image, ids, 30)
    for name in backends.available("color_affinity"):
        device = devices_of(name)[0]
        with ck.use_backend(name):
            found = ck.color_affinity(image.to(device), ids.to(device), 30)
        assert torch.equal(found.edge_index.cpu(), expected.edge_index)
        assert torch.equal(found.counts.cpu(), expected.counts)
        torch.testing.assert_close(found.weight.cpu(), expected.weight, rtol=0, atol=1e-6)


def test_gradients_at_borders_and_masks() -> None:
    # Luma 1000 * (0, 1, 4, 9, 16, 25); the mask cuts off the last two.
    levels = torch.tensor([0, 1, 4, 9, 16, 25], dtype=torch.uint8)
    image = levels.expand(1, 3, 1, 6)
    ids = torch.tensor([[[0, 0, 0, 0, -1, -1]]])
    # x gradients 2, 4, 8, 10 (thousands), y gradients 0: low 0, high 10, bins 2, 4, 8, 9 and 0.
    expected = torch.zeros(20, dtype=torch.int64)
    expected[[2, 4, 8, 9]] = 1
    expected[10] = 4
    assert torch.equal(histograms(image, ids, 1).texture[0, 0], expected)


def test_isolated_pixel_has_no_gradient() -> None:
    image = torch.tensor([0, 200, 0], dtype=torch.uint8).expand(1, 3, 1, 3)
    found = histograms(image, torch.tensor([[[-1, 0, -1]]]), 1)
    assert found.texture[0, 0, [0, 10]].tolist() == [1, 1]


def test_constant_image_has_equal_weights() -> None:
    image = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    ids = (torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4)[None]
    graph = ck.color_affinity(image, ids, 4)
    assert graph.edge_index[0].T.tolist()[:4] == [[0, 1], [0, 2], [1, 3], [2, 3]]
    # All dist are 0: u = 1 - 0.8 for every edge.
    assert torch.equal(graph.weight[0], torch.tensor([0.8] * 4 + [0.0] * 2))


def test_absent_superpixels_have_no_edges() -> None:
    ids = torch.tensor([[[0, 0, 5, 5], [0, 0, 5, 5]]])
    graph = ck.color_affinity(torch.zeros(1, 3, 2, 4, dtype=torch.uint8), ids, 9)
    assert graph.num_edges.tolist() == [1]
    assert graph.edge_index[0, :, 0].tolist() == [0, 5]
    assert graph.counts[0].tolist() == [4, 0, 0, 0, 0, 4, 0, 0, 0]
    assert graph.num_nodes == 9


@pytest.mark.parametrize(("k", "places"), [(1, 0), (2, 1), (3, 3), (4, 6), (800, 2394)])
def test_places(k: int, places: int) -> None:
    graph = ck.color_affinity(torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.zeros(2, 3, 3, dtype=torch.int32), k)
    assert graph.edge_index.shape == (2, 2, places)
    assert graph.weight.shape == (2, places)
    assert not graph.weight.any()


def test_nothing_valid() -> None:
    graph = ck.color_affinity(torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8), torch.full((1, 4, 4), -1), 5)
    assert graph.num_edges.tolist() == [0]
    assert not graph.weight.any()
    assert not graph.counts.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_image(dtype: torch.dtype) -> None:
    image = smooth_image((1, 3, 10, 12), 3)
    ids = ck.slic(image, 6)
    for a, e in zip(ck.color_affinity(image.to(dtype) / 255, ids, 6), ck.color_affinity(image, ids, 6), strict=True):
        assert a == e if isinstance(a, int) else torch.equal(a, e)


def checkerboard() -> tuple[Tensor, Tensor]:
    """Every pair of 6 ids touches: 15 edges, more than the 12 of a planar graph."""
    random = generator(0)
    ids = torch.randint(0, 6, (1, 20, 20), generator=random)
    return torch.randint(0, 256, (1, 3, 20, 20), generator=random, dtype=torch.uint8), ids


def test_too_many_edges_raise() -> None:
    image, ids = checkerboard()
    with pytest.raises(ValueError, match=r"12 places for 15 edges; expected at least 15"):
        ck.color_affinity(image, ids, 6)
    graph = ck.color_affinity(image, ids, 6, max_edges=15)
    assert graph.num_edges.tolist() == [15]


def test_too_many_edges_poison_where_values_are_not_read() -> None:
    image, ids = checkerboard()
    torch._dynamo.reset()
    compiled = torch.compile(ck.color_affinity, fullgraph=True, backend="aot_eager")
    graph = compiled(image.expand(2, -1, -1, -1), torch.cat([ids, torch.zeros_like(ids)]), 6)
    assert torch.isnan(graph.weight[0]).all()
    # The other image of the batch is not touched.
    assert not graph.weight[1].any()
    prob = torch.full((2, 6, 3), 1 / 3, requires_grad=True)
    energy = ck.potts(prob, graph)
    assert torch.isnan(energy[0])
    assert energy[1] == 0


def test_errors() -> None:
    image, ids = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"superpixels: got ids from 0 to 3, expected -1 to 1"):
        ck.color_affinity(image, ids.index_fill(1, torch.tensor(2), 3), 2)
    with pytest.raises(ValueError, match=r"superpixels: got ids from -2 to 0"):
        ck.color_affinity(image, ids.index_fill(1, torch.tensor(2), -2), 2)
    with pytest.raises(ValueError, match=r"image: got values from 0.0 to 2.0, expected \[0, 1\]"):
        ck.color_affinity(torch.tensor([0.0, 2.0]).expand(1, 3, 4, 2).repeat(1, 1, 1, 2), ids, 2)
    with pytest.raises(ValueError, match="image: got values from nan"):
        ck.color_affinity(torch.full((1, 3, 4, 4), torch.nan), ids, 2)
    with pytest.raises(TypeError, match=r"image: got shape .* expected torch.uint8"):
        ck.color_affinity(image.int(), ids, 2)
    with pytest.raises(ValueError, match="three channels"):
        ck.color_affinity(image[:, :1], ids, 2)
    with pytest.raises(ValueError, match="the pixels of image"):
        ck.color_affinity(image, ids[:, 1:], 2)
    with pytest.raises(TypeError, match="superpixels: got"):
        ck.color_affinity(image, ids.float(), 2)
    with pytest.raises(ValueError, match="num_superpixels: got 0"):
        ck.color_affinity(image, ids, 0)
    with pytest.raises(TypeError, match="num_superpixels: got float"):
        ck.color_affinity(image, ids, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_edges: got -1"):
        ck.color_affinity(image, ids, 2, max_edges=-1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    segments=st.integers(1, 20),
    hidden=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 1000),
)
def test_graph_of_connected_regions(height: int, width: int, segments: int, hidden: float, seed: int) -> None:
    image = smooth_image((1, 3, height, width), seed)
    mask = torch.rand(1, height, width, generator=generator(seed)) >= hidden
    ids = ck.slic(image, segments, mask=mask)
    graph = ck.color_affinity(image, ids, segments)  # the planar bound holds: nothing raises
    number = int(graph.num_edges[0])
    edges, weight = graph.edge_index[0, :, :number].T.tolist(), graph.weight[0]
    assert edges == sorted(edges)
    assert len({tuple(e) for e in edges}) == number
    assert all(i < j for i, j in edges)
    assert not graph.edge_index[0, :, number:].any()
    assert not weight[number:].any()
    assert int(graph.counts.sum()) == int((ids >= 0).sum())
    if number:
        assert weight[:number].min() > 0
        # The largest weight is 0.8 by definition, rounded to float32.
        assert float(weight.max()) == pytest.approx(0.8, abs=1e-7)
