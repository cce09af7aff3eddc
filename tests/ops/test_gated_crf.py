"""`gated_crf` against loops over pairs of pixels in Python floats."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import _triton, backends
from tests.ops.tester import (
    Inputs,
    OpTester,
    Result,
    assert_matches,
    backend_params,
    eps,
    generator,
    randn,
    to_dtype,
)
from tests.peak_memory import printed_by

CLASSES = 5
# Interpreted kernels take a tenth of a second for each offset of a window.
RADIUS = 1 if _triton.INTERPRETED else 2
EXAMPLES = 2 if _triton.INTERPRETED else 30
every_backend = pytest.mark.parametrize(("backend", "device"), backend_params("gated_crf"))
needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")


def loops(
    prob: Tensor,
    image: Tensor,
    radius: int = 5,
    sigma_xy: float = 6.0,
    sigma_rgb: float = 0.1,
    mask: Tensor | None = None,
    destination: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies (B,), and the gradient of their sum, pair by pair as the definition is written."""
    energies, gradient = [], np.zeros(prob.shape)
    scale = 255 if image.dtype == torch.uint8 else 1
    everywhere = torch.ones(prob.shape[0], *prob.shape[2:], dtype=torch.bool)
    gives = (everywhere if mask is None else mask).numpy()
    receives = gives & (everywhere if destination is None else destination).numpy()
    for b in range(len(prob)):
        p, color = prob[b].double().numpy(), image[b].double().numpy() / scale
        height, width = p.shape[1:]
        terms = []
        number = max(int(receives[b].sum()), 1)
        for y, x in np.ndindex(height, width):
            if not receives[b, y, x]:
                continue
            for v in range(max(y - radius, 0), min(y + radius + 1, height)):
                for u in range(max(x - radius, 0), min(x + radius + 1, width)):
                    if (v, u) == (y, x) or not gives[b, v, u]:
                        continue
                    plane = ((v - y) ** 2 + (u - x) ** 2) / (2 * sigma_xy**2)
                    rgb = math.fsum((color[:, y, x] - color[:, v, u]) ** 2) / (2 * sigma_rgb**2)
                    k = math.exp(-plane - rgb)
                    terms.append(k * (1 - math.fsum(p[:, y, x] * p[:, v, u])))
                    gradient[b, :, y, x] -= k * p[:, v, u] / number
                    gradient[b, :, v, u] -= k * p[:, y, x] / number
        energies.append(math.fsum(terms) / number)
    return torch.tensor(energies, dtype=torch.float64), torch.from_numpy(gradient)


