"""The similarity measurement module: a random walk on neural representations."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cc4s_kernels._validation import check_number, check_shape, check_tensor
from cc4s_kernels.ops.random_walk import random_walk


class RandomWalk2d(nn.Module):
    """z = x + gamma * softmax(Q Kᵀ) V on the positions of a feature map; Q, K, V are 1x1 convolutions of x.

    gamma is learned and 0 at the start, so that a new module passes x through. Best run in
    `torch.channels_last`: then no copy stands between the convolutions and the walk.

    Args:
        in_channels: D, channels of x and z.
        key_channels: d, channels of Q and K; None = D / 8 (at least 1).
        shrink: the walk runs on x resized to ((h-1)//shrink+1, (w-1)//shrink+1), and its result is resized
            back, both bilinear with align_corners=True.

    Source: docs/method.md section 2.
    """

    def __init__(self, in_channels: int, key_channels: int | None = None, shrink: int = 1) -> None:
        super().__init__()
        check_number("in_channels", in_channels, low=1, integer=True)
        key_channels = max(1, in_channels // 8) if key_channels is None else key_channels
        check_number("key_channels", key_channels, low=1, integer=True)
        check_number("shrink", shrink, low=1, integer=True)
        self.in_channels = in_channels
        self.shrink = shrink
        self.query_conv = nn.Conv2d(in_channels, key_channels, 1)
        self.key_conv = nn.Conv2d(in_channels, key_channels, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid that the walk runs on, for a feature map of that size."""
        return (height - 1) // self.shrink + 1, (width - 1) // self.shrink + 1

    def grid_mask(self, mask: Tensor) -> Tensor:
        """The mask (B, h', w') of the positions of `grid`, from the mask (B, h, w) of the feature map."""
        height, width = mask.shape[1:]
        rows, columns = self.grid(height, width)
        return mask[:, nearest_cells(height, rows, mask.device)][:, :, nearest_cells(width, columns, mask.device)]

    @overload
    def forward(self, x: Tensor, mask: Tensor | None = None, return_qk: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_qk: Literal[True]
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_qk: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Runs the walk.

        Args:
            x: (B, D, h, w) floating.
            mask: (B, h, w) bool, True = valid; False (padding) is no state of the walk, and there z = x. With
                `shrink` it is taken at the nearest cell of each sampled position.
            return_qk: also return Q and K, for `EigenspaceConsistencyLoss` and `neural_eigenspace`.

        Returns:
            z (B, D, h, w) in the dtype of x; with `return_qk` (z, q, k), q and k (B, N, d) over the N = h' *
            w' positions of `grid(h, w)` in row-major order.

        Raises:
            TypeError, ValueError: an argument of another shape, dtype or device.
        """
        check_tensor("x", x, dims="(B, D, h, w)", floating=True)
        check_shape("x", x, (x.shape[0], self.in_channels, *x.shape[2:]), "in_channels")
        height, width = x.shape[2:]
        if mask is not None:
            check_tensor("mask", mask, dims="(B, h, w)", dtypes=(torch.bool,), device=x.device)
            check_shape("mask", mask, (x.shape[0], height, width), "that of x without channels")
        rows, columns = self.grid(height, width)
        coarse, coarse_mask = x, mask
        if self.shrink > 1:
            coarse = F.interpolate(x, (rows, columns), mode="bilinear", align_corners=True)
            if mask is not None:
                coarse_mask = self.grid_mask(mask)
        q, k, v = (_positions(conv(coarse)) for conv in (self.query_conv, self.key_conv, self.value_conv))
        walked = random_walk(q, k, v, mask=None if coarse_mask is None else coarse_mask.flatten(1))
        y = walked.mT.unflatten(2, (rows, columns))  # [B, D, h', w']
        if self.shrink > 1:
            y = F.interpolate(y, (height, width), mode="bilinear", align_corners=True)
            if mask is not None:
                y = y.masked_fill(~mask[:, None], 0.0)
        z = x + (self.gamma * y).to(x.dtype)
        return (z, q, k) if return_qk else z


def _positions(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C); a view where x is channels_last."""
    return x.flatten(2).mT


def nearest_cells(size: int, samples: int, device: torch.device) -> Tensor:
    """Of `size` cells, those nearest to `samples` positions from the first cell to the last; ties go up."""
    last = max(samples - 1, 1)
    return (2 * torch.arange(samples, device=device) * (size - 1) + last) // (2 * last)
