"""The kernels of `random_walk` in csrc/random_walk/ for NVIDIA GPUs, one torch op for each."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library

# Tensors are (B, N, width) with rows as `_cuda.aligned_rows` makes them; vectors are (B, N) float32.
_library.LIBRARY.define(
    "random_walk_cuda_step(Tensor q, Tensor k, Tensor x, Tensor start, Tensor? mask, Tensor(a!) y, Tensor(b!) lse2,"
    " float scale, float keep, float restart, bool transposed) -> ()"
)
_library.LIBRARY.define(
    "random_walk_cuda_level(Tensor g, Tensor y, Tensor start, Tensor? mask, Tensor? lse_grad, Tensor(a!) level,"
    " float restart) -> ()"
)
_library.LIBRARY.define(
    "random_walk_cuda_scores(Tensor q, Tensor k, Tensor g, Tensor x, Tensor? mask, Tensor lse2, Tensor level,"
    " Tensor(a!) q_grad, Tensor(b!) k_grad, float scale, float keep) -> ()"
)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class CudaKernels:
    """As `cc4s_kernels.ops.random_walk.steps.Kernels` says."""

    rows = staticmethod(_cuda.aligned_rows)

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
        torch.ops.cc4s_kernels.random_walk_cuda_step(
            q, k, x, start, _dense(mask), y, lse2, scale, 1.0 - restart, restart, False
        )

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
        out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        torch.ops.cc4s_kernels.random_walk_cuda_step(q, k, g, g, _dense(mask), out, lse2, scale, keep, restart, True)
        return out

    def level(
        self, g: Tensor, y: Tensor, start: Tensor, mask: Tensor | None, lse_grad: Tensor | None, restart: float
    ) -> Tensor:
        level = g.new_empty(g.shape[:-1], dtype=torch.float32)
        torch.ops.cc4s_kernels.random_walk_cuda_level(g, y, start, _dense(mask), _dense(lse_grad), level, restart)
        return level

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
        # Sums are float32, what is written once has the dtype of q.
        torch.ops.cc4s_kernels.random_walk_cuda_scores(
            q, k, g, x, _dense(mask), lse2, level, q_grad, k_grad, scale, keep
        )