def draw(batch: int, height: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Probabilities, and an image of blobs that resemble each other."""
    prob = randn(batch, CLASSES, height, width, dtype=torch.float64, device="cpu", seed=seed).softmax(1)
    image = 0.3 * torch.rand(batch, 3, height, width, generator=generator(seed), dtype=torch.float64)
    return prob.to(dtype), image.to(dtype)


def random_gates(batch: int, height: int, width: int, seed: int) -> dict[str, Tensor]:
    random = torch.rand(2, batch, height, width, generator=generator(seed))
    return {"mask": random[0] < 0.7, "destination": random[1] < 0.6}


class TestGatedCrf(OpTester):
    op_name = "gated_crf"
    sizes = (1, 4, 9)
    common_size = 5
    gradcheck_size = 3
    differentiable = (0,)
    variants: ClassVar = {"default": {"radius": RADIUS}, "narrow": {"radius": 1, "sigma_xy": 0.8, "sigma_rgb": 0.3}}
    representatives = ("default",)
    gated: ClassVar[bool] = False

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 3)
        shape = (batch, size, size + 1)
        inputs = tuple(t.to(device, dtype) for t in draw(*shape, seed))
        gates = {name: gate.to(device) for name, gate in random_gates(*shape, seed).items()} if self.gated else {}
        return inputs, gates

    def naive(self, prob: Tensor, image: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return (loops(prob, image, **options)[0],)


class TestGatedCrfWithGates(TestGatedCrf):
    gated = True
    variants: ClassVar = {"default": {"radius": 1}}


def energy_and_gradient(backend: str, prob: Tensor, image: Tensor, **options: Any) -> Result:
    leaf = prob.detach().requires_grad_()
    with ck.use_backend(backend):
        energy = ck.gated_crf(leaf, image, **options)
        return Result((energy.detach(),), torch.autograd.grad(energy.sum(), leaf))


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 20)),
    radius=st.sampled_from([1, 2, 3, 5, 7]),
    sigmas=st.tuples(st.sampled_from([0.5, 6.0, 100.0]), st.sampled_from([0.05, 0.1, 10.0])),
    gates=st.sets(st.sampled_from(["mask", "destination"])),
    seed=st.integers(0, 1000),
)
def test_equals_the_loops(
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    radius: int,
    sigmas: tuple[float, float],
    gates: set[str],
    seed: int,
) -> None:
    """Energy and gradient, windows larger than the image too."""
    radius = min(radius, RADIUS) if backend == "triton" and _triton.INTERPRETED else radius
    options: dict[str, Any] = {"radius": radius, "sigma_xy": sigmas[0], "sigma_rgb": sigmas[1]}
    chosen = {name: gate for name, gate in random_gates(*shape, seed).items() if name in gates}
    prob, image = draw(*shape, seed)
    for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.float64):
        # From the same rounded inputs.
        inputs = (prob.to(dtype), image.to(dtype))
        energy, gradient = loops(*inputs, **options, **chosen)
        on_device = {name: gate.to(device) for name, gate in chosen.items()}
        found = energy_and_gradient(backend, *(t.to(device) for t in inputs), **options, **on_device)
        # Sums of up to 224 terms of at most 1; colours over sigma go up to 6, their squares have 36 eps.
        bound = 64 * eps(dtype)
        assert_matches("energy", found.outputs[0], energy, atol=bound, rtol=bound)
        assert_matches("gradient", found.gradients[0], gradient, atol=bound, rtol=bound)


@every_backend
def test_one_pair_by_hand(backend: str, device: str) -> None:
    prob = torch.tensor([[[[0.75, 0.5, 1.0]], [[0.25, 0.5, 0.0]]]], device=device)
    image = torch.tensor([[[[0, 51, 255]]] * 3], dtype=torch.uint8, device=device)
    # The colours of neighbours are 0.2 apart in each channel, or 0.8: exp(-0.12 / 2), exp(-1.92 / 2); those of the ends
    # have no window in common.
    k = [math.exp(-1 / 8 - 0.06), math.exp(-1 / 8 - 0.96)]
    expected = 2 * (k[0] * 0.5 + k[1] * 0.5) / 3
    with ck.use_backend(backend):
        found = ck.gated_crf(prob, image, radius=1, sigma_xy=2, sigma_rgb=1)
        # The third pixel is padding; only the second one receives.
        mask, receives = torch.tensor([[[[True, True, False]]], [[[False, True, False]]]], device=device)
        gated = ck.gated_crf(prob, image, radius=1, sigma_xy=2, sigma_rgb=1, mask=mask, destination=receives)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(gated) == pytest.approx(k[0] * 0.5, rel=1e-6)


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(classes=st.sampled_from([1, 2, 3, 8, 33, 70]), seed=st.integers(0, 1000))
def test_never_negative_and_zero_for_one_label(backend: str, device: str, classes: int, seed: int) -> None:
    """Any number of classes; one label everywhere, as a one-hot, has energy 0 exactly."""
    random = generator(seed)
    prob = torch.randn(2, classes, 5, 9, generator=random).mul(3).softmax(1)
    prob[1] = torch.nn.functional.one_hot(torch.tensor(seed % classes), classes)[:, None, None]
    image = torch.rand(2, 3, 5, 9, generator=random)
    found = energy_and_gradient(backend, prob.to(device), image.to(device), radius=RADIUS, sigma_rgb=0.5)
    expected, gradient = loops(prob, image, radius=RADIUS, sigma_rgb=0.5)
    assert (found.outputs[0] >= 0).all() if classes > 1 else float(found.outputs[0].abs().max()) < 24 * 1e-6
    assert float(found.outputs[0][1]) == 0
    # Sums of 24 terms of at most 1.
    assert_matches("energy", found.outputs[0], expected, atol=1e-5)
    assert_matches("gradient", found.gradients[0], gradient, atol=1e-5)


@every_backend
def test_no_destination_is_zero_with_gradient_zero(backend: str, device: str) -> None:
    prob, image = (t.to(device) for t in draw(2, 4, 5, 0, torch.float32))
    closed = torch.zeros(2, 4, 5, dtype=torch.bool, device=device)
    for gates in ({"mask": closed}, {"destination": closed}):
        found = energy_and_gradient(backend, prob, image, radius=RADIUS, **gates)
        assert not found.outputs[0].any()
        assert not found.gradients[0].any()


@every_backend
def test_padding_changes_nothing(backend: str, device: str) -> None:
    prob, image = (t.to(device) for t in draw(1, 5, 6, 1, torch.float32))
    mask = torch.zeros(1, 7, 9, dtype=torch.bool, device=device)
    mask[:, :5, :6] = True
    padded = [torch.nn.functional.pad(t, (0, 3, 0, 2), value=0.7) for t in (prob, image)]
    plain = energy_and_gradient(backend, prob, image, radius=RADIUS)
    found = energy_and_gradient(backend, *padded, radius=RADIUS, mask=mask)
    # Another order of the same sums.
    assert_matches("energy", found.outputs[0], plain.outputs[0], atol=0, rtol=1e-6)
    assert_matches("gradient", found.gradients[0][..., :5, :6], plain.gradients[0], atol=1e-7)
    assert not found.gradients[0].masked_select(~mask[:, None]).any()


@every_backend
def test_flipped_images_have_the_same_energy(backend: str, device: str) -> None:
    prob, image = (t.to(device) for t in draw(1, 6, 7, 2, torch.float32))
    plain = energy_and_gradient(backend, prob, image, radius=RADIUS)
    for axis in (2, 3):
        found = energy_and_gradient(backend, prob.flip(axis), image.flip(axis), radius=RADIUS)
        assert_matches("energy", found.outputs[0], plain.outputs[0], atol=0, rtol=1e-6)
        assert_matches("gradient", found.gradients[0].flip(axis), plain.gradients[0], atol=1e-7)


def test_the_released_kernel_inside_of_an_image() -> None:
    """The authors' release unfolds with zeros around the image; where all windows are inside, it is this energy."""
    radius, sigma_xy, sigma_rgb = 2, 6.0, 0.1
    prob, image = draw(1, 9, 10, 3)
    grid = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(9.0), indexing="xy"))[None].double()
    features = torch.cat([grid / sigma_xy, image / sigma_rgb], 1)

    side = 2 * radius + 1

    def unfold(x: Tensor) -> Tensor:
        return torch.nn.functional.unfold(x, side, 1, radius).view(1, -1, side, side, 9, 10)

    difference = unfold(features) - features[:, :, None, None]
    kernels = (-0.5 * difference**2).sum(1, keepdim=True).exp()
    kernels[:, :, radius, radius] = 0
    inside = torch.zeros(1, 9, 10, dtype=torch.bool)
    inside[:, radius:-radius, radius:-radius] = True
    kernels = kernels * inside
    released = (kernels.sum() - ((kernels * unfold(prob)).sum((2, 3)) * prob).sum()) / inside.sum()
    found = ck.gated_crf(prob, image, radius=radius, destination=inside)
    assert_matches("energy", found, released[None], atol=0, rtol=1e-12)


