"""The definition of `tree_filter`: the tree by SciPy, the filter in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor
from torch.nn.functional import pad

from cc4s_kernels._precision import accumulation_dtype, without_autocast


def edge_weights(guide: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, E): squared distances of neighbours, of those to the right [H, W - 1], then of those down [H - 1, W]."""
    guide = guide.to(dtype) if guide.is_floating_point() else guide.to(dtype) / 255
    right = (guide[..., 1:] - guide[..., :-1]).square().sum(1)
    down = (guide[..., 1:, :] - guide[..., :-1, :]).square().sum(1)
    return torch.cat([right.flatten(1), down.flatten(1)], 1)


def trees(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum spanning trees of grids.

    Args:
        weight: (B, E) finite.

    Returns:
        order (B, N) int64: pixels, parents first, from pixel 0. parent (B, N): the place in `order` of each one's
        parent, 0 for the root. edge (B, N): the edge to it, -1 for the root. Runs on the CPU wherever the weights are.
    """
    batch, n = weight.shape[0], height * width
    pixel = np.arange(n).reshape(height, width)
    first = np.concatenate([pixel[:, :-1].ravel(), pixel[:-1].ravel()])
    second = np.concatenate([pixel[:, 1:].ravel(), pixel[1:].ravel()])
    order, parent, edge = np.zeros((3, batch, n), np.int64)
    edge[:, 0] = -1
    for b, values in enumerate(weight.detach().cpu().numpy()):
        # Ranks are distinct, which makes the tree unique, and not 0, which SciPy takes for no edge.
        rank = np.empty(values.size)
        rank[np.argsort(values, kind="stable")] = np.arange(1, values.size + 1)
        tree = minimum_spanning_tree(coo_array((rank, (first, second)), shape=(n, n)).tocsr()).tocoo()
        order[b], predecessor = breadth_first_order(tree, 0, directed=False)
        place = np.empty(n, np.int64)
        place[order[b]] = np.arange(n)
        above = predecessor[order[b, 1:]]
        parent[b, 1:] = place[above]
        low, high = np.minimum(above, order[b, 1:]), np.maximum(above, order[b, 1:])
        right = low // width * (width - 1) + low % width
        edge[b, 1:] = np.where(high == low + 1, right, height * (width - 1) + low) if width > 1 else low
    return tuple(torch.from_numpy(t).to(weight.device) for t in (order, parent, edge))  # type: ignore[return-value]


def decays(weight: Tensor, edge: Tensor, sigma: float) -> Tensor:
    """(B, N): exp(-w / sigma) of the edge to the parent of each place, 0 for the root."""
    return pad(torch.exp(-weight / sigma), (1, 0)).gather(1, edge + 1)


def filtered(values: Tensor, decay: Tensor, order: Tensor, parent: Tensor) -> Tensor:
    """values (B, C, N) -> sum_j S_ij v_j / sum_j S_ij, by doubling the length of paths: log2(N) steps each way."""
    index = order[:, None].expand_as(values)
    total = torch.cat([values.gather(2, index), torch.ones_like(values[:, :1])], 1)
    rounds = (values.shape[2] - 1).bit_length()
    # Up: with M the step to the parent, (I + M + M^2 + ...) v = ... (I + M^4) (I + M^2) (I + M) v.
    jump, path = parent, decay
    for _ in range(rounds):
        step = jump[:, None].expand_as(total)
        total = total.scatter_add(2, step, path[:, None] * total)
        jump, path = jump.gather(1, jump), path * path.gather(1, jump)
    # Down: y_i = s_i y_parent + (1 - s_i^2) a_i.
    total = (1 - decay.square())[:, None] * total
    jump, path = parent, decay
    for _ in range(rounds):
        total = total + path[:, None] * total.gather(2, jump[:, None].expand_as(total))
        jump, path = jump.gather(1, jump), path * path.gather(1, jump)
    return torch.zeros_like(values).scatter(2, index, total[:, :-1] / total[:, -1:])


def tree_filter(values: Tensor, guide: Tensor, *, sigma: float) -> Tensor:
    """docs/kernels/tree_filter.md as it is written; arguments are valid (the public function checks them)."""
    with without_autocast(values.device):
        dtype = accumulation_dtype(values.dtype)
        weight = edge_weights(guide, dtype)
        order, parent, edge = torch.ops.cc4s_kernels.tree_filter_trees_reference(
            weight.detach().nan_to_num(), *values.shape[2:]
        )
        out = filtered(values.to(dtype).flatten(2), decays(weight, edge, sigma), order, parent)
        return out.unflatten(2, values.shape[2:])
