"""The definition of `superpixel_boundaries`."""

from __future__ import annotations

import torch
from torch import Tensor


def superpixel_boundaries(superpixels: Tensor) -> Tensor:
    """superpixels (B, H, W) integer -> (B, H, W) bool."""
    across = superpixels[:, :, 1:] != superpixels[:, :, :-1]  # [B, H, W-1]
    down = superpixels[:, 1:] != superpixels[:, :-1]  # [B, H-1, W]
    pad = torch.nn.functional.pad
    other = pad(across, (1, 0)) | pad(across, (0, 1)) | pad(down, (0, 0, 1, 0)) | pad(down, (0, 0, 0, 1))
    return other & (superpixels >= 0)