def test_uint8_images_are_divided_by_255() -> None:
    prob, _ = draw(1, 4, 5, 0)
    image = torch.randint(0, 60, (1, 3, 4, 5), generator=generator(0), dtype=torch.uint8)
    assert_matches("energy", ck.gated_crf(prob, image), ck.gated_crf(prob, image.double() / 255), atol=0, rtol=1e-14)


@pytest.mark.parametrize("name", backends.available("gated_crf"))
def test_images_get_no_gradient(name: str) -> None:
    prob, image = draw(1, 3, 3, 0, torch.float32)
    image.requires_grad_()
    with ck.use_backend(name):
        assert not ck.gated_crf(prob, image, radius=1).requires_grad
        energy = ck.gated_crf(prob.requires_grad_(), image, radius=1).sum()
    assert torch.autograd.grad(energy, image, allow_unused=True) == (None,)


@needs_extension
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    """Those that the processor lacks fall back to narrower ones; every length of a run of offsets."""
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    for dtype in (torch.float32, torch.float64):
        prob, image = draw(2, 9, 35, 3, dtype)
        for radius in range(1, 7):
            options = {"radius": radius, **random_gates(2, 9, 35, 4)}
            truth = energy_and_gradient("reference", *to_dtype((prob, image), torch.float64), **options)
            found = energy_and_gradient("cpu", prob, image, **options)
            # Sums of up to 168 terms of order 1.
            assert_matches("energy", found.outputs[0], truth.outputs[0], atol=0, rtol=16 * eps(dtype))
            assert_matches("gradient", found.gradients[0], truth.gradients[0], atol=0, rtol=32 * eps(dtype))


