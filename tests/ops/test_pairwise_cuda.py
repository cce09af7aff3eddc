"""The CUDA kernels of the pairwise ops on a GPU, at sizes with several tiles, splits and panels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from tests.ops.tester import assert_matches, eps, generator, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in backends.available("random_walk"), reason="no CUDA device or extension"),
]
DTYPES = [torch.bfloat16, torch.float16]


def mask_of(n: int) -> Tensor:
    return (torch.rand(2, n, generator=generator(n)) > 0.3).cuda()


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((out * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)).sum() for out in outputs)
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "key", "value"), [(3481, 64, 512), (1000, 128, 1024), (777, 40, 72)])
def test_random_walk(n: int, key: int, value: int, masked: bool, dtype: torch.dtype) -> None:
    sizes, scale = (key, key, value), 0.5 * key**-0.5
    q, k, v = (randn(2, n, size, dtype=dtype, device="cuda", seed=i) for i, size in enumerate(sizes))
    mask = mask_of(n) if masked else None
    found = []
    for backend, kind in (("cuda", dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        with ck.use_backend(backend):
            outputs = ck.random_walk(*leaves, mask=mask, scale=scale, return_lse=True)
            found.append((*outputs, *gradients(outputs, leaves)))
    for name, a, b in zip(("y", "lse", "q_grad", "k_grad", "v_grad"), *found, strict=True):
        # Rounded probabilities and outputs; sums of thousands of them average out.
        assert_matches(name, a, b, atol=0.0, rtol=4 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "key"), [(3481, 64), (1000, 128), (777, 40)])
def test_transition_consistency(n: int, key: int, masked: bool, dtype: torch.dtype) -> None:
    sides = [randn(2, n, key, dtype=dtype, device="cuda", seed=i) for i in range(4)]
    mask = mask_of(n) if masked else None
    found = []
    for backend, kind in (("cuda", dtype), ("reference", torch.float64)):
        q, k, *target = (x.to(kind) for x in sides)
        leaves = [x.requires_grad_() for x in (q, k)]
        with ck.use_backend(backend):
            outputs = ck.transition_consistency(*leaves, *target, mask=mask, scale=0.5 * key**-0.5)
            found.append((*outputs, *gradients(outputs[:2], leaves)))
    for name, a, b in zip(("kl", "trace", "trace_target", "q_grad", "k_grad"), *found, strict=True):
        # Only gradients of scores are rounded; the exponentials have 2^-22.
        assert_matches(name, a, b, atol=0.0, rtol=4 * eps(dtype) if "grad" in name else 64 * eps(torch.float32))


def test_addresses_beyond_32_bits() -> None:
    """Rows that are 2^24 values apart: the last one starts at 3.2 10^9."""
    n, apart = 200, 2**24
    far = torch.empty((n - 1) * apart + 64, dtype=torch.bfloat16, device="cuda").as_strided((1, n, 64), (0, apart, 1))
    q, k, v = (randn(1, n, 64, dtype=torch.bfloat16, device="cuda", seed=i) for i in range(3))
    far.copy_(v)
    with ck.use_backend("cuda"):
        assert torch.equal(ck.random_walk(q, k, far, scale=0.1), ck.random_walk(q, k, v, scale=0.1))
