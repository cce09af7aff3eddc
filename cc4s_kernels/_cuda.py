"""What the CUDA kernels of all ops share: where they can run."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _library


def missing() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    return _library.CUDA_EXTENSION_ERROR if torch.cuda.is_available() else "no CUDA device"


@torch.compiler.assume_constant_result
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a device; None is the current one."""
    return torch.cuda.get_device_capability(index)


def refuses(tensor: Tensor, name: str) -> str | None:
    """Why CUDA kernels cannot take `tensor`, or None."""
    if tensor.device.type != "cuda":
        return f"{name} is on {tensor.device}"
    major, minor = capability(tensor.device.index)
    if major < 8:
        return f"{name} is on a GPU of compute capability {major}.{minor}, CUDA kernels need 8.0"
    return None
