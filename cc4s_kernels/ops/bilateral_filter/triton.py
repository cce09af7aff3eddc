"""`bilateral_filter` on Triton: tile by tile in O(N) memory; its own gradient.

docs/kernels/bilateral_filter.md, "GPU (Triton)", explains the tiling.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cc4s_kernels._triton.configs import choose
from cc4s_kernels._triton.launch import LOG2_E, block_of, launch, precision, target_of, tiles

# Columns of a patch; its rows follow from the size of a tile.
PATCH = 16
# exp(-104) is below the smallest float32, denormals included.
LOWEST_EXPONENT = 104.0


@triton.jit
def load_colors(levels, index, valid, n):
    """Red, green and blue [BLOCK] of pixels; 0 where not valid.  levels: [3, n]."""
    red = tl.load(levels + index, mask=valid, other=0.0)
    green = tl.load(levels + n + index, mask=valid, other=0.0)
    blue = tl.load(levels + 2 * n + index, mask=valid, other=0.0)
    return red, green, blue


@triton.jit
def squared_difference(a, b):
    """a [M], b [N] -> [M, N]."""
    d = a[:, None] - b[None, :]
    return d * d


@triton.jit
def bilateral_filter_kernel(
    values,  # [B, CHANNELS, n]
    levels,  # [B, 3, n] float32
    mask,  # [B, n] bool; not read without MASKED
    out,  # [B, CHANNELS, n] out: K values
    height,
    width,
    reach,  # pixels farther away than this have weight 0
    position,  # -log2(e) / (2 sigma_xy^2)
    color,  # -log2(e) / (2 sigma_rgb^2)
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH: tl.constexpr,
    MASKED: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A patch of BLOCK_M pixels and channels channel .. channel + BLOCK_C; sums over the patches within reach."""
    ROWS_M: tl.constexpr = BLOCK_M // PATCH
    ROWS_N: tl.constexpr = BLOCK_N // PATCH
    across = tl.cdiv(width, PATCH)
    patches = tl.cdiv(height, ROWS_M) * across
    splits = tl.cdiv(CHANNELS, BLOCK_C)
    patch = tl.program_id(0) % patches
    rest = tl.program_id(0) // patches
    channel = rest % splits * BLOCK_C
    batch = tl.cast(rest // splits, tl.int64)
    top = patch // across * ROWS_M
    left = patch % across * PATCH
    n = height * width
    values += batch * CHANNELS * n
    levels += batch * 3 * n
    mask += batch * n
    out += batch * CHANNELS * n

    own = tl.arange(0, BLOCK_M)
    own_y = top + own // PATCH
    own_x = left + own % PATCH
    inside = (own_y < height) & (own_x < width)
    own_index = own_y * width + own_x
    valid = inside
    if MASKED:
        valid = valid & (tl.load(mask + own_index, mask=inside, other=0) != 0)
    red, green, blue = load_colors(levels, own_index, valid, n)
    columns = channel + tl.arange(0, BLOCK_C)

    first_row = tl.maximum(top - reach, 0) // ROWS_N
    first_column = tl.maximum(left - reach, 0) // PATCH
    across_n = tl.cdiv(tl.minimum(left + PATCH + reach, width), PATCH) - first_column
    down_n = tl.cdiv(tl.minimum(top + ROWS_M + reach, height), ROWS_N) - first_row
    other = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(down_n * across_n):
        y = (first_row + step // across_n) * ROWS_N + other // PATCH
        x = (first_column + step % across_n) * PATCH + other % PATCH
        there = (y < height) & (x < width)
        index = y * width + x
        if MASKED:
            there = there & (tl.load(mask + index, mask=there, other=0) != 0)
        other_red, other_green, other_blue = load_colors(levels, index, there, n)
        distance = squared_difference(own_y.to(tl.float32), y.to(tl.float32))
        distance += squared_difference(own_x.to(tl.float32), x.to(tl.float32))
        change = squared_difference(red, other_red)
        change += squared_difference(green, other_green)
        change += squared_difference(blue, other_blue)
        weights = tl.exp2(distance * position + change * color)
        if not SELF:
            weights = tl.where(own_index[:, None] == index[None, :], 0.0, weights)
        # Pixels that are not there have finite weights and values 0.
        tile = tl.load(
            values + columns[None, :] * n + index[:, None],
            mask=there[:, None] & (columns[None, :] < CHANNELS),
            other=0.0,
        )
        sums = tl.dot(weights.to(tile.dtype), tile, sums, input_precision=PRECISION)
    sums = tl.where(valid[:, None], sums, 0.0)
    tl.store(
        out + columns[None, :] * n + own_index[:, None],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (columns[None, :] < CHANNELS),
    )


def bilateral_filter(
    values: Tensor, levels: Tensor, mask: Tensor | None, sigma_xy: float, sigma_rgb: float, include_self: bool
) -> Tensor:
    """K values (B, C, H, W); levels (B, 3, H, W) float32."""
    values, levels = values.contiguous(), levels.contiguous()
    batch, channels, height, width = values.shape
    out = torch.empty_like(values)
    if out.numel() == 0:
        return out
    kind = precision(values.dtype)
    config = choose("bilateral_filter", target_of(values), values.dtype, kind, channels)
    block = min(config.v, block_of(channels))
    launch(
        bilateral_filter_kernel,
        batch * tiles(height, config.m // PATCH) * tiles(width, PATCH) * tiles(channels, block),
        *(values, levels, values if mask is None else mask.contiguous(), out),
        *(height, width, min(height + width, math.ceil(sigma_xy * math.sqrt(2 * LOWEST_EXPONENT)))),
        *(-0.5 * LOG2_E / sigma_xy**2, -0.5 * LOG2_E / sigma_rgb**2),
        CHANNELS=channels,
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_C=block,
        PATCH=PATCH,
        MASKED=mask is not None,
        SELF=include_self,
        PRECISION=kind,
        config=config,
    )
    return out
