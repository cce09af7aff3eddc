"""`random_walk` against loops over positions, and its properties."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cc4s_kernels as ck
from tests.ops.tester import CountingBackend, OpTester, assert_matches, generator, randn


def draw_mask(batch, size, seed):
    """About a third masked; the second image of the batch has no valid position."""
    mask = torch.rand(batch, size, generator=generator(seed)) > 0.33
    mask[1:2] = False
    return mask


def naive_random_walk(q, k, v, *, mask=None, scale=1.0, steps=1, restart=0.0, return_lse=False):
    batch, size, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    mask = torch.ones(batch, size, dtype=torch.bool) if mask is None else mask
    y = torch.zeros_like(v)
    lse = torch.zeros(batch, size, dtype=torch.float64)
    for b in range(batch):
        valid = [i for i in range(size) if mask[b, i]]
        rows = {}
        for i in valid:
            scores = [scale * math.fsum((q[b, i] * k[b, j]).tolist()) for j in valid]
            peak = max(scores)
            weights = [math.exp(s - peak) for s in scores]
            rows[i] = [w / math.fsum(weights) for w in weights]
            lse[b, i] = peak + math.log(math.fsum(weights))
        walked = {i: v[b, i] for i in valid}
        for _ in range(steps):
            moved = {}
            for i in valid:
                mean = sum((w * walked[j] for w, j in zip(rows[i], valid, strict=True)), torch.zeros_like(v[b, i]))
                moved[i] = (1 - restart) * mean + restart * v[b, i]
            walked = moved
        for i in valid:
            y[b, i] = walked[i]
    return (y, lse) if return_lse else (y,)


class TestRandomWalk(OpTester):
    op_name = "random_walk"
    sizes = (1, 7, 33)
    backend_dtypes: ClassVar = {"cuda": (torch.float16, torch.bfloat16)}
    differentiable = (0, 1, 2)
    autocast = "cast"
    # With one position all gradients of scores are 0: a few roundings of scores and products are left.
    noise = 16 * torch.finfo(torch.float32).eps
    variants: ClassVar = {
        "plain": {},
        "lse": {"scale": 0.3, "return_lse": True},
        "steps": {"scale": -0.7, "steps": 3, "restart": 0.25, "return_lse": True},
    }

    def make_inputs(self, dtype, device, size, seed):
        q = randn(2, size, 5, dtype=dtype, device=device, seed=seed)
        k = randn(2, size, 5, dtype=dtype, device=device, seed=seed + 1)
        v = randn(2, size, 3, dtype=dtype, device=device, seed=seed + 2)
        return (q, k, v), {}

    naive = staticmethod(naive_random_walk)

    def custom_op_calls(self):
        (q, k, v), kwargs = self.make_inputs(torch.float32, "cpu", 7, 1)
        mask, options = kwargs.get("mask"), (0.5, 3, 0.25)
        saved = (t.detach() for t in torch.ops.cc4s_kernels.random_walk(q, k, v, mask, *options))
        backward = (torch.ones(2, 7, 3), None, q, k, v, *saved, mask, *options)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        return [
            (torch.ops.cc4s_kernels.random_walk.default, (*leaves, mask, *options), {}),
            (torch.ops.cc4s_kernels.random_walk_backward.default, backward, {}),
        ]


class TestMaskedRandomWalk(TestRandomWalk):
    def make_inputs(self, dtype, device, size, seed):
        args, kwargs = super().make_inputs(dtype, device, size, seed)
        return args, {**kwargs, "mask": draw_mask(2, size, seed).to(device)}


def inputs(*leading, size=9, key=4, value=3, dtype=torch.float64):
    q = randn(*leading, size, key, dtype=dtype, device="cpu", seed=1)
    k = randn(*leading, size, key, dtype=dtype, device="cpu", seed=2)
    v = randn(*leading, size, value, dtype=dtype, device="cpu", seed=3)
    return q, k, v


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (1, 2, 2)])
def test_any_leading_dimensions(leading):
    q, k, v = inputs(*leading)
    y, lse = ck.random_walk(q, k, v, return_lse=True)
    assert y.shape == v.shape
    assert lse.shape == q.shape[:-1]
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)]
    expected, expected_lse = naive_random_walk(*flat, return_lse=True)
    # float64 sums of nine terms.
    assert_matches("y", y.reshape(expected.shape), expected, atol=1e-13)
    assert_matches("lse", lse.reshape(expected_lse.shape), expected_lse, atol=1e-13)


def test_agrees_with_scaled_dot_product_attention():
    q, k, v = inputs(1, 2, size=301, key=16, value=20)
    mask = torch.rand(1, 2, 301, generator=generator(5)) > 0.2
    y = ck.random_walk(q, k, v, mask=mask, scale=0.25)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., None, :], scale=0.25)
    expected = torch.where(mask[..., None], attended, torch.zeros_like(attended))
    # float64 sums of 301 terms in another order.
    assert_matches("y", y, expected, atol=1e-13)


@given(
    size=st.integers(1, 12),
    steps=st.integers(1, 4),
    restart=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_rows_sum_to_one(size, steps, restart, scale, seed):
    q = randn(1, size, 4, dtype=torch.float64, device="cpu", seed=seed)
    k = randn(1, size, 4, dtype=torch.float64, device="cpu", seed=seed + 1)
    mask = torch.rand(1, size, generator=generator(seed)) > 0.3
    y = ck.random_walk(
        q,
        k,
        torch.ones(1, size, 1, dtype=torch.float64),
        mask=mask,
        scale=scale,
        steps=steps,
        restart=restart,
    )
    assert_matches("y", y[..., 0], mask.double(), atol=1e-13)


def test_a_certain_restart_returns_the_start():
    q, k, v = inputs(2)
    assert torch.equal(ck.random_walk(q, k, v, steps=4, restart=1.0), v)


def test_steps_compose():
    q, k, v = inputs(2)
    once = ck.random_walk(q, k, ck.random_walk(q, k, v))
    assert_matches("y", ck.random_walk(q, k, v, steps=2), once, atol=1e-13)


def test_masked_positions_change_nothing():
    q, k, v = (t.requires_grad_() for t in inputs(2))
    mask = draw_mask(2, 9, seed=4)
    y, lse = ck.random_walk(q, k, v, mask=mask, steps=2, return_lse=True)
    # Garbage in the padding, as from an uninitialised buffer.
    dirty = [t.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_() for t in (q, k, v)]
    dirty_y, dirty_lse = ck.random_walk(*dirty, mask=mask, steps=2, return_lse=True)
    assert torch.equal(y, dirty_y)
    assert torch.equal(lse, dirty_lse)
    assert bool((y[~mask] == 0).all())
    assert bool((lse[~mask] == 0).all())
    clean_grads = torch.autograd.grad(y.sum() + lse.sin().sum(), (q, k, v))
    dirty_grads = torch.autograd.grad(dirty_y.sum() + dirty_lse.sin().sum(), dirty)
    for clean, other in zip(clean_grads, dirty_grads, strict=True):
        assert torch.equal(clean, other)
        assert bool((clean[~mask] == 0).all())


def test_removing_masked_positions_is_the_same():
    q, k, v = inputs(1, size=12)
    mask = torch.rand(1, 12, generator=generator(0)) > 0.4
    y = ck.random_walk(q, k, v, mask=mask)
    kept = [t[mask][None] for t in (q, k, v)]
    assert_matches("y", y[mask][None], ck.random_walk(*kept), atol=1e-14)


def test_large_scores_stay_finite():
    q, k, v = (t.float().requires_grad_() for t in inputs(1))
    y, lse = ck.random_walk(q, k, v, scale=1e4, return_lse=True)
    grads = torch.autograd.grad(y.sum() + lse.sum(), (q, k, v))
    assert all(bool(torch.isfinite(t).all()) for t in (y, lse, *grads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float_normaliser(dtype):
    q, k, v = (t.to(dtype) for t in inputs(2))
    y, lse = ck.random_walk(q, k, v, return_lse=True)
    assert y.dtype == dtype
    assert lse.dtype == torch.float32


def test_mixed_dtypes_are_cast_under_autocast():
    q, k, v = inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ck.random_walk(q.bfloat16(), k.bfloat16(), v)
    assert torch.equal(y, ck.random_walk(q.bfloat16(), k.bfloat16(), v.bfloat16()))


Q, K, V = inputs(2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "q: got list", ([1.0], K, V), {}),
        (TypeError, "q: .*int64.*expected a floating dtype", (Q.long(), K, V), {}),
        (TypeError, "k: .*float64.*expected torch.float32 as q", (Q, K.double(), V), {}),
        (TypeError, "v: .*float16.*expected torch.float32 as q", (Q, K, V.half()), {}),
        (ValueError, r"q: got shape \(4,\)", (Q[0, 0], K, V), {}),
        (ValueError, r"k: got shape \(2, 8, 4\).*expected shape \(2, 9, 4\)", (Q, K[:, 1:], V), {}),
        (ValueError, r"v: got shape \(2, 8, 3\).*expected shape \(2, 9, 3\)", (Q, K, V[:, 1:]), {}),
        (ValueError, r"v: got shape \(9, 3\)", (Q, K, V[0]), {}),
        (ValueError, "v: .*meta.*expected device cpu", (Q, K, V.to("meta")), {}),
        (TypeError, "mask: .*float32.*expected one of torch.bool", (Q, K, V), {"mask": torch.ones(2, 9)}),
        (ValueError, r"mask: .*expected shape \(2, 9\)", (Q, K, V), {"mask": torch.ones(9).bool()}),
        (ValueError, "scale: got nan", (Q, K, V), {"scale": math.nan}),
        (TypeError, "scale: got str", (Q, K, V), {"scale": "1"}),
        (ValueError, "steps: got 0", (Q, K, V), {"steps": 0}),
        (TypeError, "steps: got float 1.5", (Q, K, V), {"steps": 1.5}),
        (ValueError, r"restart: got 1.5.*\[0.0, 1.0\]", (Q, K, V), {"restart": 1.5}),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        ck.random_walk(*args, **kwargs)


def test_empty_batch_and_empty_features():
    q, k, v = inputs(0)
    assert ck.random_walk(q, k, v, mask=torch.ones(0, 9).bool()).shape == (0, 9, 3)
    q, k, v = inputs(2, key=0)
    # Without features all scores are 0: every row is the mean.
    assert_matches("y", ck.random_walk(q, k, v), v.mean(1, keepdim=True).expand_as(v), atol=1e-14)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_changing_sizes_and_options(dynamic):
    def walk(q, k, v, scale, restart):
        return ck.random_walk(q, k, v, scale=scale, restart=restart)

    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(walk, fullgraph=True, backend=counter, dynamic=dynamic)
    for i, size in enumerate((5, 9, 12)):
        q, k, v = inputs(2, size=size)
        options = (0.5 + i / 4, i / 8)
        assert_matches("y", compiled(q, k, v, *options), walk(q, k, v, *options), atol=1e-13)
    assert counter.forward == 3
