"""What the Triton backends of the pairwise ops share, and sizes that the battery of each op leaves out."""

import subprocess
import sys
from itertools import product

import pytest
import torch

import cc4s_kernels as ck
from cc4s_kernels import _triton, backends
from cc4s_kernels._triton import configs
from tests.ops.tester import assert_gradients_match, assert_matches, eps, generator, randn

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.triton_interpreter),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
compiled_only = pytest.mark.skipif(_triton.INTERPRETED, reason="interpreted kernels take CPU tensors")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "key", "value"), [(torch.float32, 20, 70), (torch.float16, 40, 33)])
def test_wide_values(device, dtype, key, value):
    """Several column splits, several chunks of the product in the backward, ragged in every direction."""
    size, leading = 40, (1, 2)
    q, k = (randn(*leading, size, key, dtype=dtype, device=device, seed=i, scale=key**-0.5) for i in range(2))
    v = randn(*leading, size, value, dtype=dtype, device=device, seed=2)
    mask = (torch.rand(*leading, size, generator=generator(3)) > 0.3).to(device)
    cotangent = randn(*leading, size, value, dtype=dtype, device=device, seed=4)
    found = {}
    for backend in ("reference", "triton"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with ck.use_backend(backend):
            y, lse = ck.random_walk(*leaves, mask=mask, steps=2, restart=0.25, return_lse=True)
            gradients = torch.autograd.grad((y, lse), leaves, (cotangent, torch.ones_like(lse)))
        found[backend] = (y.detach(), lse.detach(), gradients)
    # Sums of 40 terms, and one rounding of each state.
    tolerance = 8 * eps(dtype)
    assert_matches("y", found["triton"][0], found["reference"][0], atol=0, rtol=tolerance)
    assert_matches("lse", found["triton"][1], found["reference"][1], atol=0, rtol=16 * eps(torch.float32))
    assert_gradients_match(found["triton"][2], found["reference"][2], atol=0, rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_no_features(device):
    q, v = torch.zeros(2, 5, 0, device=device), randn(2, 5, 3, dtype=torch.float32, device=device, seed=1)
    with ck.use_backend("triton"):
        y = ck.random_walk(q, q, v)
        assert ck.random_walk(v, v, q).shape == (2, 5, 0)
    assert_matches("y", y, v.mean(1, keepdim=True).expand_as(v), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_small_gradients_survive_float16(device):
    """The gradient of a mean over rows times a probability is below the smallest float16. Keys in two chunks."""
    size = 33
    tensors = [randn(1, size, 40, dtype=torch.float16, device=device, seed=i) for i in range(4)]
    found = []
    for backend in ("reference", "triton"):
        q = (tensors[0].float() * 256).half().requires_grad_()
        with ck.use_backend(backend):
            kl = ck.transition_consistency(q, tensors[1], *tensors[2:], scale=1 / 1024).kl
            (gradient,) = torch.autograd.grad(kl.mean() * 2.0**-4, q, retain_graph=True)
            (large,) = torch.autograd.grad(kl.mean() * 2.0**8, q)
        found.append((gradient, large))
    assert_matches("large", found[1][1], found[0][1], atol=0, rtol=8 * eps(torch.float16))
    # The result itself is subnormal in float16: absolute steps of 2^-24.
    assert_matches("small", found[1][0], found[0][0], atol=2 * 2.0**-24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_quadratic_memory():
    size, dtype = 16384, torch.bfloat16
    q, k, q_target, k_target = (randn(1, size, 64, dtype=dtype, device="cuda", seed=i) for i in range(4))
    v = randn(1, size, 512, dtype=dtype, device="cuda", seed=5)
    for t in (q, k, v):
        t.requires_grad_()
    for run in (
        lambda: ck.random_walk(q, k, v, return_lse=True)[1].sum() + ck.random_walk(q, k, v).sum(),
        lambda: ck.transition_consistency(q, k, q_target, k_target).kl.sum(),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with ck.use_backend("triton"):
            torch.autograd.grad(run(), (q, k))
        # Outputs and gradients of V (16 MiB each, two walks), and 64 MiB.
        assert torch.cuda.max_memory_allocated() - before <= (4 * 16 + 64) * 2**20


def test_every_size_has_a_configuration():
    kinds = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
    targets = (*configs.ALL, "interpreter")
    for kernel, target, (dtype, precision), key, value in product(
        configs.TABLE, targets, kinds, (0, 1, 64, 65, 128, 256), (0, 1, 512, 1024)
    ):
        config = configs.choose(kernel, target, dtype, precision, key, value)
        # The diagonal is found in whole tiles.
        assert kernel != "consistency" or config.m % config.n == 0


def test_rows_are_copied_only_where_columns_are_apart():
    from cc4s_kernels._triton.launch import rows

    x = torch.zeros(2, 5, 8)
    channels_last = torch.zeros(2, 8, 5).mT
    for kept in (x, x[:, :, 2:6], x.transpose(0, 1), x[:1].expand(3, 5, 8)):
        assert rows(kept) is kept
    for copied in (channels_last, torch.zeros(1).as_strided((1, 1, 1), (1, 2**30, 1)).expand(1, 5, 1)[:, :1]):
        assert rows(copied).is_contiguous()


def test_products_follow_torch_in_float32():
    from cc4s_kernels._triton.launch import precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision(torch.float32) == "tf32"
        assert precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@compiled_only
@pytest.mark.parametrize("op", ["random_walk", "transition_matrix", "transition_consistency"])
def test_refusals_say_why(op, monkeypatch, capsys):
    monkeypatch.setattr(_triton, "missing", lambda: None)
    arity = {"random_walk": 3, "transition_matrix": 2, "transition_consistency": 4}[op]
    for tensor, message in (
        (torch.zeros(2, 3), "q is on cpu"),
        (torch.zeros(2, 3, dtype=torch.float64), "q is torch.float64, Triton kernels take float32"),
        (torch.zeros(2, 300), "d = 300"),
    ):
        assert ck.explain(op, *[tensor] * arity).reasons["triton"].startswith(message)
    capsys.readouterr()


def test_a_cuda_tensor_is_taken(monkeypatch):
    """Without a GPU: what the choice asks of a tensor, asked of a stand-in."""

    class OnGpu:
        dtype, device, shape = torch.bfloat16, torch.device("cuda", 0), (2, 9, 4)

    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "missing", lambda: None)
    for capability, expected in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), None)):
        monkeypatch.setattr(_triton, "_capability", lambda index, found=capability: found)
        explanation = backends._explain("random_walk", (OnGpu(), OnGpu(), OnGpu()), {})
        assert (explanation.backend == "triton") == (expected == "triton")
        if expected is None:
            assert "compute capability 7.5, Triton kernels need 8.0" in explanation.reasons["triton"]


def test_import_without_triton():
    """Nothing of Triton is loaded at import, and without it the reason is given."""
    code = """
import sys
sys.modules["triton"] = None
import torch, cc4s_kernels as ck
assert ck.backends.missing("triton") == "triton is not installed"
q = torch.ones(3, 2)
assert ck.explain("random_walk", q, q, q).reasons["triton"] == "triton is not installed"
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
