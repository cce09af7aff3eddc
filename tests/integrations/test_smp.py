"""segmentation_models_pytorch: logits at the decoder's size, the walk in front of the head."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch
import torch
from torch import nn
from torch.nn import functional as F

import cc4s_kernels as ck
from cc4s_kernels.contrib import smp
from tests.integrations.examples import losses_of


@pytest.mark.parametrize("name", ["FPN", "DeepLabV3Plus", "Segformer", "Unet", "PSPNet"])
def test_loss_of_small_logits_is_that_of_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model = segmentation_models_pytorch.create_model(name, "resnet18", encoder_weights=None, classes=3).eval()
    images = torch.rand(2, 3, 64, 96)
    labels = torch.randint(0, 3, (2, 64, 96))
    labels[:, 20:] = 255
    with torch.no_grad():
        expected = F.cross_entropy(model(images), labels, ignore_index=255)
        with smp.feature_size(model) as small:
            logits = small(images)
        again = model(images)
    assert again.shape[-2:] == (64, 96)
    # A Unet's decoder has the size of the image.
    assert (logits.shape[-1] < 96) == (name != "Unet")
    found = ck.nn.PartialCrossEntropyLoss()(logits, labels)
    # float32 means over 4000 pixels.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_walk_passes_through_at_first_and_learns() -> None:
    torch.manual_seed(0)
    model = segmentation_models_pytorch.FPN("resnet18", encoder_weights=None, classes=3).eval()
    images = torch.rand(1, 3, 64, 64)
    before = model(images)
    walk = smp.insert_random_walk(model, shrink=2)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    model(images).square().sum().backward()
    assert walk.gamma.grad is not None
    assert walk.gamma.grad.abs().item() > 0


def test_refused() -> None:
    with pytest.raises(TypeError, match="model: got Identity"):
        smp.insert_random_walk(nn.Identity())
    model = segmentation_models_pytorch.FPN("resnet18", encoder_weights=None, classes=3, activation="softmax2d")
    with pytest.raises(ValueError, match="expected activation=None"), smp.feature_size(model):
        pass


def test_upsampling_comes_back_after_an_error() -> None:
    model = segmentation_models_pytorch.FPN("resnet18", encoder_weights=None, classes=3)
    upsampling = model.segmentation_head[1]
    with pytest.raises(RuntimeError, match="Wrong input shape"), smp.feature_size(model):
        model(torch.zeros(1, 3, 63, 63))
    assert model.segmentation_head[1] is upsampling


def test_example() -> None:
    losses = losses_of("smp_fpn.py")
    assert losses[-1] < losses[0]
