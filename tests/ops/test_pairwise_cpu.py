"""The CPU kernels of the pairwise ops: instruction sets, threads, the published size, memory, exp."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import _library
from tests.ops.tester import OpTester, Result, generator, randn, tensors, to_dtype
from tests.peak_memory import printed_by

pytestmark = pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="no C++ extension")

# Where the machine lacks one, the next lower one runs in its place.
INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
Call = tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any], int]


def draw_call(op: str, size: int, key: int, value: int, dtype: torch.dtype, **options: Any) -> Call:
    """The op, its inputs, its options and how many of the inputs have gradients."""
    q, k, q2, k2 = (randn(2, size, key, dtype=dtype, device="cpu", seed=i, scale=key**-0.25) for i in range(4))
    if op == "random_walk":
        v = randn(2, size, value, dtype=dtype, device="cpu", seed=5)
        return ck.random_walk, (q, k, v), {"return_lse": True, **options}, 3
    if op == "transition_matrix":
        return ck.transition_matrix, (q, k), options, 2
    return ck.transition_consistency, (q, k, q2, k2), options, 2


def run(call: Call, backend: str) -> Result:
    """Outputs and gradients of a fixed combination of them."""
    function, args, kwargs, count = call
    leaves = tuple(t.detach().requires_grad_() for t in args[:count])
    with ck.use_backend(backend):
        outputs = tensors(function(*leaves, *args[count:], **kwargs))
        live = tuple(out for out in outputs if out.requires_grad)
        cotangents = tuple(torch.randn(out.shape, generator=generator(7)).to(out.dtype) for out in live)
        gradients = torch.autograd.grad(live, leaves, cotangents)
    return Result(tuple(out.detach() for out in outputs), gradients)


def assert_near_reference(call: Call) -> None:
    """The rule of the op tester: at most twice the error of the reference in the same dtype, plus eps."""
    function, args, kwargs, count = call
    got, eager = run(call, "cpu"), run(call, "reference")
    truth = run((function, to_dtype(args, torch.float64), kwargs, count), "reference")
    triples = zip(*((*r.outputs, *r.gradients) for r in (got, eager, truth)), strict=True)
    for i, (mine, theirs, expected) in enumerate(triples):
        assert mine.dtype == theirs.dtype
        OpTester().assert_error_within(f"tensor {i}", mine, theirs, expected)


def some_mask(size: int) -> Tensor:
    return torch.rand(2, size, generator=generator(3)) > 0.3


CASES = [
    ("random_walk", {}),
    ("random_walk", {"mask": some_mask(300)}),
    ("random_walk", {"steps": 2, "restart": 0.25, "scale": -0.7}),
    ("transition_matrix", {"normalize": "row"}),
    ("transition_matrix", {"normalize": "column"}),
    ("transition_matrix", {"normalize": "symmetric"}),
    ("transition_consistency", {}),
    ("transition_consistency", {"mask": some_mask(300), "normalize": "column"}),
]


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "options"), CASES, ids=[f"{op}-{'-'.join(o)}" for op, o in CASES])
def test_every_instruction_set(instructions, dtype, op, options, monkeypatch):
    # 300 positions are several tiles; 33 and 70 channels fill no panel.
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    assert_near_reference(draw_call(op, 300, 33, 70, dtype, **options))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_long_sums_on_every_instruction_set(instructions, monkeypatch):
    """512 value channels: dO V^T as one chain of products would leave dQ with more than the rule allows."""
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    assert_near_reference(draw_call("random_walk", 300, 64, 512, torch.float32))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(("op", "options"), CASES, ids=[f"{op}-{'-'.join(o)}" for op, o in CASES])
def test_float64_is_exact(instructions, op, options, monkeypatch):
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    call = draw_call(op, 300, 33, 70, torch.float64, **options)
    got, expected = run(call, "cpu"), run(call, "reference")
    for a, e in zip((*got.outputs, *got.gradients), (*expected.outputs, *expected.gradients), strict=True):
        # Sums of 300 terms in another order.
        assert float((a - e).abs().max()) <= 1e-13 * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "options"), CASES, ids=[f"{op}-{'-'.join(o)}" for op, o in CASES])
def test_threads_change_no_bit(dtype, op, options):
    call = draw_call(op, 300, 33, 70, dtype, **options)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(run(call, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        OpTester().assert_bitwise(result, results[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["random_walk", "transition_consistency"])
def test_published_size(op, dtype):
    function, args, kwargs, count = draw_call(op, 3481, 64, 512, dtype)
    assert_near_reference((function, tuple(t[:1] for t in args), kwargs, count))


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("random_walk", {"steps": 3, "restart": 0.5}),
        ("transition_matrix", {}),
        ("transition_consistency", {}),
    ],
)
def test_widest_channels_and_the_next(op, options):
    assert_near_reference(draw_call(op, 40, 256, 1024, torch.float32, **options))
    wider = draw_call(op, 4, 257, 4, torch.float32, **options)
    assert "at most 256 key channels" in ck.explain(op, *wider[1], **wider[2]).reasons["cpu"]
    with ck.use_backend("cpu"), pytest.raises(RuntimeError, match="d = 257"):
        wider[0](*wider[1], **wider[2])
    assert run(wider, "auto").outputs[0].isfinite().all()


def test_too_many_value_channels_are_refused():
    q = torch.ones(1, 3, 4)
    found = ck.explain("random_walk", q, q, torch.ones(1, 3, 1025))
    assert found.backend == "reference"
    assert "D = 1025, at most 1024 value channels" in found.reasons["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output", ["y", "lse"])
def test_gradient_of_one_output_of_the_walk(output, dtype):
    function, args, kwargs, count = draw_call("random_walk", 150, 8, 40, dtype)

    def one_output(*inputs: Tensor, **options: Any) -> Tensor:
        y, lse = function(*inputs, **options)
        # v has no part in lse.
        return y if output == "y" else lse + 0 * inputs[2].sum()

    assert_near_reference((one_output, args, kwargs, count))


@pytest.mark.parametrize("output", ["kl", "trace"])
def test_gradient_of_one_output_of_the_consistency(output):
    function, args, kwargs, count = draw_call("transition_consistency", 150, 8, 0, torch.float32)
    assert_near_reference((lambda *a, **o: getattr(function(*a, **o), output), args, kwargs, count))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_exp_is_good_to_two_ulp(instructions, monkeypatch):
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    # Every 61st float32 from the smallest normal result up to 88, and both neighbourhoods of 0.
    low = np.float32(-87.33654).view(np.int32).item() & 0x7FFFFFFF
    high = np.float32(88.0).view(np.int32).item()
    below = -np.arange(0, low, 61, dtype=np.int32).view(np.float32)
    above = np.arange(0, high, 61, dtype=np.int32).view(np.float32)
    x = np.concatenate([below, above])
    y = torch.ops.cc4s_kernels.tile_exp(torch.from_numpy(x)).numpy()
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    error = np.abs(y - exact) / ulp
    assert error.max() <= 2, f"{error.max()} ulp at {x[error.argmax()]!r}"


def test_exp_at_the_ends():
    x = torch.tensor([0.0, -0.0, -torch.inf, -88.0, -1e30, torch.nan])
    y = torch.ops.cc4s_kernels.tile_exp(x)
    assert y[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert bool(y[5].isnan())


# Prints by how much the peak of the memory exceeds what was there before a call, and its outputs, in MB.
MEMORY_SCRIPT = """
import sys, torch
import cc4s_kernels as ck
from tests.peak_memory import grown_mb
op, size, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])

