"""`gated_crf` on Triton, forward and backward, without atomics.

docs/kernels/gated_crf.md, "GPU (Triton)", explains the schedule. A program owns BLOCK_M adjacent pixels and walks over
the offsets of the window; a tile is [BLOCK_C, BLOCK_M] classes of pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cc4s_kernels._triton.configs import Config, choose
from cc4s_kernels._triton.launch import launch, target_of, tiles

# Partial sums (m) of a tile.
FINISH = Config(256, 0, 0, 4, 1)


@triton.jit
def place(width, blocks, program, BLOCK_M: tl.constexpr):
    """Image, and pixels, rows and columns [BLOCK_M] of a program."""
    pixel = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    return program // blocks, pixel, pixel // width, pixel % width


@triton.jit
def load_gate(gate, row_stride, column_stride, y, x, inside, GATED: tl.constexpr):
    """1 where a pixel is inside and its gate open, else 0.  gate: [H, W] of one image."""
    if GATED:
        at = tl.cast(y, tl.int64) * row_stride + x * column_stride
        return tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, 1.0, 0.0)


@triton.jit
def pair_weights(
    color,  # [c, H, W] of one image
    source,  # [H, W] of one image
    destination,  # [H, W] of one image
    color_channel,
    color_row,
    color_column,
    source_row,
    source_column,
    destination_row,
    destination_column,
    y,
    x,
    dy,
    dx,
    height,
    width,
    channels,
    falloff,
    SOURCE: tl.constexpr,
    DESTINATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """K (d_i s_j + d_j s_i) [BLOCK_M] of pixels i at (y, x) and j at (y + dy, x + dx); whether j is a pixel."""
    here, row, column = y < height, y + dy, x + dx
    inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    near = color + tl.cast(y, tl.int64) * color_row + x * color_column
    far = color + tl.cast(row, tl.int64) * color_row + column * color_column
    square = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(channels):
        difference = tl.load(near, mask=here, other=0.0) - tl.load(far, mask=inside, other=0.0)
        square += difference * difference
        near += color_channel
        far += color_channel
    kernel = tl.exp(-0.5 * square - falloff * (dy * dy + dx * dx).to(tl.float32))
    s_here = load_gate(source, source_row, source_column, y, x, here, SOURCE)
    s_there = load_gate(source, source_row, source_column, row, column, inside, SOURCE)
    d_here = load_gate(destination, destination_row, destination_column, y, x, here, DESTINATION)
    d_there = load_gate(destination, destination_row, destination_column, row, column, inside, DESTINATION)
    return kernel * (d_here * s_there + d_there * s_here), inside


@triton.jit
def load_classes(prob, class_stride, at, first, classes, inside, BLOCK_C: tl.constexpr):
    """[BLOCK_C, BLOCK_M] of prob [C, H, W] from class `first` at offsets `at` [BLOCK_M]."""
    c = first + tl.arange(0, BLOCK_C)
    offsets = tl.cast(c, tl.int64)[:, None] * class_stride + at[None, :]
    return tl.load(prob + offsets, mask=(c < classes)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def energy_kernel(
    prob,  # [B, C, H, W]
    color,  # [B, c, H, W] float32
    source,  # [B, H, W] bool
    destination,  # [B, H, W] bool
    partial,  # [B, blocks] out
    prob_batch,
    prob_class,
    prob_row,
    prob_column,
    color_batch,
    color_channel,
    color_row,
    color_column,
    source_batch,
    source_row,
    source_column,
    destination_batch,
    destination_row,
    destination_column,
    classes,
    height,
    width,
    channels,
    blocks,
    radius,
    falloff,
    SOURCE: tl.constexpr,
    DESTINATION: tl.constexpr,
    SINGLE: tl.constexpr,  # BLOCK_C holds all classes
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over the pairs whose upper or left end is one of BLOCK_M pixels."""
    program = tl.program_id(0)
    batch, _, y, x = place(width, blocks, program, BLOCK_M)
    image = tl.cast(batch, tl.int64)
    prob += image * prob_batch
    color += image * color_batch
    source += image * source_batch
    destination += image * destination_batch
    here = tl.cast(y, tl.int64) * prob_row + x * prob_column
    own = load_classes(prob, prob_class, here, 0, classes, y < height, BLOCK_C)
    energy = tl.zeros([BLOCK_M], tl.float32)
    side = 2 * radius + 1
    # The offsets behind the centre, in raster order.
    for n in range(side * radius + radius + 1, side * side):
        dy, dx = n // side - radius, n % side - radius
        weight, inside = pair_weights(
            color,
            source,
            destination,
            color_channel,
            color_row,
            color_column,
            source_row,
            source_column,
            destination_row,
            destination_column,
            y,
            x,
            dy,
            dx,
            height,
            width,
            channels,
            falloff,
            SOURCE,
            DESTINATION,
            BLOCK_M,
        )
        there = tl.cast(y + dy, tl.int64) * prob_row + (x + dx) * prob_column
        if SINGLE:
            dot = tl.sum(own * load_classes(prob, prob_class, there, 0, classes, inside, BLOCK_C), 0)
        else:
            dot = tl.zeros([BLOCK_M], tl.float32)
            for first in range(0, classes, BLOCK_C):
                p = load_classes(prob, prob_class, here, first, classes, y < height, BLOCK_C)
                q = load_classes(prob, prob_class, there, first, classes, inside, BLOCK_C)
                dot += tl.sum(p * q, 0)
        energy += weight * (1.0 - dot)
    tl.store(partial + program, tl.sum(energy))


