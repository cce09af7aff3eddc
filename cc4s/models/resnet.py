"""Dilated ResNets of output stride 8, with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from cc4s.models.norm import BatchNorm2d

Norm = Callable[[int], nn.Module]
Style = Literal["torchvision", "released"]


class _Block(nn.Module):
    """A residual block. Subclasses build `conv1, bn1, conv2, bn2 (, conv3, bn3)` in torchvision's names."""

    expansion = 1

    def __init__(self, downsample: nn.Module | None) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch(x) + identity)


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(_Block):
    """Two 3x3 convolutions (ResNet-18, 34). `entry_dilation` is that of the first."""

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        entry_dilation: int,
        dilation: int,
        downsample: nn.Module | None,
        norm: Norm,
        style: Style,
    ) -> None:
        super().__init__(downsample)
        self.conv1 = _conv3x3(inputs, planes, stride, 1 if style == "released" else entry_dilation)
        self.bn1 = norm(planes)
        self.conv2 = _conv3x3(planes, planes, 1, dilation)
        self.bn2 = norm(planes)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions (ResNet-50, 101, 152)."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        entry_dilation: int,
        dilation: int,
        downsample: nn.Module | None,
        norm: Norm,
        style: Style,
    ) -> None:
        super().__init__(downsample)
        released = style == "released"
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride if released else 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = _conv3x3(planes, planes, 1 if released else stride, dilation if released else entry_dilation)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = norm(planes * 4)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Block type and number of blocks per stage."""

_STRIDES = (1, 2, 1, 1)
_DILATIONS = (1, 1, 2, 4)


class ResNet(nn.Module):
    """A ResNet with output stride 8: layer3 keeps the grid with dilation 2, layer4 with dilation 4.

    Parameter names are torchvision's, without `fc`. Two styles differ in details that weights depend on:

    - "torchvision" (the default, for torchvision's weights and for training from scratch): the bottleneck's
      stride is on its 3x3 convolution, max-pooling rounds down, and the first strided convolution of layer3
      and layer4 keeps the dilation of the layer before. The features are then exactly those of the plain
      stride-32 network, on a denser grid: every 4th cell has the plain network's value.
    - "released" (the authors' checkpoints only): the stride is on the first 1x1 convolution, max-pooling
      rounds up, and all blocks of a layer have the layer's dilation (in basic blocks only the second
      convolution).

    An image of H pixels gives (H-1)//8 + 1 cells. The released style gives one more where H % 8 is 7 or 0,
    because of its max-pooling; sides 8m + 1, such as 465 with 59 cells, agree in both.

    Args:
        name: a key of `RESNETS`.
        in_channels: channels of the image.
        width: channels of the first stage, 64 in the published networks.
        norm: constructor of a normalisation layer from its number of channels.
        style: see above.

    Attributes:
        out_channels: channels of the features: 8 * width, times 4 with bottlenecks.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        *,
        width: int = 64,
        norm: Norm = BatchNorm2d,
        style: Style = "torchvision",
    ) -> None:
        super().__init__()
        block, counts = RESNETS[name]
        self.name = name
        self.style = style
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=style == "released")
        inputs = width
        previous = 1
        for i, (count, stride, dilation) in enumerate(zip(counts, _STRIDES, _DILATIONS, strict=True)):
            planes = width * 2**i
            blocks = []
            for j in range(count):
                step = stride if j == 0 else 1
                outputs = planes * block.expansion
                downsample = None
                if step != 1 or inputs != outputs:
                    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, step, bias=False), norm(outputs))
                entry = previous if j == 0 else dilation
                blocks.append(block(inputs, planes, step, entry, dilation, downsample, norm, style))
                inputs = outputs
            previous = dilation
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.out_channels = inputs
        initialize(self)

    def cells(self, pixels: int) -> int:
        """Number of feature cells along a side of `pixels` pixels."""
        return (pixels + 1 if self.style == "released" else pixels - 1) // 8 + 1

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x


def initialize(module: nn.Module) -> None:
    """Kaiming initialisation (normal, fan out, ReLU) of all convolutions; biases become 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
