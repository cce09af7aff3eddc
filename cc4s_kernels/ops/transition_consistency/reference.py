"""Definition of `transition_consistency` in plain PyTorch; builds the N x N matrices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cc4s_kernels._precision import without_autocast
from cc4s_kernels.ops.random_walk.reference import masked_scores


class TransitionConsistency(NamedTuple):
    """What `transition_consistency` returns.

    kl: (..., N) divergence of each row in nats. trace: (...) trace of P. trace_target: (...) trace of P',
        constant.
    """

    kl: Tensor
    trace: Tensor
    trace_target: Tensor


def transition_consistency(
    q: Tensor,
    k: Tensor,
    q_target: Tensor,
    k_target: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "row",
) -> TransitionConsistency:
    """See `cc4s_kernels.transition_consistency`."""
    if normalize == "column":
        q, k, q_target, k_target = k, q, k_target, q_target
    with without_autocast(q.device):
        log_p = masked_scores(q, k, mask, scale).log_softmax(-1)  # [..., N, N]
        log_target = masked_scores(q_target.detach(), k_target.detach(), mask, scale).log_softmax(-1)
        p, target = log_p.exp(), log_target.exp()
        if mask is not None:
            # A masked pair has log P = log P' = -inf and adds nothing.
            pairs = mask[..., :, None] & mask[..., None, :]  # [..., N, N]
            log_p, log_target = log_p.masked_fill(~pairs, 0.0), log_target.masked_fill(~pairs, 0.0)
            p, target = p.masked_fill(~pairs, 0.0), target.masked_fill(~pairs, 0.0)
        kl = (target * (log_target - log_p)).sum(-1)  # [..., N]
        return TransitionConsistency(kl, trace(p), trace(target))


def trace(matrix: Tensor) -> Tensor:
    """Trace over the last two axes: (..., N, N) -> (...)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
