"""The two passes of `transition_consistency`, on any kernels that do them: those of Triton and of CUDA C++.

Tensors are (B, N, d), vectors (B, N) float32; `lse2` is the logsumexp of a row of scores in units of log 2.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """What a backend computes. Positions outside `mask` are no state: their rows are never read, and written as 0."""

    def rows(self, x: Tensor) -> Tensor:
        """`x` (B, N, d) as the kernels read it, copied at most once; columns of zeros may be added."""

    def divergences(
        self, q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """kl in nats, P_ii, P'_ii, lse2 and lse2 of the target."""

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        lse2_target: Tensor,
        kl_grad: Tensor,
        trace_grad: Tensor,
        unit: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """scale dE k and scale dEᵀ q, dE_ij = unit (kl_grad_i (P_ij - P'_ij) + trace_grad_i (delta_ij - P_ij))."""


def forward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    q_target: Tensor,
    k_target: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kl, P_ii, P'_ii, lse2 and lse2 of the target."""
    q, k, q_target, k_target = map(kernels.rows, (q, k, q_target, k_target))
    return kernels.divergences(q, k, q_target, k_target, mask, scale)


def backward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    q_target: Tensor,
    k_target: Tensor,
    mask: Tensor | None,
    diagonal: Tensor,
    lse2: Tensor,
    lse2_target: Tensor,
    kl_grad: Tensor | None,
    diagonal_grad: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    key = q.shape[-1]
    q, k, q_target, k_target = map(kernels.rows, (q, k, q_target, k_target))
    g = torch.zeros_like(diagonal) if kl_grad is None else kl_grad
    s = torch.zeros_like(diagonal) if diagonal_grad is None else diagonal_grad * diagonal
    g, s, unit = _in_units(g, s)
    q_grad, k_grad = kernels.scores(
        q, k, q_target, k_target, mask, lse2.contiguous(), lse2_target.contiguous(), g, s, unit, scale
    )
    return q_grad[..., :key].contiguous(), k_grad[..., :key].contiguous()


def _in_units(g: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`g` and `s` in units of a power of two that makes the largest about 1024, and that unit.

    The gradient of a mean over positions times a probability is below the smallest float16.
    """
    if g.numel() == 0:
        return g, s, g.new_ones(1)
    largest = torch.maximum(g.abs().amax(), s.abs().amax())
    # Bounded so that the unit and its inverse are normal numbers, whatever the gradients are.
    exponent = (torch.frexp(largest).exponent - 10).clamp(-120, 120)
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    return (g / unit).contiguous(), (s / unit).contiguous(), unit.reshape(1)
