"""Filter along the minimum spanning tree of an image or of features."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_positive, check_shape, check_tensor, describe
from cc4s_kernels.ops.tree_filter import library  # noqa: F401  registers the backends

MAX_PIXELS = 2**30 - 1


def tree_filter(values: Tensor, guide: Tensor, *, sigma: float) -> Tensor:
    """Weighted means along a minimum spanning tree: y_i = sum_j S_ij v_j / sum_j S_ij.

    The tree spans the 4-connected grid of pixels with edge weights w = |guide_p - guide_q|^2, ties by the number of
    the edge (those to the right in raster order, then those down). S_ij = exp(-sum of w along the path from i to j /
    sigma), and S_ii = 1.

    Args:
        values: (B, C, H, W) floating; computed in float32 (float64 stays float64).
        guide: (B, c, H, W), any number of channels: floating as it is, or uint8 (divided by 255). Finite.
        sigma: in units of w, greater than 0.

    Returns:
        (B, C, H, W) in the accumulation dtype. Differentiable with respect to `values` and to a floating `guide`
        (through w of the edges of the tree; the tree itself is a constant).

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: L. Song et al., "Learnable Tree Filter for Structure-preserving Feature Transform", 2019, with the
    weights of Z. Liang et al., "Tree Energy Loss", 2022.
    """
    check_tensor("values", values, dims="(B, C, H, W)", floating=True)
    check_tensor("guide", guide, dims="(B, c, H, W)", device=values.device)
    if guide.dtype != torch.uint8 and not guide.is_floating_point():
        raise TypeError(f"guide: got {describe(guide)}, expected torch.uint8 or a floating dtype")
    batch, _, height, width = values.shape
    check_shape("guide", guide, (batch, guide.shape[1], height, width), "the pixels of values")
    if not 1 <= height * width <= MAX_PIXELS:
        raise ValueError(f"values: got {describe(values)}, expected 1 to {MAX_PIXELS} pixels")
    check_positive("sigma", sigma)
    return backends.select("tree_filter", values, guide, sigma=sigma)(values, guide, sigma=sigma)
