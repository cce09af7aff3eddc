"""Dense CRF, normalised cut and kernel cut losses, and mean-field inference, against loops and dense matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cc4s_kernels as ck
from tests.ops.tester import CountingBackend, generator

LOSSES = {"dense_crf": ck.nn.DenseCRFLoss, "normalized_cut": ck.nn.NormalizedCutLoss, "kernel_cut": ck.nn.KernelCutLoss}


def make_batch(size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, uint8 image, mask; the second of the three images has padding, the third is nothing else."""
    random = generator(0)
    logits = 2 * torch.randn(3, 4, size, size, generator=random, dtype=torch.float64)
    image = torch.randint(0, 120, (3, 3, size, size), generator=random, dtype=torch.uint8)
    mask = torch.ones(3, size, size, dtype=torch.bool)
    mask[1, :, size - 3 :] = False
    mask[2] = False
    return logits.to(dtype), image, mask


def dense_matrix(image: Tensor, mask: Tensor, sigma_xy: float, sigma_rgb: float, include_self: bool) -> Tensor:
    """K (N, N) of one image, by a loop over pairs."""
    _, height, width = image.shape
    pixels = [(y, x, *image[:, y, x].tolist()) for y in range(height) for x in range(width)]
    valid = mask.flatten().tolist()
    k = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    for i, p in enumerate(pixels):
        for j, q in enumerate(pixels):
            if valid[i] and valid[j] and (include_self or i != j):
                position = sum((a - b) ** 2 for a, b in zip(p[:2], q[:2], strict=True))
                color = sum((a - b) ** 2 for a, b in zip(p[2:], q[2:], strict=True))
                k[i, j] = math.exp(-position / (2 * sigma_xy**2) - color / (2 * sigma_rgb**2))
    return k


