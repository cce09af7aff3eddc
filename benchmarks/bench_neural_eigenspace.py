"""neural_eigenspace: leading eigenpairs of a transition matrix, without the matrix and with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks import bench_random_walk
from benchmarks.harness import Case, Provider, Run

OP = "neural_eigenspace"
NUM = 8
SIZES = ({"B": 1, "N": 900, "d": 64},)


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """The least: one product with the matrix for each eigenpair, 2 N^2 (d + 1) FLOP and N^2 exp."""
    made = []
    for size in sizes:
        batch, n, d = size["B"], size["N"], size["d"]
        square = float(NUM * batch * n * n)
        traffic = 4 * batch * n * (2 * d + 2 * NUM)
        made += [Case(OP, size, dtype, "forward", 2 * square * (d + 1), square, traffic) for dtype in dtypes]
    return made


def dense(q: Tensor, k: Tensor) -> Tensor:
    """All eigenvalues of the matrix; LAPACK has no way to ask for the largest."""
    values = torch.linalg.eigvals(torch.bmm(q.double(), k.double().mT).softmax(-1))
    order = values.abs().argsort(dim=-1, descending=True)[:, :NUM]
    return values.gather(1, order).abs()


def arpack(q: Tensor, k: Tensor) -> Tensor:
    return ck.neural_eigenspace(q, k, NUM).eigenvalues.abs()


def run_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        q, k, *_ = bench_random_walk.inputs(case, device)

        def run() -> Sequence[Tensor]:
            # Magnitudes: the two of a complex pair may come in either order.
            return (function(q, k),)

        return run

    return make


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Eigenvalues of a matrix of float32 numbers, computed in float64 and rounded once.
    return [Provider("dense eig", run_of(dense), power=3), Provider("cc4s", run_of(arpack), "dense eig", 1e-5)]