@triton.jit
def finish_kernel(
    partial,  # [B, blocks]
    out,  # [B] out
    blocks,
    BLOCK_M: tl.constexpr,
):
    """The sum of an image from those of its programs, always in the same order."""
    batch = tl.program_id(0)
    partial += tl.cast(batch, tl.int64) * blocks
    sums = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, blocks, BLOCK_M):
        block = first + tl.arange(0, BLOCK_M)
        sums += tl.load(partial + block, mask=block < blocks, other=0.0)
    tl.store(out + batch, tl.sum(sums))


@triton.jit
def gradient_kernel(
    prob,  # [B, C, H, W]
    color,  # [B, c, H, W] float32
    source,  # [B, H, W] bool
    destination,  # [B, H, W] bool
    gradient,  # [B] float32
    out,  # [B, C, H, W] out, contiguous
    prob_batch,
    prob_class,
    prob_row,
    prob_column,
    color_batch,
    color_channel,
    color_row,
    color_column,
    source_batch,
    source_row,
    source_column,
    destination_batch,
    destination_row,
    destination_column,
    classes,
    height,
    width,
    channels,
    blocks,
    parts,  # of classes
    radius,
    falloff,
    SOURCE: tl.constexpr,
    DESTINATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of BLOCK_C classes of BLOCK_M pixels: each gathers from its whole window."""
    first = tl.program_id(0) % parts * BLOCK_C
    batch, pixel, y, x = place(width, blocks, tl.program_id(0) // parts, BLOCK_M)
    image = tl.cast(batch, tl.int64)
    prob += image * prob_batch
    color += image * color_batch
    source += image * source_batch
    destination += image * destination_batch
    sums = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    side = 2 * radius + 1
    for n in range(side * side):
        dy, dx = n // side - radius, n % side - radius
        weight, inside = pair_weights(
            color,
            source,
            destination,
            color_channel,
            color_row,
            color_column,
            source_row,
            source_column,
            destination_row,
            destination_column,
            y,
            x,
            dy,
            dx,
            height,
            width,
            channels,
            falloff,
            SOURCE,
            DESTINATION,
            BLOCK_M,
        )
        # A pixel is no pair with itself.
        weight = tl.where((dy == 0) & (dx == 0), 0.0, weight)
        there = tl.cast(y + dy, tl.int64) * prob_row + (x + dx) * prob_column
        sums += weight[None, :] * load_classes(prob, prob_class, there, first, classes, inside, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    at = (image * classes + c)[:, None] * (tl.cast(height, tl.int64) * width) + pixel[None, :]
    tl.store(
        out + at,
        (-tl.load(gradient + batch) * sums).to(out.dtype.element_ty),
        mask=(c < classes)[:, None] & (y < height)[None, :],
    )


def _gates(source: Tensor | None, destination: Tensor | None, color: Tensor) -> tuple[list[Tensor], list[int]]:
    """Both gates and their strides; an open one is a tensor that is not read."""
    gates = [color if gate is None else gate for gate in (source, destination)]
    strides = [stride for gate in (source, destination) for stride in ((0, 0, 0) if gate is None else gate.stride())]
    return gates, strides


def _config(prob: Tensor) -> tuple[Config, int]:
    """The configuration, and the classes of a tile."""
    classes = prob.shape[1]
    config = choose("gated_crf", target_of(prob), prob.dtype, "ieee", classes)
    return config, min(triton.next_power_of_2(max(classes, 1)), config.n)


def forward(
    prob: Tensor, color: Tensor, source: Tensor | None, destination: Tensor | None, radius: int, sigma_xy: float
) -> Tensor:
    """Sums over pairs (B,) float32."""
    batch, classes, height, width = prob.shape
    config, block_c = _config(prob)
    blocks = tiles(height * width, config.m)
    partial = prob.new_empty((batch, blocks), dtype=torch.float32)
    out = prob.new_empty(batch, dtype=torch.float32)
    gates, strides = _gates(source, destination, color)
    launch(
        energy_kernel,
        batch * blocks,
        *(prob, color, *gates, partial, *prob.stride(), *color.stride(), *strides),
        *(classes, height, width, color.shape[1], blocks, radius, 0.5 / sigma_xy**2),
        SOURCE=source is not None,
        DESTINATION=destination is not None,
        SINGLE=classes <= block_c,
        BLOCK_M=config.m,
        BLOCK_C=block_c,
        config=config,
    )
    launch(finish_kernel, batch, partial, out, blocks, BLOCK_M=FINISH.m, config=FINISH)
    return out


def backward(
    gradient: Tensor,
    prob: Tensor,
    color: Tensor,
    source: Tensor | None,
    destination: Tensor | None,
    radius: int,
    sigma_xy: float,
) -> Tensor:
    """Gradient of prob, contiguous."""
    batch, classes, height, width = prob.shape
    config, block_c = _config(prob)
    blocks = tiles(height * width, config.m)
    out = torch.empty(prob.shape, dtype=prob.dtype, device=prob.device)
    gates, strides = _gates(source, destination, color)
    parts = tiles(classes, block_c)
    launch(
        gradient_kernel,
        batch * blocks * parts,
        *(prob, color, *gates, gradient.contiguous(), out, *prob.stride(), *color.stride(), *strides),
        *(classes, height, width, color.shape[1], blocks, parts, radius, 0.5 / sigma_xy**2),
        SOURCE=source is not None,
        DESTINATION=destination is not None,
        BLOCK_M=config.m,
        BLOCK_C=block_c,
        config=config,
    )
    return out
