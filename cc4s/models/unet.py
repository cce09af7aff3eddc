"""The two-dimensional U-Net that is usual on ACDC, with the random walk at a level of one's choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cc4s.models.norm import BatchNorm2d
from cc4s.models.resnet import Norm, initialize
from cc4s.models.segmenter import SegmenterOutput, cell_mask, check_mask, classifier
from cc4s_kernels.nn import RandomWalk2d

LEVELS = 5


def _double_conv(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), norm(outputs), nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Five levels of two 3x3 convolutions, with skips; logits at the size of the image.

    Level l has `width` * 2^l channels at stride 2^l; level 4 is the bottleneck. With width 16 it is the network of the
    scribble benchmarks on ACDC (github.com/HiLab-git/WSL4MIS), with two differences: dropout stands only before the
    classifier, and max-pooling looks at 3 x 3 pixels round every second one. So an image of 2^l m + 1 pixels has m + 1
    cells at level l, on pixels: mirrored and cropped images have mirrored and cropped cells, which the consistency
    of transition matrices needs. Bilinear upsampling with align_corners=True keeps them there on the way up.

    Args:
        in_channels: channels of the images.
        num_classes: C.
        width: channels at full size.
        walk_level: the level whose last features the walk runs on, 1 to 4.
        key_channels: d of the walk; None is an eighth of its channels.
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
        width: int = 16,
        walk_level: int = 3,
        key_channels: int | None = None,
        shrink: int = 1,
        dropout: float = 0.1,
        norm: Norm = BatchNorm2d,
        random_walk: bool = True,
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.walk_level = walk_level
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.down = nn.ModuleList(
            _double_conv(inputs, outputs, norm)
            for inputs, outputs in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        # From the bottleneck up.
        self.reduce = nn.ModuleList(nn.Conv2d(widths[level + 1], widths[level], 1) for level in reversed(range(4)))
        self.up = nn.ModuleList(_double_conv(2 * widths[level], widths[level], norm) for level in reversed(range(4)))
        initialize(self)
        self.walk: RandomWalk2d | None = None
        if random_walk:
            channels = widths[walk_level]
            self.walk = RandomWalk2d(channels, key_channels or max(1, channels // 8), shrink=shrink)
        self.classifier = classifier(width, num_classes, dropout)

    @property
    def has_walk(self) -> bool:
        """Whether `q` and `k` are returned."""
        return self.walk is not None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SegmenterOutput:
        """Runs the network.

        Args, errors: as `Segmenter.forward`. Images of any size; the sizes of a training with consistency are
        multiples of 2^walk_level plus 1.
        """
        check_mask(x, mask)
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        q = k = None
        features = x = skips.pop()
        grid = (x.shape[2], x.shape[3])
        for level in reversed(range(LEVELS)):
            if level < LEVELS - 1:
                step = LEVELS - 2 - level
                skip = skips.pop()
                x = F.interpolate(self.reduce[step](x), skip.shape[2:], mode="bilinear", align_corners=True)
                x = self.up[step](torch.cat([skip, x], 1))
            if level == self.walk_level:
                grid = (x.shape[2], x.shape[3])
                if self.walk is not None:
                    cells = None if mask is None else cell_mask(mask, *grid)
                    grid = self.walk.grid(*grid)
                    x, q, k = self.walk(x, mask=cells, return_qk=True)
                features = x
        return SegmenterOutput(self.classifier(x), q, k, features, grid)
