"""The CUDA kernels with more than 2^31 elements from one image, or one row of pixels, to the next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cc4s_kernels.ops.color_affinity import reference as color_reference
from cc4s_kernels.ops.slic.reference import slic as slic_reference
from cc4s_kernels.ops.superpixel_boundaries.reference import superpixel_boundaries as boundaries_reference
from tests.cuda_on_cpu import test_color_affinity as affinity
from tests.cuda_on_cpu import test_slic as slic
from tests.cuda_on_cpu import test_superpixel_boundaries as boundaries
from tests.ops.test_slic import random_mask, textured
from tests.ops.tester import far_copies, generator

FAR = 2**31 + 64
"""No int32, in elements."""


def far(tensor: Tensor, axis: int) -> Tensor:
    """Equal values, far apart along an axis."""
    copy = far_copies(tensor.movedim(axis, 0), "cpu", FAR).movedim(0, axis)
    assert copy.stride(axis) == FAR
    return copy


# Of images: one after the other, and rows of pixels.
AXES = pytest.mark.parametrize("axis", [0, -2], ids=["images", "rows"])


@AXES
def test_superpixel_boundaries(axis: int) -> None:
    ids = torch.randint(-1, 3, (2, 5, 7), generator=generator(1), dtype=torch.int16)
    assert torch.equal(boundaries.on_cpu(far(ids, axis), 0), boundaries_reference(ids).to(torch.uint8))


@AXES
def test_slic(axis: int) -> None:
    image, mask = textured(2, 9, 14, 3, 60), random_mask(2, 9, 14, 4, 0.2)
    found = slic.on_cpu(far(image, axis), far(mask, axis), 6, 2560, 2, 0)
    assert torch.equal(found, slic_reference(image, mask, 6, 2560, 2))


@AXES
def test_color_affinity(axis: int) -> None:
    image = textured(2, 9, 14, 5, 80)
    ids = slic_reference(image, None, 6, 2560, 2)
    places = color_reference.planar_edges(6)
    found = affinity.affinity(far(image, axis), far(ids, axis), 6, places)
    expected = affinity.affinity(image, ids, 6, places)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
