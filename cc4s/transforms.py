"""The image transforms of self-supervision: drawn per step, applied to pixels and known to the loss in cells."""

from __future__ import annotations

import random
from collections.abc import Callable

from torch import Tensor

from cc4s.config import ConsistencyConfig
from cc4s_kernels.nn import Crop, Flip


class ImageTransform:
    """One drawn transform.

    Attributes:
        cells: what it does to the grid of positions of the random walk (`Flip` or `Crop`).
        pixels: what it does to an image or mask (..., H, W).
    """

    def __init__(self, cells: Flip | Crop, pixels: Callable[[Tensor], Tensor]) -> None:
        self.cells = cells
        self.pixels = pixels


def draw(config: ConsistencyConfig, side: int, pitch: int, rng: random.Random) -> ImageTransform:
    """Draws a transform for square images.

    Crops start at multiples of the cell pitch and have sides of a whole number of pitches plus one pixel, so that
    cells of the crop are cells of the image; their sizes come from a short list (few shapes to compile).

    Args:
        config: which transforms, and the shares of the side a crop keeps.
        side: height and width of the images in pixels.
        pitch: pixels between the cells of the random walk; the sides are a multiple of it plus 1.
        rng: source of randomness.
    """
    cells = (side - 1) // pitch + 1
    kind = rng.choice(config.transforms)
    if kind == "flip":
        return ImageTransform(Flip(cells, cells), lambda image: image.flip(-1))
    if kind == "crop":
        tall = _kept(cells, rng.choice(config.crop_shares))
        wide = _kept(cells, rng.choice(config.crop_shares))
        top, left = rng.randint(0, cells - tall), rng.randint(0, cells - wide)
    else:
        # The released bands: full width, 49 of 59 rows, at the top or at the bottom.
        tall, wide = _kept(cells, 49 / 59), cells
        top, left = rng.choice((0, cells - tall)), 0
    rows = slice(top * pitch, (top + tall - 1) * pitch + 1)
    columns = slice(left * pitch, (left + wide - 1) * pitch + 1)
    return ImageTransform(
        Crop(cells, cells, top, left, tall, wide), lambda image: image[..., rows, columns].contiguous()
    )


def _kept(cells: int, share: float) -> int:
    return min(cells, max(2, round(share * (cells - 1)) + 1))
