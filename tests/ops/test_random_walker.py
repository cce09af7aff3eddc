"""`random_walker` against dense linear algebra, chains of resistors and scikit-image."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from cc4s_kernels.ops.random_walker import reference
from tests.ops.tester import Inputs, OpTester, assert_matches, backend_params, eps, generator, randn
from tests.peak_memory import printed_by

CLASSES = 3
every_backend = pytest.mark.parametrize(("backend", "device"), backend_params("random_walker"))
needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")


def dense_walker(weight: np.ndarray, seeds: np.ndarray, num_classes: int) -> np.ndarray:
    """Grady's linear system of one image with a dense Laplacian: weight (2, H, W), seeds (H, W) with -1 = none."""
    height, width = seeds.shape
    number = np.arange(height * width).reshape(height, width)
    laplacian = np.zeros((height * width,) * 2)
    for y in range(height):
        for x in range(width):
            for d, (v, u) in enumerate([(y, x + 1), (y + 1, x)]):
                if v < height and u < width:
                    i, j, w = number[y, x], number[v, u], weight[d, y, x]
                    laplacian[i, j] = laplacian[j, i] = -w
                    laplacian[i, i] += w
                    laplacian[j, j] += w
    flat = seeds.ravel()
    known = flat >= 0
    joined = known.copy()
    # As many steps as the longest path has.
    for _ in range(height * width):
        joined |= (laplacian[:, joined] != 0).any(1)
    prob = np.zeros((num_classes, height * width))
    prob[flat[known], np.flatnonzero(known)] = 1
    free = joined & ~known
    if free.any():
        system, right = laplacian[np.ix_(free, free)], -laplacian[np.ix_(free, known)] @ prob[:, known].T
        prob[:, free] = np.linalg.solve(system, right).T
    return prob.reshape(num_classes, height, width)


