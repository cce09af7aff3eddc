"""Backbones by name: own ResNets, and those of other packages where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cc4s.errors import UserError
from cc4s.models.norm import norm_layer
from cc4s.models.resnet import RESNETS, ResNet

PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "smp": "segmentation_models_pytorch",
}
"""Prefix of a backbone's name, and the package it comes from."""

_INSTALL = {"timm": "timm", "torchvision": "torchvision", "smp": "segmentation-models-pytorch"}


class ExternalBackbone(nn.Module):
    """A backbone of another package, reduced to its last features.

    Args:
        name: full name, such as "timm/convnext_tiny".
        network: the package's module.
        features: takes the last features (B, F, h, w) from `network` and an image.
        frozen: keep batch norms in evaluation mode, and do not train their affine maps.

    Attributes:
        out_channels: F.
    """

    def __init__(
        self, name: str, network: nn.Module, features: Callable[[nn.Module, Tensor], Tensor], frozen: bool
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.frozen = frozen
        self.out_channels = 0
        # Networks that cut the image into patches drop a rest: 65 pixels give them 8 cells, not 9.
        self.padded = False
        self._features = features
        if frozen:
            for layer in self._batch_norms():
                layer.requires_grad_(False)
            self.train(self.training)

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self.network.modules() if isinstance(m, _BatchNorm)]

    def train(self, mode: bool = True) -> ExternalBackbone:
        super().train(mode)
        if self.frozen:
            for layer in self._batch_norms():
                layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, n, H, W). Returns (B, out_channels, (H-1)//8 + 1, (W-1)//8 + 1)."""
        if self.padded:
            x = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
        return self._features(self.network, x)


def _import(prefix: str, name: str) -> ModuleType:
    package = PACKAGES[prefix]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise UserError(f"model.backbone: {name}: {package} needs {error.name}") from error
        raise UserError(
            f"model.backbone: {name} needs {package}, which is not installed: pip install {_INSTALL[prefix]}"
        ) from error
    except Exception as error:  # a broken installation can fail in any way
        raise UserError(f"model.backbone: {name}: {package} cannot be imported: {_line(error)}") from error


def _line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else f"{line[:117]}..."


def _last(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)[-1]


def _resnet_features(network: Any, x: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
    return x


def _timm(package: Any, name: str, channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    network = package.create_model(name, pretrained=False, features_only=True, output_stride=8, in_chans=channels)
    return network, _last


def _torchvision(package: Any, name: str, channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    models = importlib.import_module("torchvision.models")
    network = models.get_model(name, weights=None, replace_stride_with_dilation=[False, True, True])
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    if not all(hasattr(network, part) for part in parts):
        raise ValueError("only torchvision's ResNets with bottlenecks have output stride 8")
    if channels != 3:
        conv = network.conv1
        network.conv1 = nn.Conv2d(
            channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=conv.bias is not None,
        )
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    # Unused parameters would have no gradient.
    network.fc = nn.Identity()
    return network, _resnet_features


def _smp(package: Any, name: str, channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    encoders = importlib.import_module("segmentation_models_pytorch.encoders")
    network = encoders.get_encoder(name, in_channels=channels, depth=5, weights=None)
    network.make_dilated(8)
    return network, _last


_BUILDERS = {"timm": _timm, "torchvision": _torchvision, "smp": _smp}


def build_backbone(
    name: str, in_channels: int = 3, *, width: int = 64, norm: str = "batch"
) -> ResNet | ExternalBackbone:
    """Builds a backbone of output stride 8, with random weights (nothing is downloaded).

    Args:
        name: resnet18 | resnet34 | resnet50 | resnet101 | resnet152, or `timm/<name>`, `torchvision/<name>`,
            `smp/<name>` where that package is installed.
        in_channels: channels of the image.
        width: channels of the first stage; own ResNets only.
        norm: batch | group | frozen. Backbones of other packages keep their own norms ("batch"), or have
            their batch norms frozen.

    Returns:
        A module with `out_channels` and `name`, mapping (B, n, H, W) to (B, out_channels, h, w), with
        h = (H-1)//8 + 1 and w likewise. Networks that cut images into patches get them padded with zeros, on
        the right and below, to a multiple of 8. Parameters that these features do not depend on are not
        trained.

    Raises:
        UserError: unknown name, package not installed, or a network that has no output stride 8.
    """
    if name in RESNETS:
        return ResNet(name, in_channels, width=width, norm=norm_layer(norm))
    prefix, _, rest = name.partition("/")
    if prefix not in PACKAGES or not rest:
        own = ", ".join(RESNETS)
        others = ", ".join(f"{p}/<name>" for p in PACKAGES)
        raise UserError(f"model.backbone: got {name!r}, expected one of {own}, or {others}")
    norm_layer(norm)
    if norm == "group":
        raise UserError(f"model.norm: group is for own ResNets; with model.backbone={name} expected batch or frozen")
    if width != 64:
        raise UserError(f"model.width: got {width}; with model.backbone={name} expected 64 (it has its own widths)")
    package = _import(prefix, name)
    try:
        network, features = _BUILDERS[prefix](package, rest, in_channels)
        backbone = ExternalBackbone(name, network, features, norm == "frozen")
        probe = _probe(backbone, in_channels)
        if tuple(probe.shape[2:]) == (8, 8):
            backbone.padded = True
            probe = _probe(backbone, in_channels)
    except Exception as error:  # each package has its own errors for unknown names and unsupported strides
        raise UserError(f"model.backbone: {name} cannot be built with output stride 8: {_line(error)}") from error
    if probe.dim() != 4 or tuple(probe.shape[2:]) != (9, 9):
        raise UserError(
            f"model.backbone: {name} gives features of shape {tuple(probe.shape)} for a 65 x 65 image; "
            "expected 9 x 9 cells (output stride 8)"
        )
    backbone.out_channels = probe.shape[1]
    return backbone


def _probe(backbone: ExternalBackbone, in_channels: int) -> Tensor:
    """Features of a 65 x 65 image; leaves out of training what they do not depend on."""
    training = backbone.training
    backbone.eval()
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    with torch.enable_grad():
        features = backbone(torch.zeros(1, in_channels, 65, 65))
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True) if parameters else ()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Distributed training waits for the gradient of every parameter.
        parameter.requires_grad_(gradient is not None)
    backbone.train(training)
    return features.detach()
