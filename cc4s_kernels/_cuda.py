"""What the CUDA kernels of all ops share: where they can run."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _jit, _library


def missing() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _library.CUDA_EXTENSION_ERROR or (_run_time_missing() if _library.CUDA_RUN_TIME else None)


@torch.compiler.assume_constant_result
def _run_time_missing() -> str | None:
    return _jit.missing()


def build() -> str:
    """How the CUDA kernels of this process come about."""
    return _jit.TITLE if _library.CUDA_RUN_TIME else "built"


@torch.compiler.assume_constant_result
def lacks(op: str) -> str | None:
    """Why the CUDA kernels of an op that has some are not in this process, or None."""
    if not _library.CUDA_RUN_TIME or _jit.has(_library.extension_path("_JIT"), op):
        return None
    return f"{op} has no CUDA kernels that can be compiled at run time"


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
        needed = "CUDA kernels need 8.0; the reference runs there"
        return f"{name} is on a GPU of compute capability {major}.{minor}, {needed}"
    return None


def refuses_pairwise(tensor: Tensor, name: str) -> str | None:
    """Why the CUDA kernels of the pairwise ops, which are made of half-precision matrix instructions, cannot take
    `tensor`, or None."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        other = "; float32 runs in Triton" if tensor.dtype == torch.float32 else ""
        return f"{name} is {tensor.dtype}, the CUDA kernels take float16 and bfloat16{other}"
    return refuses(tensor, name)


def aligned_rows(x: Tensor) -> Tensor:
    """`x` (B, N, width) with rows that start at multiples of 16 bytes and adjacent columns, a multiple of 8 of them:
    itself, or a copy with columns of zeros. For half-precision tensors."""
    width = x.shape[-1]
    if width % 8 == 0 and width > 0:
        if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0:
            return x
        return x.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(x, (0, 8 - width % 8))
