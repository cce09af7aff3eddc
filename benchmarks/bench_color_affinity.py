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
# The crop and the number of superpixels of the training recipe.
SIZES = ({"B": 1, "H": 465, "W": 465, "K": 800},)


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

    Returns: edges (2, n) sorted, their weights, the pixels of each superpixel.
    """
    red, green, blue = image.astype(np.int32)
    luma = 299 * red + 587 * green + 114 * blue
    gradient = np.empty((2, *luma.shape), np.int32)
    for g, y in ((gradient[0], luma), (gradient[1].T, luma.T)):
        g[:, 1:-1] = y[:, 2:] - y[:, :-2]
        g[:, 0] = 2 * (y[:, 1] - y[:, 0])
        g[:, -1] = 2 * (y[:, -1] - y[:, -2])
    low = gradient.min()
    span = max(int(gradient.max() - low), 1)
    gradient -= low
    gradient *= 10
    texture = np.minimum(gradient // np.int32(span), 9)
    # A table of 256 bins instead of divisions.
    color = np.minimum(np.arange(256) * 25 // 255, 24).astype(np.int32)[image]

    # One count over both textures, whose sums are the two histograms; three over the colours.
    pairs = np.bincount((ids * 100 + texture[0] * 10 + texture[1]).ravel(), minlength=100 * k).reshape(k, 10, 10)
    counts = pairs.sum((1, 2))
    share = 1 / np.maximum(counts, 1)[:, None]
    node = ids * 25
    h_color = np.concatenate([np.bincount((node + c).ravel(), minlength=25 * k).reshape(k, 25) for c in color], 1)
    h_texture = np.concatenate([pairs.sum(2), pairs.sum(1)], 1) * share
    h_color = h_color * share

    keys = []
    for a, b in ((ids[:, 1:], ids[:, :-1]), (ids[1:], ids[:-1])):
        border = a != b
        a, b = a[border], b[border]
        keys.append(np.minimum(a, b) * k + np.maximum(a, b))
    i, j = np.divmod(np.unique(np.concatenate(keys)), k)
    d_color, d_texture = h_color[i] - h_color[j], h_texture[i] - h_texture[j]
    distance = np.sqrt(np.einsum("es,es->e", d_color, d_color)) / 25
    distance += np.sqrt(np.einsum("es,es->e", d_texture, d_texture)) / 100
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
