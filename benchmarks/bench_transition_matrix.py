"""transition_matrix: softmax(Q K^T) written to memory once, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks import bench_random_walk
from benchmarks.harness import Case, Provider, Run, compiled

OP = "transition_matrix"
# The published size.
SIZES = ({"B": 1, "N": 3481, "d": 64},)


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[Case]:
    """Forward: 2 N^2 d FLOP, N^2 exp, the matrix written. Backward: dE from the matrix and its gradient, read once
    each, dQ and dK: 4 N^2 d FLOP."""
    made = []
    for size in sizes:
        batch, n, d = size["B"], size["N"], size["d"]
        for dtype in dtypes:
            width = getattr(torch, dtype).itemsize
            square, rows = float(batch * n * n), 2 * batch * n * d * width
            forward = Case(OP, size, dtype, "forward", 2 * square * d, square, square * width + rows)
            both = Case(OP, size, dtype, "forward+backward", 6 * square * d, square, 3 * square * width + 2 * rows)
            made += [forward, both]
    return made


def eager(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q, k.mT).softmax(-1)


def run_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        q, k, *_ = bench_random_walk.inputs(case, device)
        if case.pass_ == "forward":
            return torch.no_grad()(lambda: (function(q, k),))
        leaves = [x.requires_grad_() for x in (q, k)]
        n = case.size["N"]
        gradient = torch.randn(case.size["B"], n, n, generator=torch.Generator().manual_seed(1))
        gradient = gradient.to(device, case.torch_dtype)

        def run() -> Sequence[Tensor]:
            matrix = function(*leaves)
            return (matrix, *torch.autograd.grad(matrix, leaves, gradient))

        return run

    return make


def on_backend(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.transition_matrix(q, k)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Rounded scores of a few units in bfloat16: their exponentials are off by some percent.
    tolerance = 1e-4 if case.dtype == "float32" else 5e-2
    made = [Provider("eager", run_of(eager))]
    made.append(Provider("compiled eager", run_of(compiled(eager)), "eager", tolerance))
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(on_backend(name)), "eager", tolerance))
    return made
