"""The steps of `random_walk` and of its gradient, on any kernels that do one of them: those of Triton and of CUDA C++.

Tensors are (B, N, width); `lse2` is the logsumexp of a row of scores in units of log 2.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """What a backend computes. Positions outside `mask` are no state: their rows are never read, and written as 0."""

    def rows(self, x: Tensor) -> Tensor:
        """`x` (B, N, width) as the kernels read it, copied at most once; columns of zeros may be added."""

    def step(
        self,
        q: Tensor,
        k: Tensor,
        x: Tensor,
        start: Tensor,
        mask: Tensor | None,
        y: Tensor,
        lse2: Tensor,
        scale: float,
        restart: float,
    ) -> None:
        """Writes y = (1 - restart) P x + restart start and lse2."""

    def transposed(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        scale: float,
        keep: float,
        restart: float,
    ) -> Tensor:
        """keep Pᵀ g + restart g."""

    def level(
        self, g: Tensor, y: Tensor, start: Tensor, mask: Tensor | None, lse_grad: Tensor | None, restart: float
    ) -> Tensor:
        """<g, y - restart start> - lse_grad, (B, N) float32: dE_ij = P_ij (keep <g_i, x_j> - level_i)."""

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        x: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        level: Tensor,
        q_grad: Tensor,
        k_grad: Tensor,
        scale: float,
        keep: float,
        accumulate: bool,
    ) -> None:
        """Writes scale dE k and scale dEᵀ q into q_grad and k_grad, or adds them (`accumulate`; both float32)."""


def forward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    steps: int,
    restart: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y_steps (B, N, D), lse2 (B, N) float32 and the states Y_1 .. Y_{steps-1} (steps - 1, B, N, D)."""
    width = v.shape[-1]
    q, k, v = kernels.rows(q), kernels.rows(k), kernels.rows(v)
    y = v.new_empty(v.shape)
    states = v.new_empty((steps - 1, *v.shape))
    lse2 = v.new_empty(v.shape[:-1], dtype=torch.float32)
    state = v
    for step in range(steps):
        out = y if step == steps - 1 else states[step]
        kernels.step(q, k, state, v, mask, out, lse2, scale, restart)
        state = out
    return y[..., :width].contiguous(), lse2, states[..., :width].contiguous()


def backward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse2: Tensor,
    states: Tensor,
    y_grad: Tensor | None,
    lse_grad: Tensor | None,
    scale: float,
    steps: int,
    restart: float,
    scores_needed: bool,
    values_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by the recursion of docs/method.md section 2; empty ones where not needed."""
    key, width, dtype = q.shape[-1], v.shape[-1], q.dtype
    q, k, v, y, lse2 = kernels.rows(q), kernels.rows(k), kernels.rows(v), kernels.rows(y), lse2.contiguous()
    g = torch.zeros_like(v) if y_grad is None else kernels.rows(y_grad)
    several = steps > 1
    # Several steps add up their gradients in float32.
    new = torch.zeros if several else torch.empty
    sum_dtype = torch.float32 if several else dtype
    q_grad, k_grad = (new(q.shape if scores_needed else 0, dtype=sum_dtype, device=q.device) for _ in "qk")
    v_sum = torch.zeros(v.shape, dtype=torch.float32, device=v.device) if values_needed and several else None
    for step in reversed(range(steps)):
        if scores_needed:
            state = v if step == 0 else kernels.rows(states[step - 1])
            after = y if step == steps - 1 else kernels.rows(states[step])
            level = kernels.level(g, after, v, mask, lse_grad if step == steps - 1 else None, restart)
            kernels.scores(q, k, g, state, mask, lse2, level, q_grad, k_grad, scale, 1.0 - restart, several)
        if v_sum is not None:
            v_sum += restart * (g if mask is None else g.masked_fill(~mask[..., None], 0.0))
        if step > 0 or values_needed:
            g = kernels.transposed(q, k, g, mask, lse2, scale, 1.0 - restart, 0.0 if several else restart)
    v_grad = (g if v_sum is None else v_sum.add_(g))[..., :width] if values_needed else v.new_empty(0)
    q_grad, k_grad = (x[..., :key] if scores_needed else x for x in (q_grad, k_grad))
    return tuple(x.to(dtype).contiguous() for x in (q_grad, k_grad, v_grad))  # type: ignore[return-value]
