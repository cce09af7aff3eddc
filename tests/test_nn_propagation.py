"""Losses against soft labels, as they are written, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import cc4s_kernels as ck
from tests.ops.tester import assert_matches, generator, randn


def logits_of(size: int = 5, classes: int = 3, batch: int = 2) -> Tensor:
    return randn(batch, classes, size, size, dtype=torch.float64, device="cpu", seed=0).requires_grad_()


def scribbled(batch: int = 2, size: int = 9) -> Tensor:
    labels = torch.full((batch, size, size), 255, dtype=torch.uint8)
    labels[:, 1, 1:6], labels[:, 7, 2:7], labels[:, 4, 8] = 0, 2, 1
    return labels


def test_collision_cross_entropy() -> None:
    logits = logits_of()
    target = randn(2, 3, 9, 9, dtype=torch.float64, device="cpu", seed=1).softmax(1)
    target[:, :, 4] = 0
    mask = torch.rand(2, 9, 9, generator=generator(2)) < 0.7
    prob = interpolate(logits, (9, 9), mode="bilinear", align_corners=True).softmax(1)
    counted = mask.clone()
    counted[:, 4] = False
    value = -torch.log(1e-6 + (1 - 1e-6) * (prob * target).sum(1))
    loss = ck.nn.CollisionCrossEntropyLoss()
    expected = value[counted].mean()
    assert_matches("loss", loss(logits, target, mask), expected, atol=1e-14, rtol=1e-14)
    assert float(loss.count(target, mask)) == int(counted.sum())
    sums = ck.nn.CollisionCrossEntropyLoss(reduction="none")(logits, target, mask)
    assert_matches("sums", sums, (value * counted).sum((1, 2)), atol=1e-13, rtol=1e-13)
    half = loss(logits, target, mask, normalizer=2 * counted.sum())
    assert_matches("half", half, expected / 2, atol=1e-14, rtol=1e-14)


def test_an_uncertain_label_teaches_nothing() -> None:
    logits = logits_of()
    loss = ck.nn.CollisionCrossEntropyLoss()
    uniform = torch.full((2, 3, 5, 5), 1 / 3, dtype=torch.float64)
    value = loss(logits, uniform)
    (gradient,) = torch.autograd.grad(value, logits)
    # sum p = 1 up to rounding, and so its gradient is 0.
    assert_matches("gradient", gradient, torch.zeros_like(gradient), atol=1e-15)
    empty = loss(logits, torch.zeros_like(uniform))
    assert float(empty.detach()) == 0
    assert not torch.autograd.grad(empty, logits)[0].any()
    # Opposite one-hots: finite, with a gradient.
    opposite = torch.tensor([[50.0, -50.0]], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    worst = loss(opposite, torch.tensor([[0.0, 1.0]], dtype=torch.float64).reshape(1, 2, 1, 1))
    assert float(worst.detach()) == pytest.approx(13.8155, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_random_walker_loss(alpha: float) -> None:
    logits, labels = logits_of(), scribbled()
    labels[1] = 255
    image = torch.rand(2, 3, 9, 9, generator=generator(3), dtype=torch.float64)
    soft = ck.random_walker(image, labels, 3, beta=20.0)
    prediction = interpolate(logits, (9, 9), mode="bilinear", align_corners=True).softmax(1)
    confidence = torch.exp(alpha * torch.xlogy(soft, soft).sum(1))
    value = confidence * -(soft * prediction.log()).sum(1)
    loss = ck.nn.RandomWalkerLoss(20.0, alpha, reduction="none")
    found = loss(logits, labels, image)
    # An image without a scribble costs nothing.
    assert_matches("loss", found, torch.stack([value[0].mean(), torch.zeros(())]), atol=1e-12, rtol=1e-12)
    mean = ck.nn.RandomWalkerLoss(20.0, alpha)(logits, labels, image)
    assert_matches("mean", mean, value[0].mean() / 2, atol=1e-12, rtol=1e-12)
    assert not torch.autograd.grad(mean, logits)[0][1].any()


def test_features_get_a_gradient() -> None:
    logits, labels = logits_of(), scribbled()
    features = (0.2 * torch.rand(2, 4, 9, 9, generator=generator(3), dtype=torch.float64)).requires_grad_()
    loss = ck.nn.RandomWalkerLoss(5.0)

    def value(f: Tensor) -> Tensor:
        return loss(logits.detach(), labels, f)

    with ck.use_backend("reference"):
        (gradient,) = torch.autograd.grad(value(features), features)
    direction = randn(2, 4, 9, 9, dtype=torch.float64, device="cpu", seed=5)
    step = 1e-5
    with torch.no_grad():
        slope = (value(features + step * direction) - value(features - step * direction)) / (2 * step)
    # Central differences: an error of the square of the step, and 1e-10 of the solver over the step.
    assert_matches("slope", (gradient * direction).sum(), slope, atol=1e-5)
    assert float(slope.abs()) > 1e-3


def test_cells() -> None:
    """Mean colour inside the mask, seeds where a cell's labels agree."""
    image = torch.tensor([[0, 100, 200], [50, 50, 255]], dtype=torch.uint8)[None, None]
    labels = torch.tensor([[1, 255, 0], [1, 255, 2]])[None]
    mask = torch.tensor([[True, True, True], [True, False, True]])[None]
    loss = ck.nn.RandomWalkerLoss(1.0, stride=2)
    found = loss.propagate(image, labels, 3, mask)
    assert found.shape == (1, 3, 1, 2)
    # The right cell has no seed of its own, and walks to the left one.
    assert_matches("prob", found[0, 1, 0], torch.ones(2), atol=1e-6)
    labels[0, 0, 2] = 2
    found = loss.propagate(image, labels, 3, mask)
    assert_matches("prob", found[0, 2, 0], torch.tensor([0.0, 1.0]), atol=1e-6)


def test_errors() -> None:
    logits, labels = logits_of(), scribbled()
    with pytest.raises(ValueError, match="alpha: got -1"):
        ck.nn.RandomWalkerLoss(alpha=-1)
    with pytest.raises(ValueError, match="stride: got 0"):
        ck.nn.RandomWalkerLoss(stride=0)
    with pytest.raises(ValueError, match="image: got shape"):
        ck.nn.RandomWalkerLoss()(logits, labels, torch.zeros(2, 3, 9, 8))
    with pytest.raises(ValueError, match=r"target: got shape .*the batch and classes of logits"):
        ck.nn.CollisionCrossEntropyLoss()(logits, torch.zeros(2, 4, 9, 9))
    logits, labels, colors = torch.zeros(2, 3, 8, 8), torch.full((2, 8, 8), 255), torch.zeros(2, 3, 8, 8)
    for stride in (1, 4):
        module = ck.nn.RandomWalkerLoss(stride=stride, reduction="none")
        with pytest.raises(ValueError, match=r"labels: got shape .*the batch of logits"):
            module(logits, labels[:1], colors[:1])
        with pytest.raises(ValueError, match=r"image: got shape .*the pixels of labels"):
            module(logits, labels, colors[..., 1:])
        with pytest.raises(TypeError, match=r"image: got .*torch\.int32"):
            module(logits, labels, colors.int())
        with pytest.raises(ValueError, match="labels: got classes from 7 to 7, expected 0 to 2"):
            module(logits, labels.index_fill(1, torch.tensor([3]), 7), colors)
    target = torch.full((1, 3, 4, 4), 1 / 3)
    target[0, 0, 0, 0] = torch.nan
    assert ck.nn.CollisionCrossEntropyLoss()(torch.zeros(1, 3, 4, 4), target).isnan()
