"""Definition of `random_walk` in plain PyTorch; builds the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype, without_autocast


def masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale Q Kᵀ in the accumulation dtype; -inf in columns of masked keys, 0 throughout a masked row.

    A valid row has at least itself as a key, so no row is -inf throughout and a softmax is always finite; the
    caller zeroes the rows of masked queries afterwards.

    Args:
        q: (..., N, d) floating.
        k: (..., N, d).
        mask: (..., N) bool or None.
        scale: factor of the scores.

    Returns:
        (..., N, N) in float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    if mask is not None:
        q, k = zero_invalid(q, mask), zero_invalid(k, mask)
    scores = scale * (q @ k.mT)  # [..., N, N]
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, :], -torch.inf).masked_fill(~mask[..., :, None], 0.0)
    return scores


def zero_invalid(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (..., N, d) with the rows of masked positions 0 (whatever stood there, NaN included)."""
    return x.masked_fill(~mask[..., None], 0.0)


def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `cc4s_kernels.random_walk`."""
    with without_autocast(q.device):
        scores = masked_scores(q, k, mask, scale)
        transition = scores.softmax(-1)  # [..., N, N]
        lse = scores.logsumexp(-1)  # [..., N]
        start = v.to(scores.dtype)
        if mask is not None:
            lse = lse.masked_fill(~mask, 0.0)
            transition = zero_invalid(transition, mask)
            start = zero_invalid(start, mask)
        y = start
        for _ in range(steps):
            y = (1.0 - restart) * (transition @ y) + restart * start
        y = y.to(v.dtype)
    return (y, lse) if return_lse else y