def naive(
    logits: Tensor, image: Tensor, mask: Tensor, name: str, include_self: bool = False, **sigmas: float
) -> Tensor:
    """Losses per image from dense matrices, at full size."""
    found = []
    for x, picture, valid in zip(logits.double(), image, mask, strict=True):
        k = dense_matrix(picture, valid, sigmas["sigma_xy"], sigmas["sigma_rgb"], include_self)
        ones = valid.flatten().double()
        total = (0 * x).sum()
        for s in x.softmax(0).flatten(1) * ones:
            if ones.sum() > 0 and name != "normalized_cut":
                total = total - s @ k @ s / ones.sum()
            if ones.sum() > 0 and name != "dense_crf":
                total = total + s @ k @ (ones - s) / (k.sum(1) @ s)
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_values_and_gradients(name: str, backend: str, include_self: bool) -> None:
    logits, image, mask = make_batch()
    sigmas = {"sigma_xy": 3.0, "sigma_rgb": 30.0}
    module = LOSSES[name](**sigmas, scale=1, include_self=include_self, reduction="none")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    with ck.use_backend(backend):
        got = module(leaves[0], image, mask)
        (gradient,) = torch.autograd.grad(got.sum(), leaves[0])
    expected = naive(leaves[1], image, mask, name, include_self, **sigmas)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), leaves[1])
    # float64 sums of 64 x 64 terms of order 1.
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-11, rtol=1e-11)
    assert got[2] == 0
    assert bool((gradient[2] == 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_scale_reduces_probabilities_image_and_sigma(name: str) -> None:
    logits, image, mask = make_batch(8)
    small = F.interpolate(logits.softmax(1), scale_factor=0.5, mode="bilinear")
    picture, valid = image[:, :, ::2, ::2], mask[:, ::2, ::2]
    expected = naive(small.log(), picture, valid, name, sigma_xy=2.0, sigma_rgb=30.0)
    got = LOSSES[name](sigma_xy=4.0, sigma_rgb=30.0, reduction="none")(logits, image, mask)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)


def test_kernel_cut_is_the_weighted_sum() -> None:
    logits, image, mask = make_batch()
    parts = [LOSSES[name](4.0, 30.0, 1.0)(logits, image, mask) for name in ("normalized_cut", "dense_crf")]
    both = ck.nn.KernelCutLoss(4.0, 30.0, 1.0, normalized_cut=0.5, dense_crf=2.0)(logits, image, mask)
    torch.testing.assert_close(both, 0.5 * parts[0] + 2 * parts[1])


@pytest.mark.parametrize("confidence", [90.0, 97.0, 102.0, 110.0])
def test_a_class_that_is_nearly_nowhere_has_a_finite_gradient(confidence: float) -> None:
    """Its probabilities are subnormal numbers or 0."""
    label = torch.randint(0, 2, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = (confidence * F.one_hot(label, 3).permute(0, 3, 1, 2).float()).requires_grad_()
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    loss = ck.nn.NormalizedCutLoss()(logits, image)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(gradient).all())


def test_a_cut_between_two_colours_is_small() -> None:
    """Two halves of one colour each: cutting between them costs nothing, cutting through one does."""
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[..., 4:] = 200
    along = torch.zeros(1, 2, 8, 8)
    along[:, 0, :, :4] = along[:, 1, :, 4:] = 50.0
    module = ck.nn.NormalizedCutLoss(sigma_xy=5.0, sigma_rgb=10.0, scale=1)
    assert float(module(along, image)) < 1e-6
    assert float(module(along.mT.contiguous(), image)) > 0.1


def test_logits_are_upsampled_to_the_image_and_grey_is_colour() -> None:
    logits, image, _ = make_batch()
    module = ck.nn.DenseCRFLoss(4.0, 30.0, 1.0)
    wide = F.interpolate(logits[:, :, ::2, ::2].softmax(1).log(), (8, 8), mode="bilinear", align_corners=True)
    small = logits[:, :, ::2, ::2].softmax(1).log()
    torch.testing.assert_close(module(small, image), module(wide, image))
    grey = image[:, :1]
    torch.testing.assert_close(module(wide, grey), module(wide, grey.expand(-1, 3, -1, -1)))


def test_reductions_and_normalizer() -> None:
    logits, image, mask = make_batch()
    each = ck.nn.DenseCRFLoss(4.0, 30.0, 1.0, reduction="none")(logits, image, mask)
    total = ck.nn.DenseCRFLoss(4.0, 30.0, 1.0, reduction="sum")(logits, image, mask)
    module = ck.nn.DenseCRFLoss(4.0, 30.0, 1.0)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(module(logits, image, mask), each.mean())
    torch.testing.assert_close(module(logits, image, mask, normalizer=12), each.sum() / 12)
    assert float(module.count(logits)) == 3


def test_opcheck() -> None:
    pytest.importorskip("expecttest")
    prob = torch.rand(2, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.cc4s_kernels.kernel_forms.default, (prob, torch.rand(2, 3, 4, 5)))


def test_second_derivatives_raise() -> None:
    logits, image, _ = make_batch()
    logits.requires_grad_()
    (first,) = torch.autograd.grad(ck.nn.DenseCRFLoss(4.0, 30.0)(logits, image), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(first.sum(), logits)


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_and_is_float32_under_autocast(name: str) -> None:
    logits, image, mask = make_batch(dtype=torch.float32)
    module = LOSSES[name](4.0, 30.0)
    expected = module(logits, image, mask)
    torch._dynamo.reset()
    counter = CountingBackend()
    leaf = logits.clone().requires_grad_()
    got = torch.compile(module, fullgraph=True, backend=counter)(leaf, image, mask)
    got.backward()
    assert (counter.forward, counter.backward) == (1, 1)
    # float32 sums of 16 x 16 terms, perhaps in another order.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(logits, image, mask), expected)


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "sigma_xy: got 0", {"sigma_xy": 0}),
        (TypeError, "sigma_rgb: got str", {"sigma_rgb": "a"}),
        (ValueError, "scale: got 0, expected", {"scale": 0}),
        (ValueError, "scale: got 2", {"scale": 2}),
        (ValueError, "reduction: got 'all'", {"reduction": "all"}),
        (TypeError, "include_self: got int", {"include_self": 1}),
        (ValueError, "dense_crf: got -1", {"dense_crf": -1}),
    ],
)
def test_options_are_checked(error: type[Exception], message: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ck.nn.KernelCutLoss(**kwargs)


def test_inputs_are_checked() -> None:
    logits, image, mask = make_batch()
    module = ck.nn.DenseCRFLoss()
    with pytest.raises(ValueError, match=r"image: got shape \(2, 3, 8, 8\)"):
        module(logits, image[:2])
    with pytest.raises(TypeError, match=r"image: .*int32"):
        module(logits, image.int())
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 8, 7\)"):
        module(logits, image, mask[:, :, 1:])


