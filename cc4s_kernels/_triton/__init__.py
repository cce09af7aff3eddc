"""What the Triton kernels of all ops share.

`score_tiles`: the device functions of the pairwise ops. `configs`: tile shapes by kernel, GPU, dtype and size.
`launch`: from tensors to a kernel launch. Here, without importing Triton: where its kernels can run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from cc4s_kernels._cuda import capability as _capability

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when a kernel is defined, so it
has to be set before this package is imported."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _missing_software() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if INTERPRETED and tuple(map(int, version.split(".")[:2])) < (3, 7):
        # Loops over a run-time bound fail there with NumPy 2.4.
        return f"the interpreter (TRITON_INTERPRET=1) needs triton 3.7, this is {version}"
    return None


_MISSING_SOFTWARE = _missing_software()


def missing() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if _MISSING_SOFTWARE is not None or INTERPRETED:
        return _MISSING_SOFTWARE
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def refuses(tensor: Tensor, name: str, *, widened: bool = False) -> str | None:
    """Why Triton kernels cannot take `tensor`, or None. `widened`: they see it in float32 or float64 only."""
    if not widened and tensor.dtype not in DTYPES:
        return f"{name} is {tensor.dtype}, Triton kernels take float32, float16 and bfloat16"
    if INTERPRETED:
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, the interpreter (TRITON_INTERPRET=1) takes CPU tensors"
        if not widened and tensor.dtype == torch.bfloat16:
            return f"{name} is torch.bfloat16, whose arithmetic is wrong in the interpreter (TRITON_INTERPRET=1)"
        return None
    if tensor.device.type != "cuda":
        return f"{name} is on {tensor.device}"
    major, minor = _capability(tensor.device.index)
    if major < 8:
        needed = "Triton kernels need 8.0; the reference runs there"
        return f"{name} is on a GPU of compute capability {major}.{minor}, {needed}"
    return None


def flatten_leading(x: Tensor, kept: int) -> Tensor:
    """`x` with its leading dimensions as one (of size 1 where there is none) before the last `kept`."""
    return x.flatten(0, -kept - 1) if x.dim() > kept else x.unsqueeze(0)