def naive_weights(image: np.ndarray, beta: float, mask: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (2, H, W), pixel by pixel."""
    channels, height, width = image.shape
    spread = image[:, mask].std() if mask.any() else 0.0
    weight = np.zeros((2, height, width))
    for y in range(height):
        for x in range(width):
            for d, (v, u) in enumerate([(y, x + 1), (y + 1, x)]):
                if v < height and u < width and mask[y, x] and mask[v, u]:
                    square = ((image[:, y, x] - image[:, v, u]) ** 2).sum()
                    factor = beta / (10 * spread * channels**0.5) if spread > 0 else 1.0
                    weight[d, y, x] = np.exp(-factor * square) + 1e-10
    return weight


def random_seeds(batch: int, size: int, seed: int) -> Tensor:
    """A tenth of the pixels (size, size + 1), at least one in each image; uint8 with 255 = none."""
    random = generator(seed)
    classes = torch.randint(0, CLASSES, (batch, size, size + 1), generator=random)
    seeds = classes.where(torch.rand(classes.shape, generator=random) < 0.1, 255).to(torch.uint8)
    if size:
        seeds[:, size // 2, size // 3] = torch.arange(batch, dtype=torch.uint8) % CLASSES
        seeds[:, 0, -1] = (torch.arange(batch, dtype=torch.uint8) + 1) % CLASSES
    return seeds


class TestRandomWalker(OpTester):
    op_name = "random_walker"
    sizes = (1, 7, 13)
    gradcheck_size = 3
    differentiable = (0,)
    variants: ClassVar = {"default": {}, "gentle": {"beta": 5.0}}
    representatives = ("default",)
    # Systems of up to 240 unknowns, solved until a Jacobi step changes 1e-14.
    value_tolerance = 1e-8
    # A weight is exp of up to some tens, and the solution has sums of their quotients.
    low_precision_slack = 128.0

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 3)
        # Weights down to some 1e-8, in noise: harder than a photograph.
        image = randn(batch, 2, size, size + 1, dtype=torch.float64, device=device, seed=seed, scale=0.1)
        return (image.to(dtype), random_seeds(batch, size, seed).to(device), CLASSES), {}

    def naive(
        self, image: Tensor, seeds: Tensor, num_classes: int, beta: float = 130.0, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        inside = torch.ones(seeds.shape, dtype=torch.bool) if mask is None else mask
        known = seeds.long().where((seeds != 255) & inside, -1)
        made = [
            dense_walker(naive_weights(i.numpy(), beta, m.numpy()), s.numpy(), num_classes)
            for i, s, m in zip(image, known, inside, strict=True)
        ]
        shape = (len(seeds), num_classes, *seeds.shape[1:])
        return (torch.from_numpy(np.stack(made)) if made else torch.zeros(shape, dtype=torch.float64),)


@every_backend
@pytest.mark.parametrize("size", [1, 9])
def test_parts(backend: str, device: str, size: int) -> None:
    """Inside a mask that cuts the images into regions, some of them without a seed."""
    tester = TestRandomWalker()
    args, _ = tester.make_inputs(torch.float64, device, size, 0)
    mask = torch.rand(args[1].shape, generator=generator(1)) < 0.65
    with ck.use_backend(backend):
        prob = ck.random_walker(*args, mask=mask.to(device))
    (expected,) = tester.naive(args[0].cpu(), args[1].cpu(), CLASSES, mask=mask)
    assert (expected.sum(1) == 0).any()
    assert_matches("prob", prob, expected, atol=1e-8)


@every_backend
def test_chain_of_resistors(backend: str, device: str) -> None:
    """Between two seeds, the probability falls in proportion to the resistances 1 / w; so does its gradient."""
    weight = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64, device=device)
    seeds = torch.full((1, 1, 5), 255, dtype=torch.int64, device=device)
    seeds[0, 0, 0], seeds[0, 0, 4] = 1, 0
    for axis in (0, 1):
        w = weight.clone().requires_grad_()
        full = torch.zeros(1, 2, 1, 5, dtype=torch.float64, device=device)
        full = torch.cat([full[:, :1, :, :4] + w, full[:, :1, :, :1]], 3)
        full = torch.cat([full, torch.zeros_like(full)], 1)
        turned = full.flip(1).transpose(2, 3) if axis else full
        with ck.use_backend(backend):
            prob = ck.random_walker(ck.PixelGrid(turned), seeds.transpose(1, 2) if axis else seeds, 2)
        found = prob.flatten(2)[0, 1]
        resistance = 1 / w
        total = resistance.sum()
        expected = torch.cat([total.new_ones(1), 1 - resistance.cumsum(0) / total])
        assert_matches("prob", found, expected, atol=1e-12)
        factors = torch.tensor([0.3, -1.0, 0.7, 2.0, 0.1], dtype=torch.float64, device=device)
        (gradient,) = torch.autograd.grad((found * factors).sum(), w, retain_graph=True)
        (wanted,) = torch.autograd.grad((expected * factors).sum(), w)
        assert_matches("gradient", gradient, wanted, atol=1e-10, rtol=1e-10)


def photograph(channels: int, side: int = 48) -> np.ndarray:
    """(side, side[, 3]) uint8."""
    from skimage import data

    image = data.astronaut()[:384, :384]
    image = image[:: 384 // side, :: 384 // side]
    return image if channels == 3 else image[..., 0].copy()


def strokes(side: int = 48) -> np.ndarray:
    """(side, side) with 255 = none, in four classes of which one has no seed."""
    seeds = np.full((side, side), 255, np.uint8)
    seeds[5, 4:20] = 0
    seeds[20:40, 25] = 1
    seeds[44, 2:12] = 3
    seeds[3:12, 44] = 0
    return seeds


@every_backend
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [130.0, 20.0])
def test_equals_scikit_image(backend: str, device: str, channels: int, dtype: torch.dtype, beta: float) -> None:
    from skimage.segmentation import random_walker

    image, seeds = photograph(channels), strokes()
    planes = torch.from_numpy(image if channels == 3 else image[..., None]).permute(2, 0, 1)[None].to(device)
    if dtype != torch.uint8:
        planes = planes.to(dtype) / 255
        image = image / 255
    labels = np.where(seeds == 255, 0, seeds.astype(int) + 1)
    # Its direct solver: the iterative ones stop at a residual of 1e-3, which is an error of a tenth here.
    expected = random_walker(
        image, labels, beta=beta, mode="bf", channel_axis=-1 if channels == 3 else None, return_full_prob=True
    )
    with ck.use_backend(backend):
        prob = ck.random_walker(planes, torch.from_numpy(seeds)[None].to(device), 4, beta=beta)[0].cpu()
    assert not prob[2].any()
    # Residuals of 1e-14 through a system with weights down to 1e-9; in float32 the weights have an error of
    # exponents of up to 40 times eps, and here and there a seed is reached through such edges only.
    bound = 1e-6 if dtype == torch.float64 else 1e-4
    assert_matches("prob", prob[[0, 1, 3]], torch.from_numpy(expected), atol=bound)


@every_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9))
def test_properties(backend: str, device: str, seed: int, height: int, width: int) -> None:
    """In [0, 1], one-hot at seeds, sums to 1; a mirrored image, renamed classes and padding change nothing else."""
    random = generator(seed)
    image = torch.rand(1, 2, height, width, generator=random, dtype=torch.float64)
    seeds = torch.randint(0, CLASSES, (1, height, width), generator=random)
    seeds = seeds.where(torch.rand(seeds.shape, generator=random) < 0.3, 255)
    seeds[0, height // 2, width // 2] = 1
    image, seeds = image.to(device), seeds.to(device)

    def walk(*args: Any, **kwargs: Any) -> Tensor:
        with ck.use_backend(backend):
            return ck.random_walker(*args, CLASSES, **kwargs)

    prob = walk(image, seeds)
    assert float(prob.min()) >= 0
    assert float(prob.max()) <= 1
    # Residuals of 1e-14 over weights of 1e-10 at worst, in systems of up to 80 unknowns.
    assert_matches("sum", prob.sum(1), torch.ones_like(prob[:, 0]), atol=1e-7)
    known = seeds != 255
    one_hot = torch.nn.functional.one_hot(seeds.where(known, 0), CLASSES).permute(0, 3, 1, 2).double()
    assert torch.equal(prob.where(known[:, None], 0), one_hot.where(known[:, None], 0))
    assert_matches("flip", walk(image.flip(3), seeds.flip(2)).flip(3), prob, atol=1e-7)
    renamed = seeds.where(~known, (seeds + 1) % CLASSES)
    assert_matches("classes", walk(image, renamed).roll(-1, 1), prob, atol=1e-7)
    pad = torch.nn.functional.pad
    inside = pad(torch.ones_like(seeds, dtype=torch.bool), (1, 2, 0, 3))
    # Seeds and colours of the padding do not count.
    padded = walk(pad(image, (1, 2, 0, 3), value=7.0), pad(seeds, (1, 2, 0, 3), value=2), mask=inside)
    assert not padded.where(~inside[:, None], 0).any()
    assert_matches("padding", padded[..., :height, 1 : 1 + width], prob, atol=1e-7)


@every_backend
def test_without_a_seed(backend: str, device: str) -> None:
    image = torch.rand(2, 3, 5, 6, generator=generator(0)).to(device).requires_grad_()
    seeds = torch.full((2, 5, 6), 255, dtype=torch.uint8, device=device)
    seeds[1, 2, 2], seeds[1, 4, 4] = 0, 1
    with ck.use_backend(backend):
        prob = ck.random_walker(image, seeds, CLASSES)
        prob.square().sum().backward()
    assert not prob[0].any()
    assert_matches("sum", prob[1].sum(0), torch.ones(5, 6), atol=1e-6)
    assert image.grad is not None
    assert not image.grad[0].any()
    assert image.grad[1].any()
    assert torch.isfinite(image.grad).all()


@every_backend
def test_constant_image(backend: str, device: str) -> None:
    """Equal weights, and no gradient."""
    image = torch.full((1, 3, 4, 5), 0.2, device=device, requires_grad=True)
    seeds = torch.full((1, 4, 5), 255, device=device)
    seeds[0, 0, 0], seeds[0, 3, 4] = 0, 1
    with ck.use_backend(backend):
        prob = ck.random_walker(image, seeds, 2)
        (prob[0, 0] ** 2).sum().backward()
    expected = dense_walker(np.ones((2, 4, 5)), seeds[0].cpu().where(seeds[0].cpu() != 255, -1).numpy(), 2)
    assert_matches("prob", prob[0], torch.from_numpy(expected), atol=4 * eps(torch.float32))
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()


@every_backend
def test_grid_that_a_batch_shares(backend: str, device: str) -> None:
    weight = (0.1 + torch.rand(1, 2, 5, 6, generator=generator(0), dtype=torch.float64)).to(device)
    seeds = random_seeds(3, 5, 1).to(device)
    shared, own = weight.clone().requires_grad_(), weight.repeat(3, 1, 1, 1).requires_grad_()
    factor = randn(3, CLASSES, 5, 6, dtype=torch.float64, device=device, seed=2)
    with ck.use_backend(backend):
        found = [ck.random_walker(ck.PixelGrid(w), seeds, CLASSES) for w in (shared, own)]
    assert torch.equal(*found)
    for prob in found:
        (prob * factor).sum().backward()
    assert shared.grad is not None
    assert own.grad is not None
    assert_matches("gradient", shared.grad, own.grad.sum(0, keepdim=True), atol=1e-12, rtol=1e-12)
    # Of a pair between seeds, or that leaves the grid, nothing depends.
    assert not shared.grad[0, 0, :, -1].any()
    assert not shared.grad[0, 1, -1].any()


@needs_extension
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 7])
def test_every_number_of_lanes(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four systems at once, and more than that; on every instruction set."""
    image = randn(2, 3, 12, 11, dtype=torch.float64, device="cpu", seed=3, scale=0.1).requires_grad_()
    seeds = torch.full((2, 12, 11), 255)
    for c in range(classes):
        seeds[:, c, c], seeds[:, 11 - c, 3] = c, c
    factor = randn(2, classes, 12, 11, dtype=torch.float64, device="cpu", seed=4)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        with ck.use_backend(backend):
            prob = ck.random_walker(image, seeds, classes)
        return prob.detach(), *torch.autograd.grad((prob * factor).sum(), image)

    expected = run("reference")
    for level in ("generic", "avx2"):
        monkeypatch.setenv("CC4S_KERNELS_CPU", level)
        for name, got, wanted in zip(("prob", "gradient"), run("cpu"), expected, strict=True):
            # Both stop where a Jacobi step changes 1e-14, and weights go down to 1e-8.
            assert_matches(name, got, wanted, atol=1e-7, rtol=1e-7)


@every_backend
def test_what_is_not_finite_stays_so(backend: str, device: str) -> None:
    image = torch.rand(1, 1, 4, 5, generator=generator(0)).to(device).requires_grad_()
    seeds = torch.full((1, 4, 5), 255, device=device)
    seeds[0, 0, 0], seeds[0, 3, 4] = 0, 1
    with ck.use_backend(backend):
        prob = ck.random_walker(image, seeds, 2)
        (gradient,) = torch.autograd.grad(prob, image, torch.full_like(prob, float("inf")).neg_().cumsum(1))
    assert gradient.isnan().any()


def test_no_convergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_ITERATIONS", 2)
    image = torch.rand(1, 1, 9, 9, generator=generator(0))
    seeds = torch.full((1, 9, 9), 255)
    seeds[0, 0, 0], seeds[0, 8, 8] = 0, 1
    with ck.use_backend("reference"), pytest.raises(RuntimeError, match="no convergence in 2 steps; a smaller beta"):
        ck.random_walker(image, seeds, 2)


_MEMORY = """
import torch
import cc4s_kernels as ck
from tests.peak_memory import grown_mb

image = torch.rand(1, 3, 128, 128)
seeds = torch.full((1, 128, 128), 255)
seeds[0, 3, 3], seeds[0, 100, 90], seeds[0, 20, 120] = 0, 1, 2
with ck.use_backend("cpu"):
    ck.random_walker(image[..., :8, :8], seeds[..., :8, :8], 21)
    print(grown_mb(lambda: ck.random_walker(image, seeds, 21, beta=10.0)))
"""


@needs_extension
def test_memory_is_linear() -> None:
    # The result takes 2.8 MB in float64 and half of it again in float32; a vector of the solver 0.14 MB, and it has
    # some forty. A matrix would be 2 GB.
    assert float(printed_by(_MEMORY, threads=1)) < 20


def test_errors() -> None:
    image, seeds = torch.zeros(1, 3, 4, 5), torch.full((1, 4, 5), 255)
    walk = ck.random_walker
    with pytest.raises(ValueError, match=r"seeds: got classes from 3 to 3, expected 0 to 2 or 255 \(none\)"):
        walk(image, seeds.where(seeds != 255, 3).fill_(3), 3)
    with pytest.raises(TypeError, match=r"seeds: got shape .* expected one of torch\.uint8"):
        walk(image, seeds.float(), 3)
    with pytest.raises(ValueError, match=r"image: got shape .* expected shape \(1, 3, 4, 5\) \(the pixels of seeds\)"):
        walk(image[..., :4], seeds, 3)
    with pytest.raises(TypeError, match=r"image: got shape .* expected torch\.uint8 or a floating dtype"):
        walk(image.long(), seeds, 3)
    with pytest.raises(ValueError, match="image: got values from nan to nan, expected finite values"):
        walk(torch.full_like(image, float("nan")), seeds, 3)
    with pytest.raises(ValueError, match="num_classes: got 0"):
        walk(image, seeds, 0)
    with pytest.raises(ValueError, match="beta: got -1"):
        walk(image, seeds, 3, beta=-1)
    with pytest.raises(TypeError, match="mask: got shape"):
        walk(image, seeds, 3, mask=seeds)
    with pytest.raises(ValueError, match=r"weight: got shape .* 2 directions"):
        walk(ck.pixel_grid(4, 5, connectivity=8), seeds, 3)
    with pytest.raises(ValueError, match=r"weight: got values from -1\.0"):
        walk(ck.PixelGrid(torch.full((1, 2, 4, 5), -1.0)), seeds, 3)


def test_only_the_reference_runs_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """There is no GPU kernel, and `explain` says so."""
    found = ck.explain("random_walker", torch.zeros(1, 3, 4, 5), torch.full((1, 4, 5), 255), 3)
    for name in ("cuda", "triton"):
        assert found.reasons[name] == f"random_walker has no {name} kernel in this version"
    assert "random_walker" in capsys.readouterr().out
