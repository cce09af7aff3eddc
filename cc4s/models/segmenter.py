"""The segmentation network: a backbone of output stride 8 and a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cc4s.models.dropout import Dropout2d
from cc4s.models.norm import BatchNorm2d
from cc4s.models.resnet import Norm, initialize
from cc4s_kernels.nn import RandomWalk2d
from cc4s_kernels.nn.random_walk import nearest_cells


class SegmenterOutput(NamedTuple):
    """What a segmenter returns.

    logits: (B, C, h, w) at the feature grid; resize with `align_corners=True`.
    q, k: (B, N, d) queries and keys of the random walk; None where the head has no walk.
    features: (B, D, h, w) what the random walk returns (its input where there is no walk).
    grid: rows and columns of q and k, N = grid[0] * grid[1]: (h, w) divided by the walk's shrink factor.
    """

    logits: Tensor
    q: Tensor | None
    k: Tensor | None
    features: Tensor
    grid: tuple[int, int]


class _HeadOutput(NamedTuple):
    logits: Tensor  # [B, C, h, w]
    q: Tensor | None  # [B, N, d]
    k: Tensor | None  # [B, N, d]
    features: Tensor  # [B, D, h, w]


def _conv_norm_relu(inputs: int, outputs: int, kernel: int, norm: Norm, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, norm(outputs), nn.ReLU(inplace=True))


def classifier(inputs: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout of channels and a 1x1 convolution to the classes."""
    conv = nn.Conv2d(inputs, num_classes, 1)
    # Fan in: logits of unit size whatever the number of classes.
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="linear")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(Dropout2d(dropout), conv)


class RandomWalkHead(nn.Module):
    """conv5a -> random walk -> conv51 -> dropout -> conv6 (docs/method.md section 1).

    Args:
        in_channels: channels of the backbone.
        num_classes: C.
        channels: D, the channels the walk runs on.
        key_channels: d; None is D / 8.
        shrink: shrink factor of the walk.
        dropout: probability of dropping a channel before the classifier.
        norm: constructor of a normalisation layer.
        random_walk: False leaves the walk out.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        key_channels: int | None = None,
        shrink: int = 1,
        dropout: float = 0.1,
        norm: Norm = BatchNorm2d,
        random_walk: bool = True,
    ) -> None:
        super().__init__()
        self.conv5a = _conv_norm_relu(in_channels, channels, 3, norm)
        self.conv51 = _conv_norm_relu(channels, channels, 3, norm)
        initialize(self)
        self.walk = RandomWalk2d(channels, key_channels=key_channels, shrink=shrink) if random_walk else None
        self.conv6 = classifier(channels, num_classes, dropout)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of q and k for features of that size."""
        return (height, width) if self.walk is None else self.walk.grid(height, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> _HeadOutput:
        """x: (B, in_channels, h, w); mask: (B, h, w) bool, True where a cell takes part in the walk."""
        z = self.conv5a(x)
        q = k = None
        if self.walk is not None:
            z, q, k = self.walk(z, mask=mask, return_qk=True)
        return _HeadOutput(self.conv6(self.conv51(z)), q, k, z)


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 convolutions (6, 12, 18) and the image's mean.

    It has no random walk: `q` and `k` are None, and a mask has no effect.
    The branch of the image's mean has no norm: a batch of one has no batch statistics at a single cell.

    Args: as in `RandomWalkHead`.
    """

    rates = (6, 12, 18)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
        norm: Norm = BatchNorm2d,
    ) -> None:
        super().__init__()
        branches = [_conv_norm_relu(in_channels, channels, 1, norm)]
        branches += [_conv_norm_relu(in_channels, channels, 3, norm, rate) for rate in self.rates]
        self.branches = nn.ModuleList(branches)
        self.pool = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))
        self.project = _conv_norm_relu(channels * (len(branches) + 1), channels, 1, norm)
        initialize(self)
        self.conv6 = classifier(channels, num_classes, dropout)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The features' own grid."""
        return height, width

    def forward(self, x: Tensor, mask: Tensor | None = None) -> _HeadOutput:
        """x: (B, in_channels, h, w); mask: ignored."""
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        z = self.project(torch.cat([branch(x) for branch in self.branches] + [mean], 1))
        return _HeadOutput(self.conv6(z), None, None, z)


def cell_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Samples a pixel mask at the pixels of the feature cells.

    Cell i of h lies at pixel i (H-1)/(h-1), rounded to the nearest: the positions that resizing with
    `align_corners=True` gives the cells, multiples of 8 where H = 8m + 1.

    Args:
        mask: (B, H, W) bool.
        height, width: h, w of the feature grid.

    Returns:
        (B, h, w) bool.
    """
    rows = nearest_cells(mask.shape[1], height, mask.device)
    columns = nearest_cells(mask.shape[2], width, mask.device)
    return mask[:, rows[:, None], columns[None, :]]


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Raises TypeError or ValueError unless the mask is None or bool (B, H, W) for images x (B, n, H, W)."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected torch.bool")
    expected = (x.shape[0], *x.shape[2:])
    if mask.shape != expected:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {expected}, the image's")


class Segmenter(nn.Module):
    """A backbone and a head. State parts: `backbone.*` and `head.*`.

    Args:
        backbone: maps (B, n, H, W) to (B, F, h, w).
        head: `RandomWalkHead` or `ASPPHead`.
    """

    def __init__(self, backbone: nn.Module, head: RandomWalkHead | ASPPHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def has_walk(self) -> bool:
        """Whether `q` and `k` are returned."""
        return getattr(self.head, "walk", None) is not None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SegmenterOutput:
        """Runs the network.

        Args:
            x: (B, n, H, W) normalised images.
            mask: (B, H, W) bool, True on pixels of the image, False on padding; cells on padding take no part
                in the random walk. None takes all.

        Raises:
            TypeError: `mask` is not bool.
            ValueError: `mask` does not fit `x`.
        """
        check_mask(x, mask)
        x = self.backbone(x)
        height, width = x.shape[2:]
        cells = None if mask is None else cell_mask(mask, height, width)
        out = self.head(x, cells)
        return SegmenterOutput(out.logits, out.q, out.k, out.features, self.head.grid(height, width))
