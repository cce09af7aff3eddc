"""torchvision's segmentation models (FCN, DeepLabV3, LR-ASPP) with the losses and the walk of this package.

Their forward pass upsamples logits with align_corners=False and returns {"out": ..., "aux": ...}. `logits` gives
the same before the upsampling, for losses with `align_corners=False`, which then upsample inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cc4s_kernels._validation import check_number
from cc4s_kernels.contrib._require import require
from cc4s_kernels.nn.random_walk import RandomWalk2d

__all__ = ["insert_random_walk", "logits", "loss"]


def _check_model(model: Any) -> Any:
    segmentation = require("torchvision.models.segmentation", "torchvision")
    simple = require("torchvision.models.segmentation._utils", "torchvision")._SimpleSegmentationModel
    if not isinstance(model, simple | segmentation.LRASPP):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a model of torchvision.models.segmentation "
            "(FCN, DeepLabV3, LRASPP)"
        )
    return model


def logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits at the size of the features.

    Args:
        model: a model of `torchvision.models.segmentation`.
        images: (B, 3, H, W), normalised.

    Returns:
        "out" (B, C, h, w), and "aux" where the model has an auxiliary classifier. `model(images)` is their
        bilinear upsampling to (H, W) with align_corners=False.

    Raises:
        ImportError: no torchvision. TypeError: another model.
    """
    net = _check_model(model)
    features = net.backbone(images)
    if "out" not in features:
        # LR-ASPP: its classifier takes the features of two levels.
        return {"out": net.classifier(features)}
    outputs = {"out": net.classifier(features["out"])}
    if net.aux_classifier is not None:
        outputs["aux"] = net.aux_classifier(features["aux"])
    return outputs


def loss(
    criterion: Callable[..., Tensor], outputs: dict[str, Tensor], *args: Any, aux_weight: float = 0.5, **kwargs: Any
) -> Tensor:
    """criterion(out, ...) + aux_weight * criterion(aux, ...), of the outputs of a model or of `logits`.

    Args:
        criterion: a loss of `cc4s_kernels.nn`, or any other of logits.
        outputs: "out" and perhaps "aux".
        *args, **kwargs: the criterion's other arguments.
        aux_weight: factor of the auxiliary output; 0.5 as in torchvision's reference training.
    """
    check_number("aux_weight", aux_weight, low=0.0)
    total = criterion(outputs["out"], *args, **kwargs)
    if "aux" in outputs and aux_weight > 0:
        total = total + aux_weight * criterion(outputs["aux"], *args, **kwargs)
    return total


def insert_random_walk(model: nn.Module, key_channels: int | None = None, shrink: int = 1) -> RandomWalk2d:
    """Puts a `RandomWalk2d` in front of the last convolution of the classifier; it passes features through at first.

    Args:
        model: an FCN or DeepLabV3 of `torchvision.models.segmentation`; changed in place.
        key_channels, shrink: of the walk.

    Returns:
        The walk, `model.classifier[-1][0]`; the classifying convolution is `model.classifier[-1][1]`.

    Raises:
        ImportError: no torchvision. TypeError: another model, or one whose classifier does not end with a convolution.
    """
    classifier = _check_model(model).classifier
    if not isinstance(classifier, nn.Sequential) or not isinstance(classifier[-1], nn.Conv2d):
        raise TypeError(f"model: got a {type(classifier).__name__}, expected a classifier that ends with a convolution")
    last = classifier[-1]
    walk = RandomWalk2d(last.in_channels, key_channels, shrink).to(last.weight.device, last.weight.dtype)
    classifier[-1] = nn.Sequential(walk, last)
    return walk
