"""`transition_consistency` against loops over positions, and its properties."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cc4s_kernels as ck
from tests.ops.test_random_walk import draw_mask
from tests.ops.tester import OpTester, assert_gradients_match, assert_matches, generator, randn


def naive_rows(q, k, valid, scale):
    """Probabilities of the valid rows over the valid keys."""
    rows = {}
    for i in valid:
        scores = [scale * math.fsum((q[i] * k[j]).tolist()) for j in valid]
        total = math.fsum(math.exp(s) for s in scores)
        rows[i] = [math.exp(s) / total for s in scores]
    return rows


def naive_consistency(q, k, q_target, k_target, *, mask=None, scale=1.0, normalize="row"):
    q, k, q_target, k_target = (t.double() for t in (q, k, q_target, k_target))
    if normalize == "column":
        q, k, q_target, k_target = k, q, k_target, q_target
    batch, size, _ = q.shape
    mask = torch.ones(batch, size, dtype=torch.bool) if mask is None else mask
    kl = torch.zeros(batch, size, dtype=torch.float64)
    trace, trace_target = torch.zeros(2, batch, dtype=torch.float64)
    for b in range(batch):
        valid = [i for i in range(size) if mask[b, i]]
        p = naive_rows(q[b], k[b], valid, scale)
        target = naive_rows(q_target[b], k_target[b], valid, scale)
        for i in valid:
            kl[b, i] = math.fsum(t * math.log(t / x) for x, t in zip(p[i], target[i], strict=True))
            trace[b] += p[i][valid.index(i)]
            trace_target[b] += target[i][valid.index(i)]
    return kl, trace, trace_target


class TestTransitionConsistency(OpTester):
    op_name = "transition_consistency"
    backend_dtypes: ClassVar = {"cuda": (torch.float16, torch.bfloat16)}
    differentiable = (0, 1)
    # With one position all gradients of scores are 0: a few roundings of scores and products are left.
    noise = 16 * torch.finfo(torch.float32).eps
    variants: ClassVar = {"row": {}, "column": {"normalize": "column", "scale": 0.5}}

    def make_inputs(self, dtype, device, size, seed):
        draws = [randn(2, size, 5, dtype=dtype, device=device, seed=seed + i) for i in range(4)]
        return tuple(draws), {}

    naive = staticmethod(naive_consistency)

    def custom_op_calls(self):
        args, kwargs = self.make_inputs(torch.float32, "cpu", 7, 1)
        q, k, q_target, k_target = args
        mask = kwargs.get("mask")
        saved = torch.ops.cc4s_kernels.transition_consistency(*args, mask, 0.5)[3:]
        leaves = (q.clone().requires_grad_(), k.clone().requires_grad_(), q_target, k_target)
        backward = (torch.ones(2, 7), torch.ones(2), *args, *saved, mask, 0.5)
        return [
            (torch.ops.cc4s_kernels.transition_consistency.default, (*leaves, mask, 0.5), {}),
            (torch.ops.cc4s_kernels.transition_consistency_backward.default, backward, {}),
        ]


class TestMaskedTransitionConsistency(TestTransitionConsistency):
    def make_inputs(self, dtype, device, size, seed):
        args, kwargs = super().make_inputs(dtype, device, size, seed)
        return args, {**kwargs, "mask": draw_mask(2, size, seed).to(device)}


def inputs(*leading, size=9, dtype=torch.float64):
    return tuple(randn(*leading, size, 4, dtype=dtype, device="cpu", seed=i) for i in range(4))


@pytest.mark.parametrize("normalize", ["row", "column"])
def test_gradient_formula(normalize):
    q, k, q_target, k_target = inputs(2)
    scale = 0.7
    q.requires_grad_()
    k.requires_grad_()
    found = ck.transition_consistency(q, k, q_target, k_target, scale=scale, normalize=normalize)
    g = randn(2, 9, dtype=torch.float64, device="cpu", seed=7)
    s = randn(2, dtype=torch.float64, device="cpu", seed=8)
    got = torch.autograd.grad((found.kl * g).sum() + (found.trace * s).sum(), (q, k))
    # dE_ij = g_i (P_ij - P'_ij) + s P_ii (delta_ij - P_ij), written on matrices indexed by the normalised
    # axis.
    swap = normalize == "column"
    a, b, a_target, b_target = (k, q, k_target, q_target) if swap else (q, k, q_target, k_target)
    p = torch.softmax(scale * a.detach() @ b.detach().mT, -1)
    target = torch.softmax(scale * a_target @ b_target.mT, -1)
    diagonal = p.diagonal(dim1=1, dim2=2)[..., None]
    d_scores = g[..., None] * (p - target) + s[:, None, None] * diagonal * (torch.eye(9) - p)
    d_a, d_b = scale * d_scores @ b.detach(), scale * d_scores.mT @ a.detach()
    assert_gradients_match(got, (d_b, d_a) if swap else (d_a, d_b), atol=1e-13)


def test_target_is_constant():
    q, k, q_target, k_target = (t.requires_grad_() for t in inputs(2))
    found = ck.transition_consistency(q, k, q_target, k_target)
    assert not found.trace_target.requires_grad
    grads = torch.autograd.grad(found.kl.sum() + found.trace.sum(), (q_target, k_target), allow_unused=True)
    assert grads == (None, None)


def test_equal_matrices_have_no_distance():
    q, k, _, _ = inputs(2, dtype=torch.float32)
    found = ck.transition_consistency(q, k, q.clone(), k.clone())
    assert bool((found.kl == 0).all())
    assert torch.equal(found.trace, found.trace_target)


@given(
    size=st.integers(1, 12),
    scale=st.floats(-4, 4, width=32),
    seed=st.integers(0, 99),
    near=st.floats(0, 1e-3),
    normalize=st.sampled_from(["row", "column"]),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_divergence_is_not_negative(size, scale, seed, near, normalize):
    q = randn(1, size, 6, dtype=torch.float32, device="cpu", seed=seed)
    k = randn(1, size, 6, dtype=torch.float32, device="cpu", seed=seed + 1)
    mask = torch.rand(1, size, generator=generator(seed)) > 0.3
    found = ck.transition_consistency(q, k, q + near, k - near, mask=mask, scale=scale, normalize=normalize)
    largest = float((scale * (q.abs() + near) @ (k.abs() + near).mT).abs().max())
    # Log-probabilities carry a few roundings of the largest score.
    bound = 8 * torch.finfo(torch.float32).eps * max(1.0, largest)
    assert float(found.kl.min()) >= -bound
    assert bool((found.kl[~mask] == 0).all())
    assert 0 <= float(found.trace) <= float(mask.sum()) * (1 + 1e-6)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_leading_dimensions(leading):
    args = inputs(*leading)
    found = ck.transition_consistency(*args)
    assert found.kl.shape == (*leading, 9)
    assert found.trace.shape == found.trace_target.shape == leading
    expected = naive_consistency(*(t.reshape(-1, 9, 4) for t in args))
    for name, a, e in zip(found._fields, found, expected, strict=True):
        assert_matches(name, a.reshape(e.shape), e, atol=1e-13)


def test_masked_positions_change_nothing():
    args = inputs(2)
    mask = draw_mask(2, 9, seed=4)
    clean = [t.clone().requires_grad_() for t in args]
    dirty = [t.masked_fill(~mask[..., None], torch.nan).requires_grad_() for t in args]
    results, gradients = [], []
    for tensors in (clean, dirty):
        found = ck.transition_consistency(*tensors, mask=mask)
        results.append(found)
        gradients.append(torch.autograd.grad(found.kl.sum() + found.trace.sum(), tensors[:2]))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)
        assert bool((a[~mask] == 0).all())


def test_disjoint_rows_are_finite():
    # P' sits on one key where log P is about -4000.
    q = torch.tensor([[[60.0], [-60.0]]], requires_grad=True)
    k = torch.tensor([[[-60.0], [60.0]]])
    found = ck.transition_consistency(q, k, q.detach(), -k)
    (gradient,) = torch.autograd.grad(found.kl.sum(), q)
    assert_matches("kl", found.kl.detach(), torch.full((1, 2), 7200.0), atol=0.01)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (
            ValueError,
            "normalize: got 'symmetric', expected one of 'row', 'column'",
            {"normalize": "symmetric"},
        ),
        (ValueError, "scale: got -inf", {"scale": -math.inf}),
        (ValueError, r"k: .*expected shape \(2, 5, 4\) \(that of q\)", {"k": torch.ones(2, 6, 4)}),
        (ValueError, "k_target: .*that of q_target", {"k_target": torch.ones(2, 6, 4)}),
        (
            ValueError,
            "q_target: .*that of q",
            {"q_target": torch.ones(2, 6, 4), "k_target": torch.ones(2, 6, 4)},
        ),
        (
            TypeError,
            "q_target: .*float16",
            {"q_target": torch.ones(2, 5, 4).half(), "k_target": torch.ones(2, 5, 4).half()},
        ),
        (TypeError, "mask: .*torch.bool", {"mask": torch.ones(2, 5).int()}),
        (
            ValueError,
            "q_target: got device meta",
            {"q_target": torch.ones(2, 5, 4, device="meta"), "k_target": torch.ones(2, 5, 4, device="meta")},
        ),
    ],
)
def test_errors_name_the_argument(error, message, kwargs):
    arguments = {name: torch.ones(2, 5, 4) for name in ("q", "k", "q_target", "k_target")}
    with pytest.raises(error, match=message):
        ck.transition_consistency(**{**arguments, **kwargs})


def test_empty_batch():
    found = ck.transition_consistency(*inputs(0))
    assert found.kl.shape == (0, 9)
    assert found.trace.shape == found.trace_target.shape == (0,)
