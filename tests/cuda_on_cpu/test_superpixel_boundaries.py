"""The CUDA kernel of `superpixel_boundaries` on the CPU against the reference."""

from __future__ import annotations

import ctypes

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cc4s_kernels.ops.superpixel_boundaries.reference import superpixel_boundaries as reference
from tests.cuda_on_cpu.build import library, memory, pointer
from tests.ops.tester import generator, strided_copy


def on_cpu(ids: Tensor, seed: int) -> Tensor:
    # 2 is no bool: a pixel that is not written shows.
    out = torch.full(ids.shape, 2, dtype=torch.uint8)
    run = getattr(library("superpixel_boundaries"), f"boundaries_{str(ids.dtype).removeprefix('torch.')}")
    strides = (ctypes.c_longlong * 3)(*ids.stride())
    run(memory(ids), strides, ctypes.c_longlong(ids.shape[0]), *ids.shape[1:], pointer(out), seed)
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    block=st.integers(1, 6),
    seed=st.integers(0, 2**31 - 1),
    strided=st.booleans(),
)
def test_equals_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, block: int, seed: int, strided: bool
) -> None:
    random = generator(seed)
    ids = torch.randint(-2, 4, shape, generator=random).repeat_interleave(block, 2)[:, :, : shape[2]].to(dtype)
    # Ids that differ in the high half only.
    ids = torch.where(ids == 3, torch.iinfo(dtype).max - 1, ids)
    found = on_cpu(strided_copy(ids) if strided else ids.contiguous(), seed % 7)
    assert torch.equal(found, reference(ids).to(torch.uint8))
