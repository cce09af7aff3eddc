"""Torch op and backends of `superpixel_boundaries`."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _library, backends
from cc4s_kernels.ops.superpixel_boundaries import reference

# Has its CPU kernel in csrc/superpixel_boundaries/superpixel_boundaries_cpu.cpp.
_library.LIBRARY.define("superpixel_boundaries(Tensor superpixels) -> Tensor")


def _fake(superpixels: Tensor) -> Tensor:
    return superpixels.new_empty(superpixels.shape, dtype=torch.bool)


torch.library.register_fake(f"{_library.NAMESPACE}::superpixel_boundaries", _fake, lib=_library.LIBRARY)


def _cpu(superpixels: Tensor) -> Tensor:
    return torch.ops.cc4s_kernels.superpixel_boundaries(superpixels)


def _cpu_refuses(superpixels: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if superpixels.device.type == "cpu" else f"the superpixels are on {superpixels.device}"


backends.register("superpixel_boundaries", "reference", reference.superpixel_boundaries)
backends.register("superpixel_boundaries", "cpu", _cpu, _cpu_refuses)
