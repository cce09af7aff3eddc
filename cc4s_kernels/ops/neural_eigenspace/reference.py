"""Definition of `neural_eigenspace`: ARPACK on the propagation of `random_walk`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs, eigsh
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._precision import accumulation_dtype
from cc4s_kernels.ops.random_walk.reference import random_walk as random_walk_reference
from cc4s_kernels.ops.transition_matrix.reference import transition_matrix

TOLERANCE = 1e-10
"""Relative accuracy asked of ARPACK; the matrix has entries in [0, 1] and the arithmetic is float64."""

# Restarts of a broken-down iteration are random; scipy before 1.17 keeps their state to itself.
_REPEATABLE = "rng" in inspect.signature(eigs).parameters


def neural_eigenspace(
    q: Tensor, k: Tensor, num: int = 8, *, scale: float = 1.0, normalize: str = "row"
) -> tuple[Tensor, Tensor]:
    """See `cc4s_kernels.neural_eigenspace`."""
    leading, size = q.shape[:-2], q.shape[-2]
    dtype = output_dtype(q.dtype, normalize)
    values = torch.empty((*leading, num), dtype=dtype)
    vectors = torch.empty((*leading, size, num), dtype=dtype)
    for index in np.ndindex(*leading):
        # float64: small eigenvalues would drown in the rounding of float32. On the CPU, where ARPACK runs and where
        # float64 has a kernel without the matrix.
        queries, keys = (t[index].detach().cpu().double() for t in (q, k))
        found = _eigenspace(queries, keys, num, scale, normalize)
        values[index], vectors[index] = (torch.from_numpy(part) for part in found)
    return values.to(q.device), vectors.to(q.device)


def output_dtype(dtype: torch.dtype, normalize: str) -> torch.dtype:
    """Real for the symmetric form, complex otherwise; double precision for float64 inputs."""
    real = accumulation_dtype(dtype)
    return real if normalize == "symmetric" else real.to_complex()


def _eigenspace(q: Tensor, k: Tensor, num: int, scale: float, normalize: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (num,) and unit eigenvectors (N, num) of one pair (N, d)."""
    size = q.shape[0]
    if size > num + 2:
        step = _propagation(q, k, scale, normalize)
        found = _iterate(step, size, num, symmetric=normalize == "symmetric")
        if found is not None:
            return found
    matrix = transition_matrix(q, k, scale=scale, normalize=normalize).cpu().numpy()
    values, vectors = np.linalg.eigh(matrix) if normalize == "symmetric" else np.linalg.eig(matrix)
    return _normal_form(values, vectors, num)


def _propagation(q: Tensor, k: Tensor, scale: float, normalize: str) -> Callable[[np.ndarray], np.ndarray]:
    """The product of the matrix with a vector (N,)."""
    if normalize == "symmetric":
        # The mean of the scores with their transpose is itself a score matrix, S = scale/2 [Q K] [K Q]ᵀ.
        q, k, scale = torch.cat([q, k], -1), torch.cat([k, q], -1), scale / 2
    v = q.new_empty(q.shape[0], 1)
    walk = backends.select("random_walk", q, k, v, scale=scale, return_lse=True)
    if walk is random_walk_reference:
        # It builds the matrix at every call: build it once.
        scores = scale * (q @ k.mT)
        lse, matrix = scores.logsumexp(-1), scores.softmax(-1)

        def apply(x: Tensor) -> Tensor:
            return matrix @ x
    else:
        lse = walk(q, k, v.zero_(), scale=scale, return_lse=True)[1]

        def apply(x: Tensor) -> Tensor:
            return walk(q, k, x, scale=scale)

    # M = exp(l/2) softmax(S) exp(-l/2); only differences of l count, and the middle keeps both factors
    # finite.
    middle = (lse.min() + lse.max()) / 2
    weight = ((lse - middle) / 2).exp()[:, None] if normalize == "symmetric" else None  # [N, 1]

    def step(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.array(vector, order="C").reshape(-1, 1)).to(q.device)  # [N, 1]
        y = apply(x) if weight is None else weight * apply(x / weight)
        return y.cpu().numpy()[:, 0]

    return step


def _iterate(
    step: Callable[[np.ndarray], np.ndarray], size: int, num: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """The leading eigenpairs by ARPACK, or None where it did not find them."""
    operator = LinearOperator((size, size), matvec=step, dtype=np.float64)
    # Not the constant vector: that is an eigenvector, and the iteration would end at once.
    start = np.random.default_rng(0).standard_normal(size)
    options = {"rng": np.random.default_rng(1)} if _REPEATABLE else {}
    # One more than asked, so that a conjugate pair at the end is whole.
    wanted = num + 1
    solver = eigsh if symmetric else eigs
    try:
        values, vectors = solver(
            operator, wanted, v0=start, ncv=min(size, max(2 * wanted + 1, 32)), tol=TOLERANCE, **options
        )
    except ArpackError:
        return None
    values, vectors = _normal_form(values, vectors, num)
    moved = np.stack([step(v.real) + 1j * step(v.imag) for v in vectors.T], axis=1)
    residual = np.abs(moved - vectors * values).max()
    # NaN (a vector of length 0) is no convergence either.
    return (values, vectors) if residual <= 100 * TOLERANCE else None


def _normal_form(values: np.ndarray, vectors: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The `num` eigenpairs of largest magnitude in a fixed order, with fixed length and phase."""
    order = np.lexsort((-values.imag, -values.real, -np.abs(values)))[:num]
    values, vectors = values[order], vectors[:, order]
    with np.errstate(invalid="ignore"):
        vectors = vectors / np.linalg.norm(vectors, axis=0)
        size = np.abs(vectors)
        largest = (size >= (1 - 1e-6) * size.max(axis=0)).argmax(axis=0)  # [num]
        pivot = vectors[largest, np.arange(vectors.shape[1])]
        return values, vectors * (pivot.conj() / np.abs(pivot))
