"""What the compiled kernels of the pairwise ops share."""

from __future__ import annotations

from torch import Tensor

from cc4s_kernels import _library

# exp of float32 as the kernels compute it (csrc/common/tile_engine.h), for its test.
_library.LIBRARY.define("tile_exp(Tensor x) -> Tensor")

MAX_KEY_WIDTH = 256
MAX_VALUE_WIDTH = 1024


def cpu_refuses(q: Tensor, *, value_width: int = 0) -> str | None:
    """Why the CPU kernels cannot run a call with these queries, or None."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    if q.shape[-1] > MAX_KEY_WIDTH:
        return f"d = {q.shape[-1]}, at most {MAX_KEY_WIDTH} key channels"
    if value_width > MAX_VALUE_WIDTH:
        return f"D = {value_width}, at most {MAX_VALUE_WIDTH} value channels"
    return None
