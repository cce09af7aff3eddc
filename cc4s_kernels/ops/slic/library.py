"""Torch ops and backends of `slic`."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, backends
from cc4s_kernels.ops.slic import reference

_ARGUMENTS = "(Tensor image, Tensor? mask, int num_segments, int compactness, int iterations) -> Tensor"

# "slic" has its kernels in csrc/slic: slic_cpu.cpp and slic_cuda.cu.
_library.LIBRARY.define(f"slic{_ARGUMENTS}")
_library.LIBRARY.define(f"slic_reference{_ARGUMENTS}")
_library.LIBRARY.impl("slic_reference", reference.slic, "CompositeExplicitAutograd")


def _fake(image: Tensor, mask: Tensor | None, num_segments: int, compactness: int, iterations: int) -> Tensor:
    batch, _, height, width = image.shape
    return image.new_empty((batch, height, width), dtype=torch.int32)


for _name in ("slic", "slic_reference"):
    torch.library.register_fake(f"{_library.NAMESPACE}::{_name}", _fake, lib=_library.LIBRARY)


def _fixed_point(compactness: float) -> int:
    """In 1/256, rounded."""
    return int(compactness * 256 + 0.5)


def _reference(
    image: Tensor,
    num_segments: int = 800,
    *,
    compactness: float = 10.0,
    iterations: int = 10,
    mask: Tensor | None = None,
) -> Tensor:
    return torch.ops.cc4s_kernels.slic_reference(image, mask, num_segments, _fixed_point(compactness), iterations)


def _compiled(
    image: Tensor,
    num_segments: int = 800,
    *,
    compactness: float = 10.0,
    iterations: int = 10,
    mask: Tensor | None = None,
) -> Tensor:
    return torch.ops.cc4s_kernels.slic(image, mask, num_segments, _fixed_point(compactness), iterations)


def _cpu_refuses(image: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if image.device.type == "cpu" else f"the image is on {image.device}"


def _cuda_refuses(image: Tensor, *args: object, **kwargs: object) -> str | None:
    return _cuda.refuses(image, "image")


backends.register("slic", "reference", _reference)
backends.register("slic", "cpu", _compiled, _cpu_refuses)
backends.register("slic", "cuda", _compiled, _cuda_refuses)
