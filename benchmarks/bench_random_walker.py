"""random_walker: scribbles carried over a photograph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run
from benchmarks.photograph import photograph

OP = "random_walker"
# The crop of the training recipe, and the cells of four pixels that `cc4s run method=rawks` walks on; four classes have
# a scribble.
SIZES = ({"B": 1, "C": 21, "H": 117, "W": 117}, {"B": 1, "C": 21, "H": 465, "W": 465})
GPU_SIZES = tuple({**size, "B": 16} for size in SIZES)
BETA = 130.0
SCRIBBLED = 4


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """Least traffic: three values and a seed of a pixel read, the probabilities written; backward the same once more.

    What an iteration does depends on the image, and so does their number: no count of operations.
    """
    made = []
    for size in sizes:
        pixels = size["B"] * size["H"] * size["W"]
        for dtype in dtypes:
            item = getattr(torch, dtype).itemsize
            moved = pixels * (3 * item + 1 + 4 * size["C"])
            made.append(Case(OP, size, dtype, "forward", 0, 0, moved))
            made.append(Case(OP, size, dtype, "forward+backward", 0, 0, 2 * moved))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """A photograph in [0, 1], and a stroke of each class along a row."""
    batch, height, width = (case.size[key] for key in "BHW")
    image = photograph(batch, height, width).to(case.torch_dtype) / 255
    seeds = torch.full((batch, height, width), 255, dtype=torch.uint8)
    for label in range(SCRIBBLED):
        row = (2 * label + 1) * height // (2 * SCRIBBLED)
        seeds[:, row, width // 4 + 3 * label : width // 2 + 3 * label + 1] = label
    return image.to(device), seeds.to(device)


def on_backend(name: str) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        image, seeds = inputs(case, device)
        backward = case.pass_ != "forward"
        image.requires_grad_(backward)

        def run() -> Sequence[Tensor]:
            with ck.use_backend(name):
                prob = ck.random_walker(image, seeds, case.size["C"], beta=BETA)
            return (prob.detach(), *(torch.autograd.grad(prob.square().sum(), image) if backward else ()))

        return run

    return make


def scikit_image(mode: str) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        from skimage.segmentation import random_walker

        images, seeds = inputs(case, torch.device("cpu"))
        arrays = images.permute(0, 2, 3, 1).double().numpy()
        labels = np.where(seeds.numpy() == 255, 0, seeds.numpy().astype(np.int64) + 1)

        def run() -> Sequence[Tensor]:
            prob = torch.zeros(case.size["B"], case.size["C"], case.size["H"], case.size["W"])
            for b, (image, label) in enumerate(zip(arrays, labels, strict=True)):
                found = random_walker(image, label, beta=BETA, mode=mode, channel_axis=-1, return_full_prob=True)
                prob[b, :SCRIBBLED] = torch.from_numpy(found)
            return (prob,)

        return run

    return make


def _has_pyamg() -> bool:
    from importlib.util import find_spec

    return find_spec("pyamg") is not None


def providers(case: Case, device: torch.device) -> list[Provider]:
    made = [Provider("reference", on_backend("reference"))]
    for name in ck.backends.available(OP):
        if name != "reference":
            # Weights in float32: an error of their exponents times eps, in places amplified by weights near 0.
            made.append(Provider(f"cc4s {name}", on_backend(name), "reference", 1e-4))
    if case.pass_ == "forward" and device.type == "cpu":
        # The direct solver is as exact; the iterative ones stop early (a residual of 1e-3) and are not compared.
        made.append(Provider("scikit-image bf", scikit_image("bf"), "reference", 1e-3))
        for mode in ("cg_j", *(("cg_mg",) if _has_pyamg() else ())):
            made.append(Provider(f"scikit-image {mode}", scikit_image(mode), note="stops at a residual of 1e-3"))
    return made
