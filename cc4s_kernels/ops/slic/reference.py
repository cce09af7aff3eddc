"""The definition of `slic` in NumPy integers. Step numbers are those of docs/kernels/slic.md."""

from __future__ import annotations

import functools
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

POSITION_SCALE = 16
WEIGHT_SHIFT = 20
# Rows X/Xn, Y/Yn, Z/Zn of sRGB to XYZ (D65) in 1/4096; each sums to 4096, so grey has a = b = 0 exactly.
XYZ = ((1777, 1541, 778), (871, 2929, 296), (73, 448, 3575))


def _linear(level: int) -> int:
    """round(2^16 x) of the sRGB transfer function at level/255, exactly."""
    if Fraction(level, 255) <= Fraction(4045, 100000):
        return round(Fraction(level, 255) / Fraction(1292, 100) * 2**16)
    # x = base^(12/5): the largest v with (v - 1/2)^5 <= 2^80 base^12.
    base = (Fraction(level, 255) + Fraction(55, 1000)) / Fraction(1055, 1000)
    bound = 2**85 * base**12
    low, high = 0, 2**16 + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (2 * middle - 1) ** 5 <= bound else (low, middle)
    return low


@functools.cache
def lab_tables() -> tuple[np.ndarray, np.ndarray]:
    """linear (256,): round(2^16 x); cube_root (2^14 + 1,): round(2^15 f(t / 2^14)) with f of CIE Lab. int64,
    exact.
    """
    linear = np.array([_linear(level) for level in range(256)], np.int64)
    t = np.arange(2**14 + 1, dtype=np.int64)
    root = np.rint(np.cbrt(t / 2**14) * 2**15).astype(np.int64)
    # The guess may be one off; integers decide: the largest root with (root - 1/2)^3 <= 2^31 t.
    root -= (2 * root - 1) ** 3 > t << 34
    root += (2 * root + 1) ** 3 <= t << 34
    line = (2 * (2 * t * 24389 + 432 * 2**15) + 3132) // (2 * 3132)
    return linear, np.where(t * 24389 <= 216 * 2**14, line, root)


def lab(image: np.ndarray) -> np.ndarray:
    """Step 1: uint8 sRGB (3, H, W) to CIE Lab (3, H, W) int64 in 1/64, a and b shifted by 128."""
    linear, cube_root = lab_tables()
    rgb = linear[image]
    fx, fy, fz = (cube_root[(r * rgb[0] + g * rgb[1] + b * rgb[2] + (1 << 13)) >> 14] for r, g, b in XYZ)
    half = 1 << 14
    return np.stack(
        [
            ((7424 * fy + half) >> 15) - 1024,
            (32000 * (fx - fy) + (1 << 28) + half) >> 15,
            (12800 * (fy - fz) + (1 << 28) + half) >> 15,
        ]
    )


class Grid(NamedTuple):
    """Step 2: rows x cols cells and the weight of a squared distance in 1/16 pixels, times 2^20."""

    rows: int
    cols: int
    weight: int


