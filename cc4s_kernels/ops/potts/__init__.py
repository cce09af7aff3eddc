"""Relaxed Potts energies on superpixel graphs and pixel grids."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_choice, check_shape, check_tensor, describe, may_read_values
from cc4s_kernels.ops.color_affinity.reference import SuperpixelGraph
from cc4s_kernels.ops.potts import library  # noqa: F401  registers the backends
from cc4s_kernels.ops.potts.grid import OFFSETS, PixelGrid, gaussian_grid, pixel_grid
from cc4s_kernels.ops.potts.reference import NORMS, RELAXATIONS

__all__ = ["NORMS", "RELAXATIONS", "PixelGrid", "gaussian_grid", "pixel_grid", "potts"]


def potts(
    prob: Tensor,
    graph_or_grid: SuperpixelGraph | PixelGrid,
    *,
    relaxation: str = "quadratic",
    norm: str = "sum",
) -> Tensor:
    """Pairwise energy of soft labels: (2 / norm) * sum over ordered pairs of w_ij r(p_i, p_j), per image.

    With the quadratic relaxation, that is (2 / norm) sum_{i<j} w_ij |p_i - p_j|^2, the colour constraint of
    CC4S.

    Args:
        prob: class probabilities of any floating dtype (computed in float32; float64 stays float64): (B, K,
            C) for a `SuperpixelGraph`, (B, C, H, W) for a `PixelGrid`. Each distribution sums to 1; rows
            without an edge may hold anything finite.
        graph_or_grid: from `color_affinity`, or from `pixel_grid` or `gaussian_grid`. Its weights may require
            a gradient.
        relaxation: r(p, q), with cos = p.q / (|p| |q|) and ln~(x) = ln(1e-6 + (1 - 1e-6) x):
            "bilinear" 1 - p.q; "quadratic" |p - q|^2 / 2; "normalized_quadratic" 1 - cos;
            "collision_cross_entropy" -ln~(p.q); "collision_divergence" -ln~(cos);
            "log_quadratic" -ln~(1 - |p - q|^2 / 2).
        norm: "sum": sum of w over ordered pairs (twice a weighted mean of r); "frobenius": root of the sum of
            w^2 over ordered pairs; "none": 1.

    Returns:
        (B,) energies, at least 0; 0 with gradient 0 where there is no edge or all weights are 0. NaN where
        the weights are (edges that found no place in the graph).

    Raises:
        TypeError, ValueError: an argument is not as above (on the CPU, elsewhere with CC4S_KERNELS_CHECK=1:
            also an edge between nodes that do not exist).

    Source: the paper "CC4S", colour constraint, and Z. Zhang and Y. Boykov, "Soft Self-Labeling and Potts
    Relaxations for Weakly-Supervised Segmentation", 2025; docs/method.md section 7.
    """
    _check(prob, graph_or_grid, relaxation, norm)
    options = {"relaxation": relaxation, "norm": norm}
    return backends.select("potts", prob, graph_or_grid, **options)(prob, graph_or_grid, **options)


def _check(prob: Tensor, graph_or_grid: SuperpixelGraph | PixelGrid, relaxation: str, norm: str) -> None:
    check_choice("relaxation", relaxation, RELAXATIONS)
    check_choice("norm", norm, NORMS)
    if isinstance(graph_or_grid, PixelGrid):
        check_tensor("prob", prob, dims="(B, C, H, W)", floating=True)
        weight = graph_or_grid.weight
        check_tensor("weight", weight, dims="(B, D, H, W)", floating=True, device=prob.device)
        expected = (weight.shape[0], weight.shape[1], *prob.shape[2:])
        check_shape("weight", weight, expected, "the pixels of prob")
        if weight.shape[0] not in (1, prob.shape[0]) or weight.shape[1] not in (2, len(OFFSETS)):
            raise ValueError(
                f"weight: got {describe(weight)}, expected batch 1 or {prob.shape[0]} and 2 or 4 directions"
            )
        return
    if not isinstance(graph_or_grid, SuperpixelGraph):
        raise TypeError(f"graph_or_grid: got {describe(graph_or_grid)}, expected a SuperpixelGraph or a PixelGrid")
    check_tensor("prob", prob, dims="(B, K, C)", floating=True)
    batch, nodes, _ = prob.shape
    edges, weight = graph_or_grid.edge_index, graph_or_grid.weight
    if nodes != graph_or_grid.num_nodes:
        raise ValueError(
            f"prob: got {describe(prob)}, expected {graph_or_grid.num_nodes} nodes (num_nodes of the graph)"
        )
    check_tensor("edge_index", edges, dims="(B, 2, E)", dtypes=(torch.int64,), device=prob.device)
    check_shape("edge_index", edges, (batch, 2, edges.shape[2]), "the batch of prob")
    check_tensor("weight", weight, dims="(B, E)", floating=True, device=prob.device)
    check_shape("weight", weight, (batch, edges.shape[2]), "the edges of the graph")
    if edges.numel() and may_read_values(edges):
        low, high = (int(value) for value in torch.aminmax(edges))
        if low < 0 or high >= nodes:
            raise ValueError(f"edge_index: got nodes from {low} to {high}, expected 0 to {nodes - 1}")
