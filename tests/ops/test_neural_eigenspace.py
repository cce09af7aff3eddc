"""`neural_eigenspace` against the dense eigensolver of NumPy, and by residuals."""

import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import cc4s_kernels as ck
from cc4s_kernels.ops.neural_eigenspace import reference
from tests.ops.tester import OpTester, assert_matches, randn


def dense_matrix(q, k, scale, normalize):
    scores = scale * (q.double() @ k.double().mT).numpy()
    if normalize == "symmetric":
        scores = (scores + np.swapaxes(scores, -1, -2)) / 2
    weights = np.exp(scores - scores.max(axis=(-1, -2), keepdims=True))
    rows = weights.sum(-1, keepdims=True)
    if normalize == "symmetric":
        return weights / np.sqrt(rows * np.swapaxes(rows, -1, -2))
    return weights / rows


def naive_eigenspace(q, k, num=8, *, scale=1.0, normalize="row"):
    matrix = dense_matrix(q, k, scale, normalize)
    values = np.zeros((len(q), num), dtype=complex)
    vectors = np.zeros((*q.shape[:2], num), dtype=complex)
    for b in range(len(q)):
        found, columns = np.linalg.eig(matrix[b])
        order = sorted(range(len(found)), key=lambda i: (-abs(found[i]), -found[i].real, -found[i].imag))
        for n, i in enumerate(order[:num]):
            values[b, n] = found[i]
            column = columns[:, i] / np.sqrt((np.abs(columns[:, i]) ** 2).sum())
            sizes = np.abs(column)
            pivot = next(x for x in column if abs(x) >= sizes.max() * (1 - 1e-6))
            vectors[b, :, n] = column * abs(pivot) / pivot
    if normalize == "symmetric":
        values, vectors = values.real, vectors.real
    return torch.from_numpy(values), torch.from_numpy(vectors)


class TestNeuralEigenspace(OpTester):
    op_name = "neural_eigenspace"
    # Dense up to num + 2 = 6, iterated above.
    sizes = (4, 6, 7, 33)
    zero_length = False
    # Two solvers; an eigenvector is as good as 1e-10 over the distance to the next eigenvalue.
    value_tolerance = 1e-7
    variants: ClassVar = {"row": {"scale": 0.5}, "symmetric": {"scale": 0.5, "normalize": "symmetric"}}

    def make_inputs(self, dtype, device, size, seed):
        q = randn(2, size, 6, dtype=dtype, device=device, seed=seed)
        k = randn(2, size, 6, dtype=dtype, device=device, seed=seed + 1)
        return (q, k, 4), {}

    naive = staticmethod(naive_eigenspace)

    def custom_op_calls(self):
        q = randn(2, 9, 4, dtype=torch.float32, device="cpu", seed=0)
        op = torch.ops.cc4s_kernels.neural_eigenspace.default
        return [(op, (q, q + 1, 3, 1.0, normalize), {}) for normalize in ("row", "symmetric")]


def residual(matrix, found):
    return float(
        (
            matrix.to(found.eigenvectors.dtype) @ found.eigenvectors
            - found.eigenvectors * found.eigenvalues[..., None, :]
        )
        .abs()
        .max()
    )


@pytest.mark.parametrize("normalize", ["row", "symmetric"])
@pytest.mark.parametrize(("size", "num"), [(1, 1), (7, 7), (10, 8), (11, 8), (33, 8), (401, 5)])
def test_residual_and_order(size, num, normalize):
    q = randn(size, 8, dtype=torch.float64, device="cpu", seed=size)
    k = 0.5 * q + randn(size, 8, dtype=torch.float64, device="cpu", seed=size + 1)
    found = ck.neural_eigenspace(q, k, num, scale=0.4, normalize=normalize)
    matrix = ck.transition_matrix(q, k, scale=0.4, normalize=normalize)
    assert found.eigenvalues.shape == (num,)
    assert found.eigenvectors.shape == (size, num)
    assert residual(matrix, found) < 1e-8
    sizes = found.eigenvalues.abs()
    assert bool((sizes[1:] <= sizes[:-1] + 1e-12).all())
    assert_matches("length", found.eigenvectors.norm(dim=0), torch.ones(num, dtype=torch.float64), atol=1e-12)
    every = np.sort(np.abs(np.linalg.eigvals(matrix.numpy())))[::-1][:num]
    # None is left out.
    assert_matches("magnitudes", sizes, torch.from_numpy(every.copy()), atol=1e-8)


def test_first_eigenvector_of_the_walk_is_constant():
    q, k = (randn(2, 3, 40, 5, dtype=torch.float32, device="cpu", seed=s) for s in (1, 2))
    found = ck.neural_eigenspace(q, k, 3)
    assert found.eigenvalues.dtype == found.eigenvectors.dtype == torch.complex64
    assert found.eigenvalues.shape == (2, 3, 3)
    # Solved to 1e-10 in float64, then rounded to float32.
    assert_matches("eigenvalue", found.eigenvalues[..., 0], torch.ones(2, 3), atol=1e-6)
    expected = torch.full((2, 3, 40), 40**-0.5)
    assert_matches("eigenvector", found.eigenvectors[..., 0], expected, atol=1e-6)


