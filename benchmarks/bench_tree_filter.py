"""tree_filter: means of class probabilities along the minimum spanning tree of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run
from cc4s_kernels.ops.tree_filter import reference

OP = "tree_filter"
SIZES = ({"B": 1, "C": 21, "H": 512, "W": 512},)
GPU_SIZES = tuple({**size, "B": 8} for size in SIZES)
SIGMA = 0.02
Filter = Callable[[Tensor, Tensor], Tensor]


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """For each pixel and channel, the normaliser too: a product and a sum up, two products and a sum down; backward the
    filter of the values and of the gradient, and four products and sums for each edge.

    Traffic: values and image read and the means written; backward values and gradient read, and two gradients written.
    """
    made = []
    for size in sizes:
        pixels = size["B"] * size["H"] * size["W"]
        for dtype in dtypes:
            values = pixels * size["C"] * getattr(torch, dtype).itemsize
            work = 5 * pixels * (size["C"] + 1)
            made.append(Case(OP, size, dtype, "forward", work, pixels, 2 * values + 3 * pixels))
            made.append(Case(OP, size, dtype, "forward+backward", 3 * work + 8 * work // 5, pixels, 5 * values))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random probabilities, and a noisy image of smooth colours whose edges differ, so that there is one tree."""
    generator = torch.Generator().manual_seed(0)
    size = case.size
    shape = (size["H"], size["W"])
    prob = torch.randn(size["B"], size["C"], *shape, generator=generator).softmax(1)
    image = torch.linspace(0, 0.7, shape[1]) + 0.2 * torch.rand(size["B"], 3, *shape, generator=generator)
    return prob.to(device, case.torch_dtype), image.to(device)


def run_of(function: Filter) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        prob, image = inputs(case, device)
        backward = case.pass_ != "forward"
        prob.requires_grad_(backward)

        def run() -> Sequence[Tensor]:
            out = function(prob, image)
            return (out, *(torch.autograd.grad(out.square().sum(), prob) if backward else ()))

        return run

    return make


def levels(values: Tensor, image: Tensor) -> Tensor:
    """SciPy's tree, and a pass up and one down with an eager step for each level of the tree."""
    weight = reference.edge_weights(image, torch.float32)
    order, parent, edge = reference.trees(weight, *values.shape[2:])
    decay = reference.decays(weight, edge, SIGMA)
    out = []
    for b in range(values.shape[0]):
        v = values[b].float().flatten(1)[:, order[b]]
        total = torch.cat([v, torch.ones_like(v[:1])])
        # Places of a level stand together: parents come in the order of their own level.
        starts = [0, 1]
        while starts[-1] < len(order[b]):
            starts.append(int(torch.searchsorted(parent[b][1:].contiguous(), starts[-1])) + 1)
        spans = [slice(i, j) for i, j in pairwise(starts)][1:]
        for span in reversed(spans):
            total = total.index_add(1, parent[b, span], decay[b, span] * total[:, span])
        parts = [total[:, :1]]
        for above, span in zip([slice(0, 1), *spans], spans, strict=False):
            s = decay[b, span]
            parts.append(s * parts[-1][:, parent[b, span] - above.start] + (1 - s * s) * total[:, span])
        full = torch.cat(parts, 1)
        out.append(torch.zeros_like(v).index_copy(1, order[b], full[:-1] / full[-1]))
    return torch.stack(out).view(values.shape)


def on_backend(name: str) -> Filter:
    """The reference: SciPy's tree, and paths of doubled length in eager PyTorch."""

    def run(values: Tensor, image: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.tree_filter(values, image, sigma=SIGMA)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Float32 sums over paths in another order; half precision: one rounding of each gradient.
    tolerance = 1e-4 if case.dtype == "float32" else 1e-2
    made = [
        Provider("scipy, eager doubling", run_of(on_backend("reference"))),
        Provider("scipy, eager levels", run_of(levels), "scipy, eager doubling", tolerance),
    ]
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(on_backend(name)), "scipy, eager doubling", tolerance))
    return made
