"""The photograph of the benchmarks and pictures of superpixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def photograph(batch: int, height: int, width: int) -> Tensor:
    """(batch, 3, height, width) uint8: the middle of a portrait of an astronaut with which scikit-image comes (NASA,
    public domain, 512 x 512). A larger image is mirrored at its sides; every other image of a batch is mirrored."""
    from skimage.data import astronaut

    image = astronaut()
    for axis, size in enumerate((height, width)):
        spare = image.shape[axis] - size
        if spare >= 0:
            image = image.take(range(spare // 2, spare // 2 + size), axis)
        else:
            margins = [(0, 0)] * 3
            margins[axis] = (-spare // 2, -spare - -spare // 2)
            image = np.pad(image, margins, mode="symmetric")
    images = [image[:, ::-1] if b % 2 else image for b in range(batch)]
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
