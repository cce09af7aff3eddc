"""The transition matrix itself, for analysis and for small N."""

from __future__ import annotations

from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._precision import cast_for_autocast
from cc4s_kernels._validation import check_choice, check_number
from cc4s_kernels.ops.random_walk.checks import check_queries_and_keys
from cc4s_kernels.ops.transition_matrix import library as library

__all__ = ["transition_matrix"]

NORMALIZATIONS = ("row", "column", "symmetric")


def transition_matrix(q: Tensor, k: Tensor, *, scale: float = 1.0, normalize: str = "row") -> Tensor:
    """Builds the matrix of transitions between all pairs of positions, E = scale Q Kᵀ normalised.

    Its result has N² entries by nature; `random_walk` and `transition_consistency` never need it.

    Args:
        q: (..., N, d) floating; the leading dimensions may be any number.
        k: (..., N, d), same shape and dtype.
        scale: factor of the scores.
        normalize: "row": softmax over keys, rows sum to 1 (the P of `random_walk`). "column": softmax over
            queries, columns sum to 1. "symmetric": with S = (E + Eᵀ) / 2 and l the logsumexp of its rows,
            M_ij = exp(S_ij - (l_i + l_j) / 2): symmetric, with the eigenvalues of softmax(S).

    Returns:
        (..., N, N) in the dtype of `q`, indexed [query, key]; computed in float32 for half-precision inputs.
        Under autocast the inputs are cast to the autocast dtype first. Differentiable in q and k.

    Raises:
        TypeError: not a tensor, no floating dtype, different dtypes, an option of a wrong type.
        ValueError: shapes or devices that do not fit, an unknown normalisation, a scale that is not finite.

    Source: docs/method.md section 2.
    """
    check_queries_and_keys(q, k)
    check_number("scale", scale)
    check_choice("normalize", normalize, NORMALIZATIONS)
    q, k = cast_for_autocast(q, k)
    run = backends.select("transition_matrix", q, k, scale=scale, normalize=normalize)
    return run(q, k, scale=scale, normalize=normalize)