def test_conjugate_pairs_stand_together():
    # A rotation of three states has the eigenvalues 1 and a conjugate pair, many times over.
    corners = torch.eye(3, dtype=torch.float64).repeat(5, 1)
    q, k = 3 * corners, torch.roll(corners, 1, dims=-1)
    found = ck.neural_eigenspace(q, k, 3)
    assert found.eigenvalues[1].imag > 0.1
    assert_matches("pair", found.eigenvalues[2], found.eigenvalues[1].conj(), atol=1e-10)


@pytest.mark.parametrize("normalize", ["row", "symmetric"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_uniform_walk(normalize, value):
    # P = 1/N has rank 1: the iteration ends after one step and has to start again.
    q = torch.full((60, 4), value)
    found = ck.neural_eigenspace(q, q, 6, normalize=normalize)
    expected = torch.zeros(6)
    expected[0] = 1
    assert_matches("eigenvalues", found.eigenvalues, expected, atol=1e-9)
    matrix = torch.full((60, 60), 1 / 60)
    assert residual(matrix, found) < 1e-6
    assert torch.equal(found.eigenvectors, ck.neural_eigenspace(q, q, 6, normalize=normalize).eigenvectors)


def test_walk_that_never_moves():
    # P is the identity within rounding: 50 equal eigenvalues.
    q = 10 * torch.eye(50)
    found = ck.neural_eigenspace(q, q, 5, normalize="symmetric")
    assert_matches("eigenvalues", found.eigenvalues, torch.ones(5), atol=1e-6)
    assert residual(torch.eye(50), found) < 1e-6


def test_symmetric_form_with_large_scores():
    q = randn(30, 4, dtype=torch.float32, device="cpu", seed=1)
    k = randn(30, 4, dtype=torch.float32, device="cpu", seed=2)
    found = ck.neural_eigenspace(q, k, 3, scale=50.0, normalize="symmetric")
    matrix = ck.transition_matrix(q.double(), k.double(), scale=50.0, normalize="symmetric")
    assert residual(matrix.float(), found) < 1e-5


def test_goes_through_another_propagation_kernel(monkeypatch):
    """A kernel of `random_walk` serves the iteration, which then never builds a matrix."""
    q = randn(50, 4, dtype=torch.float64, device="cpu", seed=1)
    k = randn(50, 4, dtype=torch.float64, device="cpu", seed=2)
    expected = {n: ck.neural_eigenspace(q, k, 4, normalize=n) for n in ("row", "symmetric")}
    calls = []

    def kernel(q, k, v, *, mask=None, scale=1.0, steps=1, restart=0.0, return_lse=False):
        calls.append(tuple(v.shape))
        scores = scale * q @ k.mT
        y = scores.softmax(-1) @ v
        return (y, scores.logsumexp(-1)) if return_lse else y

    monkeypatch.setattr(reference.backends, "select", lambda *args, **kwargs: kernel)
    monkeypatch.setattr(reference, "transition_matrix", None)
    for normalize, e in expected.items():
        values, vectors = reference.neural_eigenspace(q, k, 4, normalize=normalize)
        assert_matches("eigenvalues", values, e.eigenvalues, atol=1e-9)
        assert_matches("eigenvectors", vectors, e.eigenvectors, atol=1e-7)
    assert len(calls) > 10
    assert set(calls) == {(50, 1)}


def test_dense_solver_when_the_iteration_fails(monkeypatch):
    q = randn(20, 4, dtype=torch.float64, device="cpu", seed=1)
    expected = ck.neural_eigenspace(q, q + 0.1, 4)
    monkeypatch.setattr(reference, "_iterate", lambda *args, **kwargs: None)
    found = ck.neural_eigenspace(q, q + 0.1, 4)
    assert_matches("eigenvalues", found.eigenvalues, expected.eigenvalues, atol=1e-9)
    assert_matches("eigenvectors", found.eigenvectors, expected.eigenvectors, atol=1e-7)


def test_no_gradient_and_no_images():
    q = torch.ones(2, 5, 3, requires_grad=True)
    assert not any(t.requires_grad for t in ck.neural_eigenspace(q, q, 2))
    found = ck.neural_eigenspace(torch.ones(0, 5, 3), torch.ones(0, 5, 3), 2)
    assert found.eigenvalues.shape == (0, 2)
    assert found.eigenvectors.shape == (0, 5, 2)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (ValueError, "num: got 6, expected at most N = 5", (6,), {}),
        (ValueError, "num: got 0", (0,), {}),
        (TypeError, "num: got float 2.0", (2.0,), {}),
        (ValueError, "normalize: got 'column'", (2,), {"normalize": "column"}),
        (ValueError, "scale: got nan", (2,), {"scale": math.nan}),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    q = torch.ones(5, 3)
    with pytest.raises(error, match=message):
        ck.neural_eigenspace(q, q, *args, **kwargs)
