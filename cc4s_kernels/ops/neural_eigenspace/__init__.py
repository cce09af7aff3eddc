"""Leading eigenvectors of the transition matrix: what the random walk sees as one region."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_choice, check_number, may_read_values
from cc4s_kernels.ops.neural_eigenspace import library as library
from cc4s_kernels.ops.random_walk.checks import check_queries_and_keys

__all__ = ["NeuralEigenspace", "neural_eigenspace"]


class NeuralEigenspace(NamedTuple):
    """What `neural_eigenspace` returns.

    eigenvalues: (..., num) by magnitude, largest first. eigenvectors: (..., N, num), unit columns.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor


def neural_eigenspace(
    q: Tensor, k: Tensor, num: int = 8, *, scale: float = 1.0, normalize: str = "row"
) -> NeuralEigenspace:
    """Finds the eigenvalues of largest magnitude of the transition matrix, and their right eigenvectors.

    An Arnoldi (Lanczos) iteration in float64 that sees the matrix only through `random_walk`, whichever
    backend runs that; the dense solver where N <= num + 2 or where the iteration does not converge. For
    looking at, not for training: the outputs have no gradient.

    Equal calls give equal results: a fixed start vector; equal magnitudes in the order of falling real, then
    falling imaginary part; every eigenvector has length 1, and its largest entry (the first one within 1e-6
    of the largest magnitude) is real and positive.

    Args:
        q: (..., N, d) floating; the leading dimensions may be any number.
        k: (..., N, d), same shape and dtype.
        num: number of eigenvalues, 1 to N.
        scale: factor of the scores.
        normalize: "row": P = softmax over keys, not symmetric, so the results are complex. "symmetric": the
            symmetric form of `transition_matrix`; the results are real.

    Returns:
        Named tuple `eigenvalues` (..., num), `eigenvectors` (..., N, num): complex64 ("symmetric": float32),
        or complex128 (float64) for float64 inputs; also under autocast.

    Raises:
        TypeError: not a tensor, no floating dtype, different dtypes, an option of a wrong type.
        ValueError: shapes or devices that do not fit, num > N, an unknown normalisation, a scale that is not
            finite.

    Source: docs/method.md section 5.
    """
    check_queries_and_keys(q, k)
    check_number("num", num, low=1, integer=True)
    if num > q.shape[-2]:
        raise ValueError(f"num: got {num}, expected at most N = {q.shape[-2]}")
    check_number("scale", scale)
    check_choice("normalize", normalize, ("row", "symmetric"))
    q, k = q.detach(), k.detach()
    for name, value in (("q", q), ("k", k)):
        if may_read_values(value) and not value.isfinite().all():
            raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")
    run = backends.select("neural_eigenspace", q, k, num, scale=scale, normalize=normalize)
    return NeuralEigenspace(*run(q, k, num, scale=scale, normalize=normalize))