@needs_extension
def test_every_number_of_threads_gives_the_same() -> None:
    prob, image = draw(2, 40, 33, 5, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(energy_and_gradient("cpu", prob, image))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        OpTester().assert_bitwise(result, results[0])


@needs_extension
def test_memory_of_a_backward_pass() -> None:
    """A copy of the windows has 121 times the size of prob; the kernels keep the gradient and a few rows."""
    code = """
import torch, cc4s_kernels as ck
from tests.peak_memory import grown_mb
def case(size):
    prob = torch.full((1, 21, size, size), 1 / 21, requires_grad=True)
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return lambda: torch.autograd.grad(ck.gated_crf(prob, image).sum(), prob)
with ck.use_backend("cpu"):
    case(32)()
    print(grown_mb(case(321)))
"""
    grown = float(printed_by(code))
    gradient = 21 * 321 * 321 * 4 / 2**20
    # The image in float32 has a seventh of it; a thread keeps 11 rows of a strip.
    assert gradient <= grown < 1.5 * gradient, f"{grown:.1f} MiB, the gradient is {gradient:.1f} MiB"


def test_refusals_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    prob, image = draw(1, 3, 3, 0, torch.float32)
    if backends.missing("cpu") is None:
        assert ck.explain("gated_crf", prob.to("meta"), image).reasons["cpu"] == "prob is on meta"
        tiny = prob.to(torch.float8_e5m2)
        assert ck.explain("gated_crf", tiny, image).reasons["cpu"].startswith("prob is torch.float8_e5m2, the C++")
    capsys.readouterr()


def test_errors() -> None:
    prob, image = draw(1, 3, 4, 0, torch.float32)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "prob: got .* floating", lambda: ck.gated_crf(prob.long(), image)),
        (ValueError, r"prob: got .* \(B, C, H, W\)", lambda: ck.gated_crf(prob[0], image)),
        (ValueError, "image: got .*the pixels of prob", lambda: ck.gated_crf(prob, image[..., 1:])),
        (TypeError, "image: got .* torch.uint8", lambda: ck.gated_crf(prob, image.int())),
        (ValueError, r"image: got values from .* \[0, 1\]", lambda: ck.gated_crf(prob, torch.full_like(image, 1.5))),
        (ValueError, r"image: got values from nan", lambda: ck.gated_crf(prob, torch.full_like(image, float("nan")))),
        (ValueError, "radius: got 0", lambda: ck.gated_crf(prob, image, radius=0)),
        (TypeError, "radius: got float", lambda: ck.gated_crf(prob, image, radius=2.0)),  # type: ignore[arg-type]
        (ValueError, "sigma_xy: got 0, expected a value greater", lambda: ck.gated_crf(prob, image, sigma_xy=0)),
        (ValueError, "sigma_rgb: got -1", lambda: ck.gated_crf(prob, image, sigma_rgb=-1)),
        (TypeError, "mask: got .* torch.bool", lambda: ck.gated_crf(prob, image, mask=mask.float())),
        (ValueError, "destination: got .*pixels of prob", lambda: ck.gated_crf(prob, image, destination=mask[:, 1:])),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
