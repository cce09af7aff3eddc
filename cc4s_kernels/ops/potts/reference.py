"""The definition of `potts` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels.ops.color_affinity.reference import SuperpixelGraph
from cc4s_kernels.ops.potts.grid import PixelGrid, pairs

EPS = 1e-6

RELAXATIONS = (
    "bilinear",
    "quadratic",
    "normalized_quadratic",
    "collision_cross_entropy",
    "collision_divergence",
    "log_quadratic",
)
NORMS = ("sum", "frobenius", "none")


def negative_log(x: Tensor) -> Tensor:
    """-ln(eps + (1 - eps) x) >= 0 for x in [0, 1] up to rounding."""
    return -torch.log(EPS + (1 - EPS) * x.clamp(0, 1))


def _cosine(p: Tensor, q: Tensor, dim: int) -> Tensor:
    """p.q / (|p| |q|), at most 1; 0 with gradient 0 where p or q is 0."""
    squares = (p * p).sum(dim) * (q * q).sum(dim)
    some = squares > 0
    # The root's gradient is infinite at 0: it must not see it.
    length = squares.where(some, 1).sqrt()
    return ((p * q).sum(dim) / length).where(some, 0).clamp(max=1)


def relax(p: Tensor, q: Tensor, relaxation: str, dim: int) -> Tensor:
    """The relaxation of each pair of distributions over `dim`; at least 0."""
    if relaxation == "bilinear":
        return (1 - (p * q).sum(dim)).clamp(min=0)
    if relaxation == "quadratic":
        return (p - q).square().sum(dim) / 2
    if relaxation == "normalized_quadratic":
        return 1 - _cosine(p, q, dim)
    if relaxation == "collision_cross_entropy":
        return negative_log((p * q).sum(dim))
    if relaxation == "collision_divergence":
        return negative_log(_cosine(p, q, dim))
    # log_quadratic: 1 - |p - q|^2 / 2 on the simplex, as sums of terms that are not negative.
    return negative_log((p * q).sum(dim) + (p * (1 - p)).sum(dim) / 2 + (q * (1 - q)).sum(dim) / 2)


def _graph_terms(prob: Tensor, graph: SuperpixelGraph, relaxation: str) -> tuple[Tensor, Tensor]:
    """sum_{i<j} w r (B,) and the weights of all pairs (B, E)."""
    index = graph.edge_index[..., None].expand(-1, -1, -1, prob.shape[2])  # [B, 2, E, C]
    p, q = prob.gather(1, index[:, 0]), prob.gather(1, index[:, 1])  # [B, E, C]
    weight = graph.weight.to(prob.dtype)
    return (weight * relax(p, q, relaxation, 2)).sum(1), weight


def _grid_terms(prob: Tensor, grid: PixelGrid, relaxation: str) -> tuple[Tensor, Tensor]:
    total = prob.new_zeros(prob.shape[0])
    weights = []
    for direction in range(grid.weight.shape[1]):
        p, q = pairs(prob, direction)  # [B, C, H', W']
        weight, _ = pairs(grid.weight[:, direction].to(prob.dtype), direction)  # [B or 1, H', W']
        total = total + (weight * relax(p, q, relaxation, 1)).sum((1, 2))
        weights.append(weight.flatten(1))
    return total, torch.cat(weights, 1)


def potts(
    prob: Tensor,
    graph_or_grid: SuperpixelGraph | PixelGrid,
    *,
    relaxation: str = "quadratic",
    norm: str = "sum",
) -> Tensor:
    """docs/method.md section 7 as it is written; arguments are valid (the public function checks them)."""
    with without_autocast(prob.device):
        prob = prob.to(accumulation_dtype(prob.dtype))
        if isinstance(graph_or_grid, PixelGrid):
            total, weight = _grid_terms(prob, graph_or_grid, relaxation)
        else:
            total, weight = _graph_terms(prob, graph_or_grid, relaxation)
        # Over ordered pairs: twice the sum over pairs.
        energy = 4 * total
        if norm == "none":
            return energy
        scale = 2 * (weight if norm == "sum" else weight * weight).sum(1)
        empty = scale == 0
        scale = scale.where(~empty, 1)
        if norm == "frobenius":
            scale = scale.sqrt()
        # 0 / 1 without a weight; NaN weights stay NaN.
        return energy / scale
