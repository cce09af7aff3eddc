"""superpixel_boundaries: pixels with a neighbour of another id."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled
from cc4s_kernels.ops.superpixel_boundaries.reference import superpixel_boundaries as reference

OP = "superpixel_boundaries"
# The crop of the training recipe.
SIZES = ({"B": 1, "H": 465, "W": 465},)
GPU_SIZES = ({"B": 16, "H": 465, "W": 465},)


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("int32",)) -> list[Case]:
    """Traffic: an id of four bytes read, a byte written."""
    return [
        Case(OP, size, dtype, "forward", 0, 0, 5 * size["B"] * size["H"] * size["W"])
        for size in sizes
        for dtype in dtypes
    ]


def inputs(case: Case, device: torch.device) -> Tensor:
    """Superpixels of an image of 24 x 24 flat patches with noise: ragged borders."""
    batch, height, width = (case.size[key] for key in "BHW")
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(32, 224, (batch, 3, 24, 24), generator=generator).float()
    image = torch.nn.functional.interpolate(patches, (height, width)) + 8 * torch.randn(
        batch, 3, height, width, generator=generator
    )
    return ck.slic(image.clamp(0, 255).to(torch.uint8), 800).to(device)


def eager(ids: Tensor) -> Tensor:
    out = torch.zeros_like(ids, dtype=torch.bool)
    for axis in (1, 2):
        size = ids.shape[axis]
        other = ids.narrow(axis, 1, size - 1) != ids.narrow(axis, 0, size - 1)
        out.narrow(axis, 1, size - 1).logical_or_(other)
        out.narrow(axis, 0, size - 1).logical_or_(other)
    return out & (ids >= 0)


def run_of(function: Callable[[Tensor], Tensor]) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        ids = inputs(case, device)

        def run() -> Sequence[Tensor]:
            return (function(ids),)

        return run

    return make


def on_backend(name: str) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.superpixel_boundaries(ids)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # With AVX2 alone, the C++ that torch 2.13 makes of it does not compile: the row says so.
    made = [Provider("eager", run_of(eager)), Provider("compiled reference", run_of(compiled(reference)), "eager", 0.0)]
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(on_backend(name)), "eager", 0.0))
    return made
