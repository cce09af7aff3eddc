"""From tensors to a kernel launch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from cc4s_kernels._triton import INTERPRETED
from cc4s_kernels._triton.configs import Config, Target

LOG2_E = 1.0 / math.log(2.0)

# Where launches go instead of to a GPU: tools/compile_check.py collects them.
_recorder: Callable[..., None] | None = None
_target: Target | None = None


@contextlib.contextmanager
def recording(target: Target, recorder: Callable[..., None]) -> Iterator[None]:
    """In the block kernels are not run: `recorder(kernel, args, constants, config)` is called instead, with the
    configurations of `target`. Tensors may be on the meta device."""
    global _recorder, _target
    _recorder, _target = recorder, target
    try:
        yield
    finally:
        _recorder, _target = None, None


def target_of(tensor: Tensor) -> Target:
    """The GPU whose configurations a kernel on `tensor` uses."""
    if _target is not None:
        return _target
    if INTERPRETED:
        return "interpreter"
    return target_of_capability(torch.cuda.get_device_capability(tensor.device))


def target_of_capability(capability: tuple[int, int]) -> Target:
    major, minor = capability
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_86"


def launch(kernel: Any, programs: int, *args: Any, config: Config, **constants: Any) -> None:
    """Runs `programs` instances of `kernel`. The first argument is a tensor on the device to use."""
    if programs == 0:
        return
    if _recorder is not None:
        _recorder(kernel, args, constants, config)
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=config.warps, num_stages=config.stages)


def rows(x: Tensor) -> Tensor:
    """`x` (B, N, D) with adjacent columns in memory, copied at most once.

    A tile's offsets are int32: rows farther apart than any tile allows are copied too.
    """
    if (x.stride(-1) == 1 or x.shape[-1] <= 1) and x.stride(-2) < 2**22:
        return x
    return x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Batch and row stride of each (B, N, D) tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def tiles(n: int, block: int) -> int:
    return -(-n // block)


def block_of(width: int) -> int:
    """Columns of a tile that holds a whole row; a matrix instruction needs 16."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: torch's setting for float32 matrix products on CUDA."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
