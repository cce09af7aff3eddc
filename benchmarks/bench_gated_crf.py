"""gated_crf: energy of soft labels in windows of 11 x 11 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import unfold

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "gated_crf"
# Above it, the unfolded copies of the authors' release need more memory than most machines have.
SIZES = ({"B": 1, "C": 21, "H": 321, "W": 321},)
GPU_SIZES = tuple({**size, "B": 8} for size in SIZES)
RADIUS, SIGMA_XY, SIGMA_RGB = 5, 6.0, 0.1
Energy = Callable[[Tensor, Tensor], Tensor]


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """For each pair of pixels: 3 differences, squares and sums of colours, a product and a sum for each class, an
    exponential. Backward the same weight for both ends, and a product and a sum for each class of both.

    Traffic: probabilities and image read; backward the same once more, and the gradient written.
    """
    made = []
    for size in sizes:
        height, width = size["H"], size["W"]
        pairs = size["B"] * sum(
            max(height - dy, 0) * max(width - abs(dx), 0)
            for dy in range(RADIUS + 1)
            for dx in range(-RADIUS, RADIUS + 1)
            if (dy, dx) > (0, 0)
        )
        pixels = size["B"] * height * width
        for dtype in dtypes:
            prob = pixels * size["C"] * getattr(torch, dtype).itemsize
            read = prob + pixels * 3
            forward, backward = (9 + 2 * size["C"]) * pairs, (9 + 4 * size["C"]) * pairs
            made.append(Case(OP, size, dtype, "forward", forward, pairs, read))
            made.append(Case(OP, size, dtype, "forward+backward", forward + backward, 2 * pairs, 2 * read + prob))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random probabilities, and a noisy image of smooth colours."""
    generator = torch.Generator().manual_seed(0)
    size = case.size
    shape = (size["H"], size["W"])
    prob = torch.randn(size["B"], size["C"], *shape, generator=generator).softmax(1)
    ramp = torch.linspace(0, 180, shape[1]).expand(size["B"], 3, *shape)
    image = ramp + torch.randint(0, 60, ramp.shape, generator=generator)
    return prob.to(device, case.torch_dtype), image.to(device, torch.uint8)


def run_of(energy: Energy, warm: bool = False) -> Callable[[Case, torch.device], Run]:
    """With `warm`, what the first call does (compilation) is done before."""

    def make(case: Case, device: torch.device) -> Run:
        prob, image = inputs(case, device)
        backward = case.pass_ != "forward"
        prob.requires_grad_(backward)

        def run() -> Sequence[Tensor]:
            value = energy(prob, image)
            return (value, *(torch.autograd.grad(value.sum(), prob) if backward else ()))

        if warm:
            run()
        return run

    return make


def unfolded(prob: Tensor, image: Tensor) -> Tensor:
    """As the authors' release computes it: all windows of probabilities, features and source mask as copies."""
    batch, classes, height, width = prob.shape
    side = 2 * RADIUS + 1

    def windows(x: Tensor) -> Tensor:
        return unfold(x, side, 1, RADIUS).view(batch, -1, side, side, height, width)

    y, x = (torch.arange(n, device=prob.device, dtype=torch.float32) / SIGMA_XY for n in (height, width))
    mesh = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, -1, -1, -1)
    features = torch.cat([mesh, image.float() / (255 * SIGMA_RGB)], 1)
    kernels = (-0.5 * (windows(features) - features[:, :, None, None]) ** 2).sum(1, keepdim=True).exp()
    kernels[:, :, RADIUS, RADIUS] = 0
    # Without it, zeros around the image would count as black pixels.
    kernels = kernels * windows(torch.ones_like(mesh[:, :1]))
    prob = prob.float()
    product = (kernels * windows(prob)).view(batch, classes, side**2, height, width).sum(2)
    return (kernels.sum((1, 2, 3, 4, 5)) - (product * prob).sum((1, 2, 3))) / (height * width)


def on_backend(name: str) -> Energy:
    """The reference is eager PyTorch: a loop over the 60 shifts of the window."""

    def run(prob: Tensor, image: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.gated_crf(prob, image, radius=RADIUS, sigma_xy=SIGMA_XY, sigma_rgb=SIGMA_RGB)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Float32 sums of 120 terms in another order; half precision: one rounding of each gradient.
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    definition = "eager shifts"
    made = [
        Provider(definition, run_of(on_backend("reference"))),
        Provider("eager unfold", run_of(unfolded), definition, tolerance),
        Provider("compiled eager unfold", run_of(compiled(unfolded), warm=True), definition, tolerance),
        Provider("compiled eager shifts", run_of(compiled(on_backend("reference")), warm=True), definition, tolerance),
    ]
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(on_backend(name)), definition, tolerance))
    return made
