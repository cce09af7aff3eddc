"""bilateral_filter: exact sums over all pairs of pixels, as the dense CRF losses need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "bilateral_filter"
SIZES = ({"B": 1, "C": 21, "H": 128, "W": 128},)
GPU_SIZES = tuple({**size, "B": 16} for size in SIZES)
# Of the losses at half size: sigma_xy 100 * 0.5.
SIGMA_XY, SIGMA_RGB = 50.0, 15.0
Filter = Callable[[Tensor, Tensor], Tensor]


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """For each of N^2 pairs: five differences, squares and their sums (10 FLOP and the exponent's 3), one exp, and 2 C
    FLOP of the product; the backward pass is the same once more. Traffic: values and image read, result written."""
    made = []
    for size in sizes:
        batch, channels, pixels = size["B"], size["C"], size["H"] * size["W"]
        pairs = float(batch * pixels * pixels)
        for dtype in dtypes:
            traffic = batch * pixels * (2 * channels * getattr(torch, dtype).itemsize + 3)
            for pass_, times in (("forward", 1), ("forward+backward", 2)):
                flops = times * pairs * (13 + 2 * channels)
                made.append(Case(OP, size, dtype, pass_, flops, times * pairs, times * traffic))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random probabilities and a smooth image with noise."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = (case.size[key] for key in "BCHW")
    values = torch.randn(batch, channels, height, width, generator=generator).softmax(1)
    rough = torch.rand(batch, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear", align_corners=True)
    noise = torch.randint(0, 16, smooth.shape, generator=generator)
    image = (239 * smooth + noise).to(torch.uint8)
    return values.to(device, case.torch_dtype), image.to(device)


def features(image: Tensor) -> Tensor:
    """(B, N, 5), such that K_ij = exp(-|f_i - f_j|^2)."""
    batch, _, height, width = image.shape
    y, x = torch.meshgrid(*(torch.arange(side, device=image.device) for side in (height, width)), indexing="ij")
    position = torch.stack([y, x]).flatten(1).expand(batch, -1, -1) / SIGMA_XY
    return torch.cat([position, image.flatten(2) / SIGMA_RGB], 1).mT.contiguous() * math.sqrt(0.5)


def chunk(block: Tensor, f: Tensor, squares: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """Rows of K values: the exponent as an inner product; `own` are the columns of the pairs (i, i)."""
    exponent = torch.baddbmm(squares[:, None, :], block, f.mT, beta=-1, alpha=2)
    kernel = exponent.sub_(block.square().sum(2, keepdim=True)).exp_()
    kernel[:, torch.arange(block.shape[1], device=block.device), own] = 0
    return torch.bmm(kernel, values)


def chunked(run_chunk: Callable[..., Tensor], rows: int) -> Filter:
    """The filter in chunks of rows that fit a cache, as one would write it in PyTorch; its own gradient."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values: Tensor, image: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(image)
            f, flat = features(image), values.flatten(2).mT.float()
            squares = f.square().sum(2)
            out = [
                run_chunk(f[:, i : i + rows], f, squares, flat, torch.arange(i, i + len(f[0, i : i + rows])))
                for i in range(0, f.shape[1], rows)
            ]
            return torch.cat(out, 1).mT.reshape(values.shape).to(values.dtype)

        @staticmethod
        def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
            return Chunked.apply(gradient, *ctx.saved_tensors), None

    return Chunked.apply


def keops(values: Tensor, image: Tensor) -> Tensor:
    """Its C++ is compiled at the first call."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    f, flat = features(image), values.flatten(2).mT.contiguous()
    kernel = (-((LazyTensor(f[:, :, None]) - LazyTensor(f[:, None])) ** 2).sum(-1)).exp()
    filtered = kernel @ flat - flat
    return filtered.mT.reshape(values.shape)


def on_backend(name: str) -> Filter:
    def run(values: Tensor, image: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.bilateral_filter(values, image, sigma_xy=SIGMA_XY, sigma_rgb=SIGMA_RGB)

    return run


def run_of(function: Filter, warm: bool = False) -> Callable[[Case, torch.device], Run]:
    """With `warm`, what the first call does (compilation) is done before."""

    def make(case: Case, device: torch.device) -> Run:
        values, image = inputs(case, device)
        backward = case.pass_ != "forward"
        values.requires_grad_(backward)
        gradient = torch.ones_like(values)

        def run() -> Sequence[Tensor]:
            out = function(values, image)
            return (out, *(torch.autograd.grad(out, values, gradient) if backward else ()))

        if warm:
            run()
        return run

    return make


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Float32 squares of colours up to 17 standard deviations: an inner product loses 3e-5 of an exponent. Half
    # precision: one rounding of each weight and result.
    tolerance = 1e-4 if case.dtype == "float32" else 1e-2
    rows = 128 if device.type == "cpu" else 4096
    made = [Provider("chunked eager", run_of(chunked(chunk, rows)))]
    made.append(
        Provider("compiled eager", run_of(chunked(compiled(chunk), rows), warm=True), "chunked eager", tolerance)
    )
    if case.dtype == "float32":
        made.append(Provider("pykeops", run_of(keops), "chunked eager", tolerance))
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(on_backend(name)), "chunked eager", tolerance))
    return made
