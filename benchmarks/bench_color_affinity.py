"""color_affinity: colour and texture histograms of superpixels, their adjacency, and the weights of the edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run
from benchmarks.photograph import photograph
from cc4s_kernels.ops.color_affinity.reference import planar_edges

OP = "color_affinity"
# (100, 20): the bin across and the bin down of each pair of bins.
PAIR_BINS = np.concatenate([np.repeat(np.eye(10), 10, 0), np.tile(np.eye(10), (10, 1))], 1)
# The crop and the number of superpixels of the training recipe.
SIZES = ({"B": 1, "H": 465, "W": 465, "K": 800},)
GPU_SIZES = ({**SIZES[0], "B": 16},)


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("uint8",)) -> list[Case]:
    """Least traffic: three bytes and the id of a pixel read; 20 bytes of each place for an edge and 8 of each count
    written. The float operations of the edges are under a hundredth of the integer ones of the pixels: not counted.
    """
    made = []
    for size in sizes:
        pixels, k = size["H"] * size["W"], size["K"]
        traffic = size["B"] * ((3 + 4) * pixels + 20 * planar_edges(k) + 8 * k)
        made += [Case(OP, size, dtype, "forward", 0, 0, traffic) for dtype in dtypes]
    return made


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """A photograph and its superpixels, on the CPU."""
    image = photograph(*(case.size[key] for key in "BHW"))
    return image, ck.slic(image, case.size["K"])


def numpy_graph(image: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image (3, H, W) whose pixels all have an id (H, W): the definition in vectorised NumPy.

    Written for speed: 32-bit integers, in place where that helps, counts over combined indices, and flags of all pairs
    of ids instead of a sort of the pairs that touch.

    Returns: edges (2, n) sorted, their weights, the pixels of each superpixel.
    """
    levels = image.astype(np.int32)
    luma = 299 * levels[0] + 587 * levels[1] + 114 * levels[2]
    gradient = np.empty((2, *luma.shape), np.int32)
    across, down = gradient
    np.subtract(luma[:, 2:], luma[:, :-2], out=across[:, 1:-1])
    across[:, 0], across[:, -1] = 2 * (luma[:, 1] - luma[:, 0]), 2 * (luma[:, -1] - luma[:, -2])
    np.subtract(luma[2:], luma[:-2], out=down[1:-1])
    down[0], down[-1] = 2 * (luma[1] - luma[0]), 2 * (luma[-1] - luma[-2])
    low = gradient.min()
    span = max(int(gradient.max() - low), 1)
    gradient -= low
    gradient *= 10
    gradient //= np.int32(span)
    np.minimum(gradient, 9, out=gradient)
    # One count for both gradients; its sums over either one are the histograms.
    across *= 10
    across += down
    across += ids * 100
    pairs = np.bincount(across.ravel(), minlength=100 * k).reshape(k, 100)
    h_texture = pairs.astype(np.float64) @ PAIR_BINS
    levels *= 25
    levels //= np.int32(255)
    np.minimum(levels, 24, out=levels)
    levels += ids * 25
    h_color = np.concatenate([np.bincount(c.ravel(), minlength=25 * k).reshape(k, 25) for c in levels], 1)
    counts = h_color[:, :25].sum(1)
    share = 1 / np.maximum(counts, 1)[:, None]
    h_color, h_texture = h_color * share, h_texture * share

    touch, row = np.zeros(k * k, bool), ids.ravel()
    for step in (1, ids.shape[1]):
        first, second = row[step:], row[:-step]
        border = first != second
        if step == 1:
            # The end of a row and the start of the next do not touch.
            border[ids.shape[1] - 1 :: ids.shape[1]] = False
        at = np.flatnonzero(border)
        first, second = first[at], second[at]
        touch[np.minimum(first, second) * k + np.maximum(first, second)] = True
    i, j = np.divmod(np.flatnonzero(touch), k)
    color, texture = h_color.take(i, 0), h_texture.take(i, 0)
    color -= h_color.take(j, 0)
    texture -= h_texture.take(j, 0)
    distance = np.sqrt(np.einsum("es,es->e", color, color)) / 25
    distance += np.sqrt(np.einsum("es,es->e", texture, texture)) / 100
    w = np.exp(-5 * distance)
    u = np.maximum(w - 0.8 * w.min(), 0)
    return np.stack([i, j]), 0.8 * u / u.max(), counts


def numpy_definition(case: Case, device: torch.device) -> Run:
    image, ids = (tensor.numpy() for tensor in inputs(case))
    k = case.size["K"]
    places = planar_edges(k)

    def run() -> Sequence[Tensor]:
        edge_index = np.zeros((len(image), 2, places), np.int64)
        weight = np.zeros((len(image), places), np.float32)
        num_edges, counts = np.zeros(len(image), np.int64), np.zeros((len(image), k), np.int64)
        for b in range(len(image)):
            edges, w, counts[b] = numpy_graph(image[b], ids[b], k)
            num_edges[b] = len(w)
            edge_index[b, :, : len(w)], weight[b, : len(w)] = edges, w
        return [torch.from_numpy(x).to(device) for x in (edge_index, weight, num_edges, counts)]

    return run


def on_backend(name: str, case: Case, device: torch.device) -> Run:
    image, ids = (tensor.to(device) for tensor in inputs(case))

    def run() -> Sequence[Tensor]:
        with ck.use_backend(name):
            graph = ck.color_affinity(image, ids, case.size["K"])
        return graph.edge_index, graph.weight, graph.num_edges, graph.counts

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    made = [Provider("NumPy", numpy_definition)]
    for name in sorted(ck.backends.available(OP), key=lambda name: name != "reference"):
        label = name if name == "reference" else f"cc4s {name}"
        # Integers are equal; weights are rounded to float32.
        made.append(Provider(label, lambda c, d, name=name: on_backend(name, c, d), "NumPy", 1e-6))
    return made