def case(size):
    q, k, q2, k2 = (torch.randn(1, size, 64).mul(0.3).to(dtype).requires_grad_() for _ in range(4))
    v = torch.randn(1, size, 512).to(dtype).requires_grad_()
    def run():
        if op == "random_walk":
            y = ck.random_walk(q, k, v)
            outputs = (y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y)), torch.ones_like(y))
        else:
            found = ck.transition_consistency(q, k, q2.detach(), k2.detach())
            outputs = (*found, *torch.autograd.grad(found.kl.sum() + found.trace.sum(), (q, k)))
        sizes.append(sum(t.numel() * t.element_size() for t in outputs) / 2**20)
        return outputs
    return run

sizes = []
with ck.use_backend("cpu"):
    case(300)()
    print(grown_mb(case(size)) - sizes[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("op", "dtype", "instructions"),
    [
        ("random_walk", "float32", ""),
        ("random_walk", "bfloat16", ""),
        # Without instructions for bfloat16.
        ("random_walk", "bfloat16", "avx2"),
        ("transition_consistency", "float32", ""),
        ("transition_consistency", "bfloat16", ""),
    ],
)
def test_memory_at_a_large_size(op, dtype, instructions, monkeypatch):
    if instructions:
        monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    # A matrix of all pairs alone would be 1024 MB.
    assert float(printed_by(MEMORY_SCRIPT, op, "16384", dtype)) <= 64


def test_half_precision_runs_here_too():
    # float16 is computed in float32.
    call = draw_call("random_walk", 40, 8, 8, torch.float16)
    assert ck.explain("random_walk", *call[1]).backend == "cpu"
    assert_near_reference(call)
    assert run(call, "cpu").outputs[0].dtype == torch.float16
