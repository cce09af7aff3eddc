"""torchvision: logits before the upsampling, losses of both outputs, the walk in front of the classifier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision as tv
from torch import nn
from torch.nn import functional as F
from torchvision.models import segmentation

import cc4s_kernels as ck
from cc4s_kernels.contrib import torchvision
from tests.integrations.examples import losses_of

MODELS = {
    "fcn": lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True),
    "deeplab": lambda: segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
    "lraspp": lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_small_logits_is_that_of_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    images = torch.rand(2, 3, 65, 49)
    labels = torch.randint(0, 3, (2, 65, 49))
    labels[:, 20:] = 255
    criterion = ck.nn.PartialCrossEntropyLoss(align_corners=False)
    with torch.no_grad():
        outputs = model(images)
        small = torchvision.logits(model, images)
        assert small.keys() == outputs.keys()
        found = torchvision.loss(criterion, small, labels, aux_weight=0.3)
        expected = F.cross_entropy(outputs["out"], labels, ignore_index=255)
        if "aux" in outputs:
            expected = expected + 0.3 * F.cross_entropy(outputs["aux"], labels, ignore_index=255)
    assert small["out"].shape[-1] < 49
    # float32 means over 2000 pixels.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_walk_passes_through_at_first_and_learns() -> None:
    torch.manual_seed(0)
    model = MODELS["deeplab"]().eval()
    images = torch.rand(1, 3, 65, 65)
    before = model(images)["out"]
    walk = torchvision.insert_random_walk(model)
    assert isinstance(walk, ck.nn.RandomWalk2d)
    torch.testing.assert_close(model(images)["out"], before, rtol=0, atol=0)
    model(images)["out"].square().sum().backward()
    assert walk.gamma.grad is not None
    assert walk.gamma.grad.abs().item() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torchvision.logits(nn.Identity(), torch.zeros(1, 3, 8, 8)), "model: got Identity"),
        (lambda: torchvision.insert_random_walk(tv.models.resnet18(weights=None)), "model: got ResNet"),
        (lambda: torchvision.insert_random_walk(MODELS["lraspp"]()), "got a LRASPPHead"),
    ],
)
def test_other_models_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_example() -> None:
    losses = losses_of("torchvision_deeplab.py")
    assert losses[-1] < losses[0]
