"""Channel dropout that does not depend on the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cc4s.models.distributed import rank_and_world


class Dropout2d(nn.Module):
    """Zeroes whole channels with probability `p` and divides the others by 1 - p, in training only.

    The mask is drawn from torch's generator for the global batch, and each process takes its own rows. So W
    processes with B samples each, sample s of rank r being sample r*B + s of the global batch, and one
    process with the W*B samples drop the same channels, provided that every process has seeded torch alike
    since the last draw. All processes need the same B. With gradient accumulation this holds for each
    micro-batch on its own: seed before each one; the masks of one batch of 2B and of two of B differ.

    Args:
        p: probability in [0, 1).

    Raises:
        ValueError: `p` out of range.
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: got {p}, expected a probability in [0, 1)")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w), any floating dtype. Returns the same shape, dtype and memory format."""
        if not self.training or self.p == 0:
            return x
        rank, world = rank_and_world()
        batch, channels = x.shape[:2]
        keep = torch.rand(world * batch, channels, device=x.device) >= self.p  # [W*B, C]
        keep = keep[rank * batch : (rank + 1) * batch]
        scale = keep.to(x.dtype) / (1 - self.p)
        return x * scale[:, :, None, None]
