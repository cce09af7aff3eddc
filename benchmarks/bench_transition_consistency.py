"""transition_consistency: the distance between two transition matrices, as the training step needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "transition_consistency"
# Square grids, as a flip needs them: 59^2 is the published size.
SIZES = ({"B": 1, "N": 3481, "d": 64}, {"B": 1, "N": 16384, "d": 64})
# A batch of training; matrices of one large image, as several of them would fill the memory.
GPU_SIZES = ({"B": 12, "N": 3481, "d": 64}, {"B": 1, "N": 16384, "d": 64})


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[Case]:
    """Forward: scores of both, 4 N^2 d FLOP and 2 N^2 exp. Backward: both again, dQ and dK: 8 N^2 d and 2 N^2 exp."""
    made = []
    for size in sizes:
        batch, n, d = size["B"], size["N"], size["d"]
        for dtype in dtypes:
            traffic = 4 * batch * n * d * getattr(torch, dtype).itemsize
            square = float(batch * n * n)
            made.append(Case(OP, size, dtype, "forward", 4 * square * d, 2 * square, traffic))
            made.append(Case(OP, size, dtype, "forward+backward", 12 * square * d, 4 * square, 1.5 * traffic))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and the target's q, k of the mirrored image: the same up to noise, as in training."""
    generator = torch.Generator().manual_seed(0)
    batch, n, d = case.size["B"], case.size["N"], case.size["d"]
    scale = (2 / d**0.5) ** 0.5
    made = []
    for _ in range(2):
        x = torch.randn(batch, n, d, generator=generator) * scale
        made += [x, _flip(x) + 0.1 * torch.randn(batch, n, d, generator=generator)]
    q, q_target, k, k_target = (x.to(device, case.torch_dtype) for x in made)
    return q, k, q_target, k_target


def _flip(x: Tensor) -> Tensor:
    """(B, side * side, d) of the mirrored image."""
    side = round(x.shape[1] ** 0.5)
    return x.unflatten(1, (side, side)).flip(2).flatten(1, 2)


def released(q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor) -> Tensor:
    """What the authors' code computes: scores flipped by two products with a dense permutation, columns normalised."""
    side = round(q.shape[1] ** 0.5)
    order = torch.arange(side * side, device=q.device).view(side, side).flip(1).flatten()
    permutation = torch.eye(side * side, device=q.device, dtype=q.dtype)[order].expand(len(q), -1, -1)
    scores, target = torch.bmm(q, k.mT), torch.bmm(q_target, k_target.mT)
    target = torch.bmm(torch.bmm(permutation, target), permutation)
    p, p_target = scores.softmax(1), target.softmax(1)
    # The mean over all N^2 elements, as nn.KLDivLoss() has it.
    kl = F.kl_div(scores.log_softmax(1), p_target, reduction="none").mean()
    trace = F.l1_loss(p.diagonal(dim1=-2, dim2=-1).sum(-1), p_target.diagonal(dim1=-2, dim2=-1).sum(-1))
    return kl + 1e-2 * trace


def eager(q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor) -> Tensor:
    """The clean loss with the flip as an index, matrices in memory."""
    log_p = torch.bmm(q, k.mT).float().log_softmax(-1)
    log_target = torch.bmm(_flip(q_target), _flip(k_target).mT).float().log_softmax(-1)
    target = log_target.exp()
    kl = (target * (log_target - log_p)).sum(-1).mean()
    trace = log_p.diagonal(dim1=-2, dim2=-1).exp().sum(-1) - target.diagonal(dim1=-2, dim2=-1).sum(-1)
    return kl + trace.abs().mean() / q.shape[1]


def run_of(function: Callable[..., Tensor]) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        q, k, *target = inputs(case, device)
        if case.pass_ == "forward":
            return torch.no_grad()(lambda: (function(q, k, *target),))
        leaves = [x.requires_grad_() for x in (q, k)]

        def run() -> Sequence[Tensor]:
            loss = function(*leaves, *target)
            return (loss, *torch.autograd.grad(loss, leaves))

        return run

    return make


def ours(backend: str, preset: str) -> Callable[..., Tensor]:
    loss = ck.nn.EigenspaceConsistencyLoss(preset=preset)

    def run(q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor) -> Tensor:
        side = round(q.shape[1] ** 0.5)
        with ck.use_backend(backend):
            return loss(q, k, q_target, k_target, transform=ck.nn.Flip(side, side))

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Float32: differences of near-equal matrices lose three digits. Half precision: scores of rounded products.
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    made = [Provider("eager, index flip", run_of(eager)), Provider("released, dense flip", run_of(released), power=3)]
    made.append(Provider("compiled eager", run_of(compiled(eager)), "eager, index flip", tolerance))
    for name in ck.backends.available(OP):
        if name == "reference":
            continue
        made.append(Provider(f"cc4s {name}", run_of(ours(name, "clean")), "eager, index flip", tolerance))
        if case.dtype == "float32":
            made.append(
                Provider(
                    f"cc4s {name}, released preset",
                    run_of(ours(name, "released")),
                    "released, dense flip",
                    tolerance,
                )
            )
    return made
