"""A few images with discs of three colours, and scribbles on them, for the examples."""

from __future__ import annotations

import torch
from torch import Tensor


def scribbled_images(count: int = 2, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) in [0, 1] and labels (count, size, size) uint8 with 255 = no scribble."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.1 * torch.rand(count, 3, size, size, generator=generator)
    labels = torch.full((count, size, size), 255, dtype=torch.uint8)
    labels[:, 2, 4:-4] = 0
    for image, label in zip(images, labels, strict=True):
        for kind in (1, 2):
            left = size // 4 if kind == 1 else 3 * size // 4
            row = int(torch.randint(size // 4, 3 * size // 4, (1,), generator=generator))
            image[kind, (rows - row) ** 2 + (columns - left) ** 2 < (size // 6) ** 2] += 0.8
            label[row, left - size // 8 : left + size // 8] = kind
    return images, labels
