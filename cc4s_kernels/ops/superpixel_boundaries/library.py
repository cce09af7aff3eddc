"""Torch op and backends of `superpixel_boundaries`."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, backends
from cc4s_kernels.ops.superpixel_boundaries import reference

# Has its kernels in csrc/superpixel_boundaries: superpixel_boundaries_cpu.cpp and superpixel_boundaries_cuda.cu.
_library.LIBRARY.define("superpixel_boundaries(Tensor superpixels) -> Tensor")


def _fake(superpixels: Tensor) -> Tensor:
    return superpixels.new_empty(superpixels.shape, dtype=torch.bool)


torch.library.register_fake(f"{_library.NAMESPACE}::superpixel_boundaries", _fake, lib=_library.LIBRARY)


def _compiled(superpixels: Tensor) -> Tensor:
    return torch.ops.cc4s_kernels.superpixel_boundaries(superpixels)


def _cpu_refuses(superpixels: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if superpixels.device.type == "cpu" else f"the superpixels are on {superpixels.device}"


def _cuda_refuses(superpixels: Tensor, *args: object, **kwargs: object) -> str | None:
    if superpixels.shape[1] * superpixels.shape[2] >= 2**31:
        return "the maps have 2^31 pixels or more"
    return _cuda.refuses(superpixels, "superpixels")


backends.register("superpixel_boundaries", "reference", reference.superpixel_boundaries)
backends.register("superpixel_boundaries", "cpu", _compiled, _cpu_refuses)
backends.register("superpixel_boundaries", "cuda", _compiled, _cuda_refuses)
