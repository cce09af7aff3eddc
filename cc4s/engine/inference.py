"""Class probabilities of whole images: sliding windows, scales and flips (docs/method.md section 9)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cc4s.config import DataConfig, InferenceConfig
from cc4s.data import normalize


class Predictor:
    """Averages softmax probabilities over scales, flips and overlapping windows.

    Args:
        network: a segmenter in eval mode, on the device it shall run on.
        inference: scales, flip, long side, window and stride.
        data: channel statistics for normalisation.
    """

    def __init__(self, network: nn.Module, inference: InferenceConfig, data: DataConfig) -> None:
        self.network = network.eval()
        self.inference = inference
        self.data = data

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """Mean class probabilities at the image's own size.

        Args:
            image: (channels, H, W) float in [0, 1], any size.

        Returns:
            (C, H, W) float32 on the network's device; sums to 1 over C.
        """
        device = next(self.network.parameters()).device
        pixels = normalize(image.to(device), self.data)[None]  # [1, channels, H, W]
        height, width = pixels.shape[-2:]
        long_side = self.inference.long_side or max(height, width)
        total: Tensor | None = None
        for scale in self.inference.scales:
            factor = scale * long_side / max(height, width)
            size = (max(1, round(height * factor)), max(1, round(width * factor)))
            scaled = pixels
            if size != (height, width):
                scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=factor < 1)
            views = [scaled, scaled.flip(-1)] if self.inference.flip else [scaled]
            for index, view in enumerate(views):
                probability = self._windows(view)  # [1, C, h, w]
                if index:
                    probability = probability.flip(-1)
                if size != (height, width):
                    probability = F.interpolate(probability, size=(height, width), mode="bilinear", align_corners=False)
                total = probability if total is None else total + probability
        assert total is not None
        return total[0] / total[0].sum(0, keepdim=True)

    def _windows(self, image: Tensor) -> Tensor:
        """Softmax probabilities (1, C, h, w) of one scaled image, averaged where windows overlap."""
        height, width = image.shape[-2:]
        window = self.inference.window
        tall, wide = min(window, height), min(window, width)
        total: Tensor | None = None
        count = image.new_zeros(1, 1, height, width)
        for top, left in window_corners(height, width, window, self.inference.stride):
            part = image[..., top : top + tall, left : left + wide]
            # Not compiled: every image size would be compiled anew.
            logits = self.network.forward(part).logits.float()
            logits = F.interpolate(logits, size=(tall, wide), mode="bilinear", align_corners=True)
            probability = logits.softmax(1)
            if (tall, wide) == (height, width):
                return probability
            if total is None:
                total = probability.new_zeros(1, probability.shape[1], height, width)
            total[..., top : top + tall, left : left + wide] += probability
            count[..., top : top + tall, left : left + wide] += 1
        assert total is not None
        return total / count


def window_corners(height: int, width: int, window: int, stride: float) -> Iterator[tuple[int, int]]:
    """Top-left corners of windows that cover an image; the last ones are flush with its border."""
    step = max(1, round(window * stride))

    def starts(length: int) -> list[int]:
        if length <= window:
            return [0]
        return [*range(0, length - window, step), length - window]

    for top in starts(height):
        for left in starts(width):
            yield top, left