# ---- mean-field inference


def naive_crf(
    prob: Tensor, image: Tensor, iterations: int, gaussian: tuple[float, float], bilateral: tuple[float, float, float]
) -> Tensor:
    """One image, from dense matrices by loops over pairs."""
    classes, height, width = prob.shape
    everywhere = torch.ones(height, width, dtype=torch.bool)
    kernels = [
        (dense_matrix(image * 0, everywhere, gaussian[0], 1.0, True), gaussian[1]),
        (dense_matrix(image, everywhere, bilateral[0], bilateral[1], True), bilateral[2]),
    ]
    q = [[float(prob[c].flatten()[i]) for c in range(classes)] for i in range(height * width)]
    unary = [[-math.log(max(x, 1e-5)) for x in row] for row in q]
    for _ in range(iterations):
        energy = [[-u for u in row] for row in unary]
        for k, weight in kernels:
            d = [math.fsum(row) for row in k.tolist()]
            for i, row in enumerate(k.tolist()):
                for c in range(classes):
                    message = math.fsum(w / math.sqrt(d[i] * d[j]) * q[j][c] for j, w in enumerate(row))
                    energy[i][c] += weight * message
        q = []
        for row in energy:
            total = math.fsum(math.exp(e - max(row)) for e in row)
            q.append([math.exp(e - max(row)) / total for e in row])
    return torch.tensor(q, dtype=torch.float64).T.reshape(prob.shape)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dense_crf_against_loops(backend: str) -> None:
    logits, image, _ = make_batch(6)
    prob = logits.softmax(1)
    options: dict[str, Any] = {"iterations": 3, "gaussian": (1.5, 3.0), "bilateral": (4.0, 30.0, 5.0)}
    with ck.use_backend(backend):
        got = ck.dense_crf(prob, image, **options)
        single = ck.dense_crf(prob.float(), image, **options)
    for b in range(3):
        # float64 sums of 36 terms.
        torch.testing.assert_close(got[b], naive_crf(prob[b], image[b], **options), atol=1e-12, rtol=1e-12)
    # Three steps in float32, exponents up to 8: some 100 roundings of 6e-8.
    torch.testing.assert_close(single.double(), got, atol=1e-5, rtol=0)


def test_dense_crf_without_kernels_or_steps_is_the_input() -> None:
    logits, image, _ = make_batch()
    prob = logits.softmax(1).clamp(min=1e-3)
    prob = prob / prob.sum(1, keepdim=True)
    torch.testing.assert_close(ck.dense_crf(prob, image, gaussian=None, bilateral=None), prob)
    torch.testing.assert_close(ck.dense_crf(prob, image, iterations=0), prob)


def test_dense_crf_removes_a_wrong_pixel() -> None:
    """One pixel of another opinion inside a region of one colour."""
    image = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    image[..., 5:] = 220
    prob = torch.full((1, 2, 9, 9), 0.3)
    prob[:, 0, :, :5] = prob[:, 1, :, 5:] = 0.7
    prob[0, :, 4, 2] = torch.tensor([0.4, 0.6])
    label = ck.dense_crf(prob, image).argmax(1)[0]
    assert torch.equal(label, (torch.arange(9) >= 5).long().expand(9, 9))


def test_dense_crf_checks() -> None:
    logits, image, _ = make_batch()
    prob = logits.softmax(1)
    for message, options in (
        (r"gaussian: got tuple \(3,\), expected \(sigma_xy, compatibility\)", {"gaussian": (3,)}),
        (r"bilateral sigma_rgb: got 0", {"bilateral": (80, 0, 10)}),
        (r"bilateral compatibility: got -1", {"bilateral": (80, 13, -1)}),
        (r"iterations: got -1", {"iterations": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            ck.dense_crf(prob, image, **options)
