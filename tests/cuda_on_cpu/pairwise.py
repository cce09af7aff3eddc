"""What the tests of the pairwise kernels share: arguments as the C++ structs have them, inputs, errors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cc4s_kernels._cuda import aligned_rows
from tests.cuda_on_cpu.build import memory, pointer
from tests.ops.tester import generator

LOG2_E = 1.4426950408889634
TYPES = {torch.bfloat16: 0, torch.float16: 1}
DTYPES = list(TYPES)


class Rows(ctypes.Structure):
    """Of csrc/common/rows.cuh."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        ("batch", ctypes.c_longlong),
        ("row", ctypes.c_longlong),
        ("width", ctypes.c_int),
    )


def rows(x: Tensor | None) -> Rows:
    if x is None:
        return Rows(None, 0, 0, 0)
    assert x.dtype == torch.float32 or x is aligned_rows(x)
    return Rows(memory(x), x.stride(0), x.stride(1), x.shape[-1])


def structure(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def floats(x: Tensor | None) -> ctypes.c_void_p:
    assert x is None or x.dtype in (torch.float32, torch.bool)
    return pointer(x)


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def draw_mask(batch: int, n: int, seed: int) -> Tensor:
    """About a third is hidden; where there are two entries, the second has no valid position."""
    mask = torch.rand(batch, n, generator=generator(seed)) > 0.33
    mask[1:2] = False
    return mask


def hidden_as_nan(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], torch.nan)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact value."""
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().nan_to_num(nan=torch.inf).max().item()
    return error / max(exact.abs().max().item(), 1e-30)
