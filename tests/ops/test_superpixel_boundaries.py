"""`superpixel_boundaries` against a loop over pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from tests.ops.tester import Inputs, OpTester, devices_of, generator


class TestSuperpixelBoundaries(OpTester):
    op_name = "superpixel_boundaries"
    sizes = (1, 7, 20)
    exact = True
    dtypes = ()

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 3)
        ids = torch.randint(-1, 3, (batch, size, size + 1), generator=generator(seed), dtype=torch.int32)
        # Blocks of 2 x 2, so that there are inner pixels too.
        ids = ids.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (ids.to(device),), {}

    def naive(self, superpixels: Tensor) -> tuple[Tensor, ...]:
        ids = superpixels.numpy()
        out = np.zeros(ids.shape, bool)
        batch, height, width = ids.shape
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                        inside = 0 <= v < height and 0 <= u < width
                        if inside and ids[b, y, x] >= 0 and ids[b, v, u] != ids[b, y, x]:
                            out[b, y, x] = True
        return (torch.from_numpy(out),)

    def custom_op_calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        if "cpu" not in backends.available("superpixel_boundaries"):
            return []
        args, _ = self.make_inputs(torch.float32, "cpu", 7, 0)
        return [(torch.ops.cc4s_kernels.superpixel_boundaries.default, args, {})]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (67, 83)])
def test_backends_agree(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 3, (2, *shape), generator=generator(3)).repeat_interleave(2, 2).to(dtype)
    turned = ids.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with ck.use_backend("reference"):
        expected = ck.superpixel_boundaries(ids)
    for name in backends.available("superpixel_boundaries"):
        device = devices_of(name)[0]
        with ck.use_backend(name):
            assert torch.equal(ck.superpixel_boundaries(ids.to(device)).cpu(), expected)
            assert torch.equal(ck.superpixel_boundaries(turned.to(device)).cpu(), expected)


def test_both_sides_and_missing_ids() -> None:
    # Both sides of a border; a pixel beside -1 has a neighbour of another id; -1 itself is no boundary.
    ids = torch.tensor([[[0, 0, 0, 1, 1, 1, -1, -1]]])
    expected = torch.tensor([[[False, False, True, True, False, True, False, False]]])
    assert torch.equal(ck.superpixel_boundaries(ids), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (2, 5, 1), (1, 0, 3), (0, 4, 4)])
def test_one_segment_has_no_boundary(shape: tuple[int, ...]) -> None:
    assert not ck.superpixel_boundaries(torch.zeros(shape, dtype=torch.int32)).any()


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"superpixels: got shape .* expected one of torch\.int16"):
        ck.superpixel_boundaries(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"superpixels: got shape .* expected shape"):
        ck.superpixel_boundaries(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="superpixels: got list"):
        ck.superpixel_boundaries([[0]])  # type: ignore[arg-type]
