"""Distance between two transition matrices: row divergences and traces, without the N x N matrices."""

from __future__ import annotations

from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_choice, check_number, check_shape
from cc4s_kernels.ops.random_walk.checks import check_mask, check_queries_and_keys, check_same_dtype
from cc4s_kernels.ops.transition_consistency import library as library
from cc4s_kernels.ops.transition_consistency.reference import TransitionConsistency

__all__ = ["TransitionConsistency", "transition_consistency"]


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
    """Compares P = softmax(scale Q Kᵀ) with the target P' of (Q', K'), row by row and by trace.

    kl_i = sum_j P'_ij (log P'_ij - log P_ij), trace = sum_i P_ii, trace_target = sum_i P'_ii. The target is a
    constant: q_target and k_target are detached. kl is never clamped: in floating point it may be a few
    eps * max |E| below 0.

    Masked positions are no state: they are no keys, have kl 0, are not in the traces, and their values (NaN
    included) change nothing.

    Args:
        q: (..., N, d) floating; the leading dimensions (batch, heads) may be any number.
        k: (..., N, d), same shape and dtype.
        q_target: (..., N, d), same shape and dtype; brought to the positions of `q` by the caller.
        k_target: (..., N, d), same shape and dtype.
        mask: (..., N) bool, True = valid position. None: all are valid.
        scale: factor of the scores, of both pairs.
        normalize: "row": over keys, kl is indexed by query. "column": over queries (the roles of Q and K are
            swapped in both pairs), kl is indexed by key.

    Returns:
        Named tuple `kl` (..., N) in nats, `trace` (...), `trace_target` (...): unreduced, float32 (float64
        for float64 inputs), also under autocast. Differentiable in q and k; `trace_target` has no gradient.

    Raises:
        TypeError: not a tensor, no floating dtype, different dtypes, a mask that is not bool, an option of a
            wrong type.
        ValueError: shapes or devices that do not fit, an unknown normalisation, a scale that is not finite.

    Source: docs/method.md section 5.
    """
    check_arguments(q, k, q_target, k_target, mask, scale, normalize)
    q_target, k_target = q_target.detach(), k_target.detach()
    run = backends.select(
        "transition_consistency", q, k, q_target, k_target, mask=mask, scale=scale, normalize=normalize
    )
    return run(q, k, q_target, k_target, mask=mask, scale=scale, normalize=normalize)


def check_arguments(
    q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float, normalize: str
) -> None:
    """Raises what `transition_consistency` says it raises."""
    check_queries_and_keys(q, k)
    check_queries_and_keys(q_target, k_target, ("q_target", "k_target"))
    check_shape("q_target", q_target, q.shape, "that of q")
    check_same_dtype("q", q, "q_target", q_target)
    if q_target.device != q.device:
        raise ValueError(f"q_target: got device {q_target.device}, expected {q.device} as q")
    check_mask(q, mask)
    check_number("scale", scale)
    check_choice("normalize", normalize, ("row", "column"))
