"""Definition of `transition_matrix` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from cc4s_kernels._precision import without_autocast
from cc4s_kernels.ops.random_walk.reference import masked_scores


def transition_matrix(q: Tensor, k: Tensor, *, scale: float = 1.0, normalize: str = "row") -> Tensor:
    """See `cc4s_kernels.transition_matrix`."""
    with without_autocast(q.device):
        scores = masked_scores(q, k, None, scale)  # [..., N, N]
        if normalize == "row":
            matrix = scores.softmax(-1)
        elif normalize == "column":
            matrix = scores.softmax(-2)
        else:
            scores = (scores + scores.mT) / 2
            half = scores.logsumexp(-1) / 2  # [..., N]
            matrix = (scores - (half[..., :, None] + half[..., None, :])).exp()
        return matrix.to(q.dtype)
