"""Torch ops and backends of `color_affinity`."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import _cuda, _library, backends
from cc4s_kernels.ops.color_affinity import reference
from cc4s_kernels.ops.color_affinity.reference import COLOR_BINS, TEXTURE_BINS, SuperpixelGraph

# Both have their kernels in csrc/color_affinity: color_affinity_cpu.cpp and color_affinity_cuda.cu. The integers alone
# are for tests.
_library.LIBRARY.define(
    "color_affinity(Tensor image, Tensor superpixels, SymInt num_superpixels, SymInt max_edges) -> "
    "(Tensor edge_index, Tensor weight, Tensor num_edges, Tensor counts)"
)
_library.LIBRARY.define(
    "color_histograms(Tensor image, Tensor superpixels, SymInt num_superpixels) -> "
    "(Tensor color, Tensor texture, Tensor counts)"
)


def _fake(image: Tensor, superpixels: Tensor, num_superpixels: int, max_edges: int) -> tuple[Tensor, ...]:
    batch = image.shape[0]
    return (
        image.new_empty((batch, 2, max_edges), dtype=torch.int64),
        image.new_empty((batch, max_edges), dtype=torch.float32),
        image.new_empty((batch,), dtype=torch.int64),
        image.new_empty((batch, num_superpixels), dtype=torch.int64),
    )


def _fake_histograms(image: Tensor, superpixels: Tensor, num_superpixels: int) -> tuple[Tensor, ...]:
    shape = (image.shape[0], num_superpixels)
    sizes = (3 * COLOR_BINS, 2 * TEXTURE_BINS)
    return (
        *(image.new_empty((*shape, size), dtype=torch.int64) for size in sizes),
        image.new_empty(shape, dtype=torch.int64),
    )


for _name, _shapes in (("color_affinity", _fake), ("color_histograms", _fake_histograms)):
    torch.library.register_fake(f"{_library.NAMESPACE}::{_name}", _shapes, lib=_library.LIBRARY)


def _compiled(
    image: Tensor, superpixels: Tensor, num_superpixels: int, *, max_edges: int | None = None
) -> SuperpixelGraph:
    places = reference.planar_edges(num_superpixels) if max_edges is None else max_edges
    edge_index, weight, num_edges, counts = torch.ops.cc4s_kernels.color_affinity(
        reference.to_uint8(image.detach()), superpixels, num_superpixels, places
    )
    return SuperpixelGraph(edge_index, weight, num_superpixels, num_edges, counts)


def _cpu_refuses(image: Tensor, *args: object, **kwargs: object) -> str | None:
    if image.device.type != "cpu":
        return f"the image is on {image.device}"
    if image.shape[2] * image.shape[3] >= 2**31:
        return "the image has 2^31 pixels or more"
    return None


def _cuda_refuses(image: Tensor, superpixels: Tensor, num_superpixels: int, **kwargs: object) -> str | None:
    if image.shape[2] * image.shape[3] >= 2**30:
        return "the image has 2^30 pixels or more"
    if num_superpixels >= 2**30:
        return "num_superpixels is 2^30 or more"
    return _cuda.refuses(image, "image")


backends.register("color_affinity", "reference", reference.color_affinity)
backends.register("color_affinity", "cpu", _compiled, _cpu_refuses)
backends.register("color_affinity", "cuda", _compiled, _cuda_refuses)
