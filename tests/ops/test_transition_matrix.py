"""`transition_matrix` against NumPy, and its properties."""

import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import cc4s_kernels as ck
from tests.ops.tester import OpTester, assert_matches, randn


def naive_transition_matrix(q, k, *, scale=1.0, normalize="row"):
    q, k = q.double().numpy(), k.double().numpy()
    result = np.zeros((*q.shape[:-1], q.shape[-2]))
    for b in range(q.shape[0]):
        scores = np.array([[scale * math.fsum(x * y) for y in k[b]] for x in q[b]]).reshape(result.shape[1:])
        if normalize == "symmetric":
            scores = (scores + scores.T) / 2
        weights = np.exp(scores)
        rows, columns = weights.sum(1, keepdims=True), weights.sum(0, keepdims=True)
        if normalize == "symmetric":
            # Columns sum to what rows do.
            result[b] = weights / np.sqrt(rows * rows.T)
        else:
            result[b] = weights / (rows if normalize == "row" else columns)
    return (torch.from_numpy(result),)


class TestTransitionMatrix(OpTester):
    op_name = "transition_matrix"
    differentiable = (0, 1)
    autocast = "cast"
    variants: ClassVar = {
        "row": {},
        "column": {"normalize": "column", "scale": 0.5},
        "symmetric": {"normalize": "symmetric", "scale": -0.5},
    }

    def make_inputs(self, dtype, device, size, seed):
        q = randn(2, size, 5, dtype=dtype, device=device, seed=seed)
        k = randn(2, size, 5, dtype=dtype, device=device, seed=seed + 1)
        return (q, k), {}

    naive = staticmethod(naive_transition_matrix)

    def custom_op_calls(self):
        (q, k), _ = self.make_inputs(torch.float32, "cpu", 7, 1)
        calls = []
        for normalize in range(3):
            matrix, lse = torch.ops.cc4s_kernels.transition_matrix(q, k, 0.5, normalize)
            leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
            calls += [
                (torch.ops.cc4s_kernels.transition_matrix.default, (*leaves, 0.5, normalize), {}),
                (torch.ops.cc4s_kernels.transition_matrix_backward.default, (matrix, q, k, lse, 0.5, normalize), {}),
            ]
        return calls


def queries_and_keys(*leading, size=13):
    q = randn(*leading, size, 4, dtype=torch.float64, device="cpu", seed=1)
    k = randn(*leading, size, 4, dtype=torch.float64, device="cpu", seed=2)
    return q, k


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_rows_and_columns_sum_to_one(leading):
    q, k = queries_and_keys(*leading)
    ones = torch.ones(*leading, 13, dtype=torch.float64)
    # float64 sums of 13 terms.
    assert_matches("rows", ck.transition_matrix(q, k).sum(-1), ones, atol=1e-14)
    assert_matches("columns", ck.transition_matrix(q, k, normalize="column").sum(-2), ones, atol=1e-14)


def test_column_form_is_the_row_form_of_swapped_roles():
    q, k = queries_and_keys(2)
    expected = ck.transition_matrix(k, q).mT
    assert_matches("matrix", ck.transition_matrix(q, k, normalize="column"), expected, atol=1e-15)


def test_symmetric_form_has_the_spectrum_of_the_softmax():
    q, k = queries_and_keys(2)
    matrix = ck.transition_matrix(q, k, normalize="symmetric")
    assert torch.equal(matrix, matrix.mT)
    scores = (q @ k.mT + k @ q.mT) / 2
    eigenvalues = np.linalg.eigvals(torch.softmax(scores, -1).numpy())
    # An unsymmetric eigensolver in float64 is good to about cond * eps.
    assert np.abs(eigenvalues.imag).max() < 1e-10
    expected = torch.from_numpy(np.sort(eigenvalues.real, axis=-1))
    assert_matches("eigenvalues", torch.linalg.eigvalsh(matrix), expected, atol=1e-10)


def test_is_the_matrix_of_the_random_walk():
    q, k = queries_and_keys(2)
    v = randn(2, 13, 3, dtype=torch.float64, device="cpu", seed=3)
    walked = ck.random_walk(q, k, v, scale=0.5, steps=3)
    matrix = ck.transition_matrix(q, k, scale=0.5)
    assert_matches("y", walked, matrix @ (matrix @ (matrix @ v)), atol=1e-14)


def test_large_scores_stay_finite():
    q, k = queries_and_keys(1)
    for normalize in ("row", "column", "symmetric"):
        matrix = ck.transition_matrix(q.float(), k.float(), scale=1e4, normalize=normalize)
        assert bool(torch.isfinite(matrix).all())


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (
            ValueError,
            "normalize: got 'rows', expected one of 'row', 'column', 'symmetric'",
            {"normalize": "rows"},
        ),
        (ValueError, "scale: got inf", {"scale": math.inf}),
        (ValueError, "k: .*expected shape", {"k": torch.ones(3, 4)}),
        (TypeError, "k: got NoneType", {"k": None}),
    ],
)
def test_errors_name_the_argument(error, message, kwargs):
    arguments = {"q": torch.ones(2, 4), "k": torch.ones(2, 4), **kwargs}
    with pytest.raises(error, match=message):
        ck.transition_matrix(**arguments)


def test_empty_batch():
    for normalize in ("row", "column", "symmetric"):
        assert ck.transition_matrix(*queries_and_keys(0), normalize=normalize).shape == (0, 13, 13)
