"""Random walk on neural representations: softmax(scale Q Kᵀ) applied to values, without the N x N matrix."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._precision import cast_for_autocast
from cc4s_kernels.ops.random_walk import library as library
from cc4s_kernels.ops.random_walk.checks import check_walk

__all__ = ["random_walk"]


@overload
def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    """Lets values walk on the graph whose transition matrix is P = softmax(scale Q Kᵀ) over keys.

    Y_0 = V, Y_{i+1} = (1 - restart) P Y_i + restart V; the result is Y_steps. With one step and no restart it
    is attention without 1/sqrt(d): Y = P V.

    Masked positions are no state: they are no keys, their rows of Y and of lse are 0, their gradients are 0,
    and their values (NaN included) change nothing.

    Args:
        q: (..., N, d) floating; the leading dimensions (batch, heads) may be any number.
        k: (..., N, d), same dtype and leading dimensions.
        v: (..., N, D), same dtype and leading dimensions.
        mask: (..., N) bool, True = valid position. None: all are valid.
        scale: factor of the scores; the paper has 1.
        steps: number of steps, at least 1.
        restart: probability in [0, 1] of going back to the start in each step.
        return_lse: also return the log-normaliser of each row of scores.

    Returns:
        Y (..., N, D) in the dtype of `v`; with `return_lse` a tuple (Y, lse), lse (..., N) float32 (float64
        for float64 inputs), differentiable. Scores, softmax and sums are float32 for half-precision inputs.
        Under autocast the inputs are cast to the autocast dtype first. Differentiable in q, k and v.

    Raises:
        TypeError: not a tensor, no floating dtype, different dtypes, a mask that is not bool, an option of a
            wrong type.
        ValueError: shapes or devices that do not fit, an option out of range or not finite.

    Source: docs/method.md section 2.
    """
    check_walk(q, k, v, mask, scale, steps, restart)
    q, k, v = cast_for_autocast(q, k, v)
    run = backends.select(
        "random_walk", q, k, v, mask=mask, scale=scale, steps=steps, restart=restart, return_lse=return_lse
    )
    return run(q, k, v, mask=mask, scale=scale, steps=steps, restart=restart, return_lse=return_lse)
