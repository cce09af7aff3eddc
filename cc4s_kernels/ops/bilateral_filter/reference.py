"""Definition of `bilateral_filter` in plain PyTorch; builds the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype, without_autocast


def image_levels(image: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) colours in levels 0..255 in `dtype`, 0 at masked pixels (whatever stood there, NaN included)."""
    levels = image.detach().to(dtype)
    if image.is_floating_point():
        levels = levels * 255
    return levels if mask is None else levels.masked_fill(~mask[:, None], 0.0)


def kernel_matrix(levels: Tensor, mask: Tensor | None, sigma_xy: float, sigma_rgb: float, include_self: bool) -> Tensor:
    """K (B, N, N), N = H W: 0 in rows and columns of masked pixels, and on the diagonal without `include_self`."""
    _, _, height, width = levels.shape
    rows = torch.arange(height, device=levels.device, dtype=levels.dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=levels.device, dtype=levels.dtype).expand(height, width)

    def squares(plane: Tensor) -> Tensor:
        # Differences, not an inner product: squares of colours would cancel.
        flat = plane.flatten(-2)
        return (flat[..., :, None] - flat[..., None, :]).square()

    position = squares(rows) + squares(columns)  # [N, N]
    color = squares(levels[:, 0]) + squares(levels[:, 1]) + squares(levels[:, 2])  # [B, N, N]
    kernel = torch.exp(position * (-0.5 / sigma_xy**2) + color * (-0.5 / sigma_rgb**2))
    if not include_self:
        kernel = kernel.masked_fill(torch.eye(height * width, dtype=torch.bool, device=levels.device), 0.0)
    if mask is not None:
        valid = mask.flatten(1)
        kernel = kernel.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0.0)
    return kernel


def bilateral_filter(
    values: Tensor,
    image: Tensor,
    *,
    sigma_xy: float,
    sigma_rgb: float,
    mask: Tensor | None = None,
    include_self: bool = False,
) -> Tensor:
    """See `cc4s_kernels.bilateral_filter`."""
    dtype = accumulation_dtype(values.dtype)
    with without_autocast(values.device):
        levels = image_levels(image, mask, dtype)
        kernel = kernel_matrix(levels, mask, sigma_xy, sigma_rgb, include_self)
        wide = values.to(dtype)
        if mask is not None:
            wide = wide.masked_fill(~mask[:, None], 0.0)
        filtered = wide.flatten(2) @ kernel  # [B, C, N]; K is symmetric
        return filtered.reshape(values.shape).to(values.dtype)