def grid_of(height: int, width: int, num_segments: int, compactness: int) -> Grid:
    n = min(num_segments, height * width)
    rows = min(max((isqrt(4 * n * height // width) + 1) // 2, 1), height, n)
    cols = min(width, n // rows)
    spacing = max(-(-height // rows), -(-width // cols))
    return Grid(rows, cols, (512 * compactness**2 + spacing**2) // (2 * spacing**2))


def _rounded_ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return (2 * total + count) // np.maximum(2 * count, 1)


def cluster(colors: np.ndarray, valid: np.ndarray, grid: Grid, iterations: int) -> np.ndarray:
    """Steps 3 to 5: the cluster of each pixel (H, W), -1 where not valid."""
    height, width = valid.shape
    y, x = np.indices((height, width))
    cell_y, cell_x = y * grid.rows // height, x * grid.cols // width
    labels = np.where(valid, cell_y * grid.cols + cell_x, -1)
    features = np.stack([*colors, x * POSITION_SCALE, y * POSITION_SCALE])  # [5, H, W]
    for _ in range(iterations):
        count = np.zeros(grid.rows * grid.cols, np.int64)
        np.add.at(count, labels[valid], 1)
        center = np.zeros((5, count.size), np.int64)
        for total, feature in zip(center, features, strict=True):
            np.add.at(total, labels[valid], feature[valid])
        center = _rounded_ratio(center, count)

        best = np.full((height, width), np.iinfo(np.int64).max)
        # Neighbouring cells in ascending order and a strict comparison: ties go to the lowest id.
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                i, j = cell_y + dy, cell_x + dx
                inside = (i >= 0) & (i < grid.rows) & (j >= 0) & (j < grid.cols)
                c = np.where(inside, i * grid.cols + j, 0)
                d = features - center[:, c]
                distance = (d[:3] ** 2).sum(0) + ((grid.weight * d[3:] ** 2) >> WEIGHT_SHIFT).sum(0)
                closer = valid & inside & (count[c] > 0) & (distance < best)
                best = np.where(closer, distance, best)
                labels = np.where(closer, c, labels)
    return labels


def _neighbours(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of `field` (H, W) at both ends of all 4-neighbour pairs."""
    first = np.concatenate([field[:, :-1].ravel(), field[:-1].ravel()])
    second = np.concatenate([field[:, 1:].ravel(), field[1:].ravel()])
    return first, second


def _components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of `count` nodes the lowest node it is connected to by the edges a-b."""
    graph = coo_array((np.ones(a.size, np.int8), (a, b)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def _longest_borders(selected: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The selected regions that have a neighbour and, for each, the one with the longest border (ties: lowest
    id).

    a, b: the regions on both sides of each unit of border.
    """
    region, other = np.concatenate([a, b]), np.concatenate([b, a])
    keep = selected[region]
    pairs, length = np.unique(np.stack([region[keep], other[keep]]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -length, pairs[0]))
    region, start = np.unique(pairs[0][order], return_index=True)
    return region, pairs[1][order][start]


def connect(labels: np.ndarray, num_segments: int) -> np.ndarray:
    """Steps 6 to 9: clusters (H, W) to connected segments numbered in raster order, at most
    `num_segments`.
    """
    valid = labels >= 0
    total, clusters = int(valid.sum()), np.unique(labels[valid]).size
    index = np.arange(labels.size).reshape(labels.shape)

    # A region is named by its first pixel in raster order.
    pixel_a, pixel_b = _neighbours(index)
    label_a, label_b = _neighbours(labels)
    inside = (label_a == label_b) & (label_a >= 0)
    region = _components(labels.size, pixel_a[inside], pixel_b[inside])
    border = (label_a != label_b) & (label_a >= 0) & (label_b >= 0)
    pixel_a, pixel_b = pixel_a[border], pixel_b[border]

    def sizes() -> np.ndarray:
        return np.bincount(region[valid.ravel()], minlength=labels.size)

    def merge(selected: np.ndarray) -> bool:
        nonlocal region
        a, b = region[pixel_a], region[pixel_b]
        source, target = _longest_borders(selected, a[a != b], b[a != b])
        region = _components(labels.size, source, target)[region]
        return source.size > 0

    while merge((sizes() > 0) & (sizes() * 4 * clusters < total)):
        pass
    while (excess := int((sizes() > 0).sum()) - num_segments) > 0:
        size = sizes()
        a, b = region[pixel_a], region[pixel_b]
        movable = np.unique(np.concatenate([a[a != b], b[a != b]]))
        smallest = movable[np.lexsort((movable, size[movable]))][:excess]
        selected = np.zeros(labels.size, bool)
        selected[smallest] = True
        if not merge(selected):
            break

    size = sizes()
    kept = np.flatnonzero(size)
    kept = np.sort(kept[np.lexsort((kept, -size[kept]))][:num_segments])
    ids = np.full(labels.size, -1, np.int32)
    ids[kept] = np.arange(kept.size)
    return np.where(valid, ids[region].reshape(labels.shape), -1).astype(np.int32)


def slic(image: Tensor, mask: Tensor | None, num_segments: int, compactness: int, iterations: int) -> Tensor:
    """image (B, 3, H, W) uint8, mask (B, H, W) bool -> (B, H, W) int32; compactness in 1/256.

    Runs on the CPU wherever the image is.
    """
    batch, _, height, width = image.shape
    out = np.empty((batch, height, width), np.int32)
    pixels = image.cpu().numpy()
    valid = np.ones(out.shape, bool) if mask is None else mask.cpu().numpy()
    for b in range(batch):
        grid = grid_of(height, width, num_segments, compactness)
        out[b] = connect(cluster(lab(pixels[b]), valid[b], grid, iterations), num_segments)
    return torch.from_numpy(out).to(image.device)
