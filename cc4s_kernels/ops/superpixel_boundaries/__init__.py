"""Pixels on the borders between superpixels."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import check_tensor
from cc4s_kernels.ops.superpixel_boundaries import library  # noqa: F401  registers the backends


def superpixel_boundaries(superpixels: Tensor) -> Tensor:
    """Marks the pixels that have a 4-neighbour of another id, on both sides of each border.

    A pixel with a negative id is never marked; a pixel beside one is (-1 is another id). The border of the
    image marks nothing.

    Args:
        superpixels: (B, H, W) int16, int32 or int64; -1 = no superpixel.

    Returns:
        (B, H, W) bool.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape.

    Source: the paper "CC4S", soft entropy; docs/method.md section 4.
    """
    check_tensor("superpixels", superpixels, dims="(B, H, W)", dtypes=(torch.int16, torch.int32, torch.int64))
    return backends.select("superpixel_boundaries", superpixels)(superpixels)
