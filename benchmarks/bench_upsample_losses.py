"""upsample_losses: cross-entropy, entropy and superpixel sums of upsampled logits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "upsample_losses"
_CROP = {"B": 2, "C": 21, "h": 59, "w": 59, "H": 465, "W": 465}
# The published crop, with superpixels and without.
SIZES = ({**_CROP, "K": 800}, {**_CROP, "K": 0})
GPU_SIZES = tuple({**size, "B": 16} for size in SIZES)
GPU_DTYPES = ("float32", "bfloat16")
LABELLED = 0.03

# Cross-entropy and entropy summed over the batch, and the sums of superpixels (B, K, C) where there are any.
Losses = tuple[Tensor, ...]
Function = Callable[[Tensor, Tensor, Tensor | None], Losses]


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """Operations for each pixel and class, of a pass that writes nothing in between.

    Forward 12: interpolation (7), maximum, difference, and the sums of e^d and e^d d (3); with superpixels 2 more.
    Backward 24: the same again, p (base - slope d) - [label] (4), and the four corners (8); with superpixels 3 more.
    One exponential in each pass.
    """
    made = []
    for size in sizes:
        pixels = size["B"] * size["H"] * size["W"]
        low = size["B"] * size["C"] * size["h"] * size["w"]
        pooled = 4 * size["B"] * size["K"] * size["C"]
        work = pixels * size["C"]
        for dtype in dtypes:
            width = getattr(torch, dtype).itemsize
            # Logits, uint8 labels and int32 ids read, sums written; then the same read, and the gradient written.
            read = low * width + pixels * (5 if size["K"] else 1) + pooled
            forward, backward = (14.0, 27.0) if size["K"] else (12.0, 24.0)
            made.append(Case(OP, size, dtype, "forward", forward * work, work, read))
            both = (forward + backward) * work
            made.append(Case(OP, size, dtype, "forward+backward", both, 2 * work, 2 * read + low * width))
    return made


@lru_cache
def maps(batch: int, classes: int, size: tuple[int, int], count: int) -> tuple[Tensor, Tensor | None]:
    """Labels (B, H, W) uint8 on 3 % of the pixels, and the superpixels of a textured image, int32, or None."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (batch, *size), generator=generator, dtype=torch.uint8)
    labels = labels.where(torch.rand(labels.shape, generator=generator) < LABELLED, 255)
    if not count:
        return labels, None
    blobs = F.interpolate(torch.rand(batch, 3, 9, 9, generator=generator), size, mode="bicubic")
    texture = 0.1 * torch.randn(batch, 3, *size, generator=generator)
    image = ((blobs + texture).clamp(0, 1) * 255).to(torch.uint8)
    return labels, ck.slic(image, count)


def eager(logits: Tensor, labels: Tensor, ids: Tensor | None, count: int) -> Losses:
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    cross_entropy = F.cross_entropy(full, labels, ignore_index=255, reduction="sum")
    log_prob = full.log_softmax(1)
    return cross_entropy, *entropy_and_pool(log_prob, ids, count)


def eager_shared(logits: Tensor, labels: Tensor, ids: Tensor | None, count: int) -> Losses:
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    log_prob = full.log_softmax(1)
    cross_entropy = F.nll_loss(log_prob, labels, ignore_index=255, reduction="sum")
    return cross_entropy, *entropy_and_pool(log_prob, ids, count)


def entropy_and_pool(log_prob: Tensor, ids: Tensor | None, count: int) -> Losses:
    prob = log_prob.exp()
    entropy = -(prob * log_prob).sum()
    if ids is None:
        return (entropy,)
    index = ids.flatten(1)[:, None].expand(-1, prob.shape[1], -1)  # [B, C, HW]
    pooled = prob.new_zeros(*prob.shape[:2], count).scatter_add(2, index, prob.flatten(2))
    return entropy, pooled.mT


def eager_torch_scatter(logits: Tensor, labels: Tensor, ids: Tensor | None, count: int) -> Losses:
    """The sums of superpixels by torch_scatter instead of torch's own scatter_add."""
    from torch_scatter import scatter

    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    log_prob = full.log_softmax(1)
    cross_entropy = F.nll_loss(log_prob, labels, ignore_index=255, reduction="sum")
    prob = log_prob.exp()
    assert ids is not None
    index = ids.flatten(1)[:, None].expand(-1, prob.shape[1], -1)  # [B, C, HW]
    pooled = scatter(prob.flatten(2), index, dim=2, dim_size=count)
    return cross_entropy, -(prob * log_prob).sum(), pooled.mT


def fused(name: str) -> Callable[..., Losses]:
    def run(logits: Tensor, labels: Tensor, ids: Tensor | None, count: int) -> Losses:
        with ck.use_backend(name):
            out = ck.upsample_losses(logits, labels, superpixels=ids, num_superpixels=count if count else None)
        losses = (out.cross_entropy.sum(), out.entropy.sum())
        return losses if ids is None else (*losses, out.pooled)

    return run


def run_of(function: Callable[..., Losses], wide: bool = True) -> Callable[[Case, torch.device], Run]:
    """`wide`: with int64 labels and ids, as torch takes them; made beforehand."""

    def make(case: Case, device: torch.device) -> Run:
        size = case.size
        generator = torch.Generator().manual_seed(1)
        shape = (size["B"], size["C"], size["h"], size["w"])
        logits = (2 * torch.randn(shape, generator=generator)).to(device, case.torch_dtype)
        labels, ids = (
            None if t is None else t.to(device) for t in maps(size["B"], size["C"], (size["H"], size["W"]), size["K"])
        )
        assert labels is not None
        if wide:
            labels, ids = labels.long(), None if ids is None else ids.long()
        if case.pass_ == "forward":
            return torch.no_grad()(lambda: function(logits, labels, ids, size["K"]))
        given = torch.randn(size["B"], size["K"], size["C"], generator=generator).to(device, case.torch_dtype)
        leaf = logits.requires_grad_()

        def run() -> Sequence[Tensor]:
            losses = function(leaf, labels, ids, size["K"])
            one = torch.ones_like(losses[0])
            return *losses, *torch.autograd.grad(losses, leaf, (one, one, given)[: len(losses)])

        return run

    return make


def providers(case: Case, device: torch.device) -> list[Provider]:
    # float32: sums of 4e5 pixels and gradients of some 100. Half precision: eager rounds every intermediate.
    tolerance = 1e-4 if case.dtype == "float32" else 3e-2
    made = [Provider("eager", run_of(eager))]
    made.append(Provider("eager, one log_softmax", run_of(eager_shared), "eager", tolerance))
    if case.size["K"]:
        made.append(Provider("eager, torch_scatter", run_of(eager_torch_scatter), "eager", tolerance))
    made.append(Provider("compiled eager", run_of(compiled(eager_shared)), "eager", tolerance))
    for name in ck.backends.available(OP):
        if name != "reference":
            made.append(Provider(f"cc4s {name}", run_of(fused(name), wide=False), "eager", tolerance))
    return made
