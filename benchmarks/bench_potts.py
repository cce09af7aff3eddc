"""potts: the energy of soft labels on the pixels of a crop and on its superpixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "potts"
# The crop of the training recipe, 8-connected, and its superpixels (K), as the colour constraint has them.
SIZES = ({"B": 1, "C": 21, "H": 465, "W": 465}, {"B": 1, "C": 21, "K": 800})
GPU_SIZES = tuple({**size, "B": 16} for size in SIZES)
Energy = Callable[[Tensor, ck.PixelGrid | ck.SuperpixelGraph], Tensor]


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """Of the quadratic relaxation, for each class of a pair: a difference, its square and a sum forward; the
    difference, its product with the weight and two sums backward.

    Traffic: probabilities and weights (and edges) read; backward the same once more, and the gradient written.
    """
    made = []
    for size in sizes:
        batch, classes = size["B"], size["C"]
        if "K" in size:
            # Of a planar graph whose faces are triangles.
            pairs = batch * max(size["K"] - 1, 3 * size["K"] - 6)
            entries, pair_bytes = batch * size["K"] * classes, 4 + 16
        else:
            height, width = size["H"], size["W"]
            pairs = batch * (height * (width - 1) + (height - 1) * width + 2 * (height - 1) * (width - 1))
            entries, pair_bytes = batch * height * width * classes, 4
        for dtype in dtypes:
            prob = entries * getattr(torch, dtype).itemsize
            read = prob + pairs * pair_bytes
            made.append(Case(OP, size, dtype, "forward", 3 * classes * pairs, 0, read))
            made.append(Case(OP, size, dtype, "forward+backward", 7 * classes * pairs, 0, 2 * read + prob))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ck.PixelGrid | ck.SuperpixelGraph]:
    """Random probabilities; a grid with the colour weights of a noisy image, or a graph as large as a planar one."""
    generator = torch.Generator().manual_seed(0)
    size = case.size
    batch, classes = size["B"], size["C"]
    where: ck.PixelGrid | ck.SuperpixelGraph
    if "K" in size:
        prob = torch.randn(batch, size["K"], classes, generator=generator).softmax(2)
        where = superpixel_graph(batch, size["K"], generator)
        where = where._replace(**{name: getattr(where, name).to(device) for name in ("edge_index", "weight")})
    else:
        prob = torch.randn(batch, classes, size["H"], size["W"], generator=generator).softmax(1)
        image = torch.randint(0, 64, (batch, 3, size["H"], size["W"]), generator=generator, dtype=torch.uint8)
        where = ck.gaussian_grid(image.to(device))
    return prob.to(device, case.torch_dtype), where


def superpixel_graph(batch: int, nodes: int, generator: torch.Generator) -> ck.SuperpixelGraph:
    """As many edges as a planar graph has, each to one of the next 40 nodes, sorted as those of `color_affinity`."""
    number = max(nodes - 1, 3 * nodes - 6)
    pairs = torch.combinations(torch.arange(nodes))
    pairs = pairs[pairs[:, 1] - pairs[:, 0] <= 40]
    kept = torch.randperm(len(pairs), generator=generator)[:number].sort().values
    edges = torch.zeros(2, number, dtype=torch.int64)
    edges[:, : len(kept)] = pairs[kept].T
    weight = torch.rand(batch, number, generator=generator)
    weight[:, len(kept) :] = 0
    return ck.SuperpixelGraph(
        edges.expand(batch, -1, -1).contiguous(),
        weight,
        nodes,
        torch.full((batch,), len(kept)),
        torch.ones(batch, nodes, dtype=torch.int64),
    )


def run_of(energy: Energy, warm: bool = False) -> Callable[[Case, torch.device], Run]:
    """With `warm`, what the first call does (compilation) is done before."""

    def make(case: Case, device: torch.device) -> Run:
        prob, where = inputs(case, device)
        backward = case.pass_ != "forward"
        prob.requires_grad_(backward)

        def run() -> Sequence[Tensor]:
            value = energy(prob, where)
            return (value, *(torch.autograd.grad(value.sum(), prob) if backward else ()))

        if warm:
            run()
        return run

    return make


def on_backend(name: str, relaxation: str) -> Energy:
    """The reference is eager PyTorch: gathers of both ends of all edges, shifted views of the grid."""

    def run(prob: Tensor, where: ck.PixelGrid | ck.SuperpixelGraph) -> Tensor:
        with ck.use_backend(name):
            return ck.potts(prob, where, relaxation=relaxation)

    return run


def compiled_eager(relaxation: str) -> Energy:
    from cc4s_kernels.ops.potts import reference

    def eager(prob: Tensor, *parts: Tensor) -> Tensor:
        if len(parts) == 1:
            return reference.potts(prob, ck.PixelGrid(*parts), relaxation=relaxation)
        weight, edges = parts
        graph = ck.SuperpixelGraph(edges, weight, prob.shape[1], edges[:, 0, 0], edges[:, 0])
        return reference.potts(prob, graph, relaxation=relaxation)

    fast = compiled(eager)

    def run(prob: Tensor, where: ck.PixelGrid | ck.SuperpixelGraph) -> Tensor:
        parts = (where.weight, where.edge_index) if isinstance(where, ck.SuperpixelGraph) else (where.weight,)
        return fast(prob, *parts)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Float32 sums of up to 20 million terms in another order; half precision: one rounding of each gradient.
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    made = []
    for relaxation in ("quadratic", "collision_divergence"):
        note = "" if relaxation == "quadratic" else f", {relaxation}"
        eager = f"eager{note}"
        made.append(Provider(eager, run_of(on_backend("reference", relaxation))))
        if relaxation == "quadratic":
            made.append(Provider("compiled eager", run_of(compiled_eager(relaxation), warm=True), eager, tolerance))
        for name in ck.backends.available(OP):
            if name != "reference":
                made.append(Provider(f"cc4s {name}{note}", run_of(on_backend(name, relaxation)), eager, tolerance))
    return made
