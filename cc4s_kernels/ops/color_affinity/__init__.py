"""Colour affinities between adjacent superpixels."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_number, check_shape, check_tensor, describe, may_read_values, value_range
from cc4s_kernels.ops.color_affinity import library  # noqa: F401  registers the backends
from cc4s_kernels.ops.color_affinity.reference import SuperpixelGraph

__all__ = ["SuperpixelGraph", "color_affinity"]

# The key of a pair of ids is an int64.
MAX_NODES = 2**31 - 1


def color_affinity(
    image: Tensor, superpixels: Tensor, num_superpixels: int, *, max_edges: int | None = None
) -> SuperpixelGraph:
    """Region adjacency graph of superpixels, weighted by the likeness of their colours and gradients.

    Histograms are integers, so that every backend agrees on them exactly. A constant: no gradient.

    Args:
        image: (B, 3, H, W) uint8, or floating in [0, 1] (rounded to uint8). Grey as three equal channels.
        superpixels: (B, H, W) int32 or int64, ids 0..num_superpixels-1; -1 = not valid: no pixel of the
            image.
        num_superpixels: K, at least 1; ids may be absent.
        max_edges: places for edges, E. None: max(K - 1, 3 K - 6), which is enough where each id is one
            4-connected region (as from `slic`), since the graph is planar. Other maps need it.

    Returns:
        `SuperpixelGraph`: edge_index (B, 2, E) int64, weight (B, E) float32 in [0, 0.8], num_nodes = K,
        num_edges (B,) int64, counts (B, K) int64. Edges are sorted, i < j; padding is (0, 0) with weight 0.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shape, device, option; on the CPU (elsewhere with CC4S_KERNELS_CHECK=1) also an id out of
            range, a float image out of [0, 1], more edges than places. Unchecked, an id out of range counts
            as -1, and more edges than places make all weights of that image NaN.

    Source: the paper "CC4S", colour constraint; docs/method.md section 7.
    """
    _check(image, superpixels, num_superpixels, max_edges)
    run = backends.select("color_affinity", image, superpixels, num_superpixels, max_edges=max_edges)
    graph = run(image, superpixels, num_superpixels, max_edges=max_edges)
    if may_read_values(superpixels) and superpixels.shape[0] > 0:
        found, places = int(graph.num_edges.max()), graph.edge_index.shape[2]
        if found > places:
            raise ValueError(
                f"max_edges: got {max_edges}, which leaves {places} places for {found} edges; "
                f"expected at least {found} (superpixels that are not connected need max_edges=)"
            )
    return graph


def _check(image: Tensor, superpixels: Tensor, num_superpixels: int, max_edges: int | None) -> None:
    check_tensor("image", image, dims="(B, 3, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {describe(image)}, expected torch.uint8, or a floating dtype in [0, 1]")
    batch, _, height, width = image.shape
    check_shape("image", image, (batch, 3, height, width), "three channels; grey: image.expand(-1, 3, -1, -1)")
    if height == 0 or width == 0:
        raise ValueError(f"image: got {describe(image)}, expected at least one pixel")
    check_tensor(
        "superpixels",
        superpixels,
        dims="(B, H, W)",
        dtypes=(torch.int32, torch.int64),
        device=image.device,
    )
    check_shape("superpixels", superpixels, (batch, height, width), "the pixels of image")
    check_number("num_superpixels", num_superpixels, low=1, high=MAX_NODES, integer=True)
    if max_edges is not None:
        check_number("max_edges", max_edges, low=0, integer=True)
    if batch == 0:
        return
    if image.is_floating_point() and may_read_values(image):
        low, high = value_range(image)
        # A NaN anywhere makes the comparison false.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"image: got values from {low} to {high}, expected [0, 1] (or torch.uint8)")
    if may_read_values(superpixels):
        first, last = value_range(superpixels)
        if first < -1 or last >= num_superpixels:
            raise ValueError(
                f"superpixels: got ids from {first} to {last}, expected -1 to {num_superpixels - 1} "
                f"(num_superpixels {num_superpixels})"
            )
