"""The kernels of `transition_consistency` in csrc/transition_consistency/ for NVIDIA GPUs, one op for each pass."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library

# Tensors are (B, N, d) with rows as `_cuda.aligned_rows` makes them; vectors are (B, N) float32, unit is (1,).
_library.LIBRARY.define(
    "transition_consistency_cuda_divergences(Tensor q, Tensor k, Tensor q_target, Tensor k_target, Tensor? mask,"
    " float scale) -> (Tensor kl, Tensor diagonal, Tensor diagonal_target, Tensor lse2, Tensor lse2_target)"
)
_library.LIBRARY.define(
    "transition_consistency_cuda_scores(Tensor q, Tensor k, Tensor q_target, Tensor k_target, Tensor? mask,"
    " Tensor lse2, Tensor lse2_target, Tensor kl_grad, Tensor trace_grad, Tensor unit, Tensor(a!) q_grad,"
    " Tensor(b!) k_grad, float scale) -> ()"
)


class CudaKernels:
    """As `cc4s_kernels.ops.transition_consistency.passes.Kernels` says."""

    rows = staticmethod(_cuda.aligned_rows)

    def divergences(
        self, q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mask = None if mask is None else mask.contiguous()
        return torch.ops.cc4s_kernels.transition_consistency_cuda_divergences(q, k, q_target, k_target, mask, scale)

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
        mask = None if mask is None else mask.contiguous()
        q_grad, k_grad = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in "qk")
        torch.ops.cc4s_kernels.transition_consistency_cuda_scores(
            *(q, k, q_target, k_target, mask, lse2, lse2_target, kl_grad, trace_grad, unit, q_grad, k_grad, scale)
        )
        return q_grad, k_grad
