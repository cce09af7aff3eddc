"""segmentation_models_pytorch with the losses and the walk of this package.

The head of its models is a convolution, a bilinear upsampling with align_corners=True and an activation.
`feature_size` leaves out the upsampling, which our losses do inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cc4s_kernels.contrib._require import require
from cc4s_kernels.nn.random_walk import RandomWalk2d

__all__ = ["feature_size", "insert_random_walk"]


def _head(model: Any) -> nn.Sequential:
    smp = require("segmentation_models_pytorch", "segmentation-models-pytorch")
    if not isinstance(model, smp.base.SegmentationModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a model of segmentation_models_pytorch")
    return model.segmentation_head


@contextmanager
def feature_size(model: nn.Module) -> Iterator[nn.Module]:
    """In this block the model returns logits (B, C, h, w) at the size of its decoder, not of the image.

    Args:
        model: a model of segmentation_models_pytorch without an activation (the default).

    Raises:
        ImportError: no segmentation_models_pytorch. TypeError: another model. ValueError: the model returns
            something else than logits.
    """
    head = _head(model)
    activation = head[2]
    if not isinstance(activation, nn.Identity) and not isinstance(getattr(activation, "activation", None), nn.Identity):
        raise ValueError(f"model: got activation {activation}, expected activation=None, for logits")
    upsampling = head[1]
    head[1] = nn.Identity()
    try:
        yield model
    finally:
        head[1] = upsampling


def insert_random_walk(model: nn.Module, key_channels: int | None = None, shrink: int = 1) -> RandomWalk2d:
    """Puts a `RandomWalk2d` between decoder and head; it passes features through at first.

    Decoders end at a quarter of the image's size or more: N is large there, `shrink` makes it shrink² times smaller.

    Args:
        model: a model of segmentation_models_pytorch; changed in place.
        key_channels, shrink: of the walk.

    Returns:
        The walk, `model.segmentation_head[0][0]`; the head's convolution is `model.segmentation_head[0][1]`.

    Raises:
        ImportError: no segmentation_models_pytorch. TypeError: another model, or one whose head does not begin with a
            convolution.
    """
    head = _head(model)
    first = head[0]
    if not isinstance(first, nn.Conv2d):
        raise TypeError(f"model: got a head that begins with {type(first).__name__}, expected a convolution")
    walk = RandomWalk2d(first.in_channels, key_channels, shrink).to(first.weight.device, first.weight.dtype)
    head[0] = nn.Sequential(walk, first)
    return walk
