"""`potts` on Triton: superpixel graphs and pixel grids, forward and backward, without atomics.

docs/kernels/potts.md, "GPU (Triton)", explains the schedule. Pairs of a tile are [N, BLOCK] on a grid (N neighbours of
BLOCK adjacent pixels) and [BLOCK] edges on a graph. The derivative of a relaxation r(p, q) is given by three
numbers to a pair: dr/dp = slope * (p - q) [- slope / 2 for the log-quadratic one] for the two
quadratic ones without a cosine, else slope * q + near * p and dr/dq = slope * p + far * q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cc4s_kernels._triton.configs import Config
from cc4s_kernels._triton.launch import launch, tiles
from cc4s_kernels.ops.potts.reference import EPS

# Pixels (m) of one warp, so that the sum over neighbours stays in a thread.
GRID = Config(64, 0, 0, 1, 1)
# Edges (m) and classes (v) of a tile.
EDGES = Config(32, 0, 32, 4, 1)
# Nodes that a program owns (m), edges (n) and classes (v) of a tile.
NODES = Config(32, 64, 32, 4, 1)
# Partial sums (m) of a tile.
FINISH = Config(256, 0, 0, 4, 1)

_EPS = tl.constexpr(EPS)


# ---- relaxations


@triton.jit
def own_term(p, RELAXATION: tl.constexpr):
    """A class's part in what a relaxation needs of each end alone: |p|^2, sum p (1 - p), or nothing."""
    return p * (1.0 - p) if RELAXATION == "log_quadratic" else p * p


@triton.jit
def pair_term(p, q, RELAXATION: tl.constexpr):
    """A class's part in p.q, or in |p - q|^2 for the quadratic relaxation."""
    return (p - q) * (p - q) if RELAXATION == "quadratic" else p * q


@triton.jit
def negative_log(x):
    """-ln(eps + (1 - eps) x), x kept within 0 and 1, and its derivative."""
    # Comparisons: minimum and maximum would lose a NaN.
    inside = tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))
    shifted = _EPS + (1 - _EPS) * inside
    value = -tl.log(shifted)
    # A rounding of the logarithm of 1 must not make an energy negative.
    value = tl.where(value < 0, 0.0, value)
    return value, tl.where((x >= 0) & (x <= 1), -(1 - _EPS) / shifted, 0.0)


@triton.jit
def cosine(product, p, q):
    """p.q / (|p| |q|), at most 1, and its derivative (slope, near, far); all 0 where p or q is 0."""
    squares = p * q
    some = squares > 0
    # Correctly rounded: the cosine of equal distributions is exactly 1.
    length = tl.sqrt_rn(tl.where(some, squares, 1.0))
    ratio = tl.div_rn(product, length)
    slope = tl.where(some & (ratio <= 1), 1.0 / length, 0.0)
    back = -(ratio / length) * slope
    return tl.where(some, tl.where(ratio > 1, 1.0, ratio), 0.0), slope, back * q, back * p


@triton.jit
def relax(product, p, q, RELAXATION: tl.constexpr):
    """(r, slope, near, far) of pairs, from p.q or |p - q|^2 and from what each end has alone."""
    near = tl.zeros_like(product)
    far = near
    if RELAXATION == "bilinear":
        value = 1.0 - product
        slope = tl.where(value >= 0, -1.0, 0.0)
        value = tl.where(value < 0, 0.0, value)
    elif RELAXATION == "quadratic":
        value = 0.5 * product
        slope = near + 1.0
    elif RELAXATION == "normalized_quadratic":
        value, slope, near, far = cosine(product, p, q)
        value, slope, near, far = 1.0 - value, -slope, -near, -far
    elif RELAXATION == "collision_cross_entropy":
        value, slope = negative_log(product)
    elif RELAXATION == "collision_divergence":
        ratio, slope, near, far = cosine(product, p, q)
        value, outer = negative_log(ratio)
        slope, near, far = outer * slope, outer * near, outer * far
    else:
        value, outer = negative_log(product + 0.5 * p + 0.5 * q)
        slope = -outer
    return value, slope, near, far


@triton.jit
def image_factors(gradient, energy, scale, batch, NORM: tl.constexpr):
    """d energy / d r = w * slope, d energy / d w = r * slope - shift - shift_by_weight * w, times the gradient [B]."""
    s = tl.load(scale + batch)
    empty = s == 0
    g = tl.load(gradient + batch)
    divisor = tl.where(empty, 1.0, s)
    shift = tl.where(empty, 0.0, 2.0 * g * tl.load(energy + batch) / divisor)
    by_weight = tl.full([], 0.0, tl.float32)
    if NORM == "frobenius":
        by_weight = shift / divisor
    if NORM != "sum":
        shift = tl.full([], 0.0, tl.float32)
    return 4.0 * g / divisor, shift, by_weight


@triton.jit
def store_sums(partial, values, weights):
    """sum w r, sum w and sum w^2 of this program."""
    partial += tl.cast(tl.program_id(0), tl.int64) * 3
    tl.store(partial, tl.sum(weights * values))
    tl.store(partial + 1, tl.sum(weights))
    tl.store(partial + 2, tl.sum(weights * weights))


@triton.jit
def finish_kernel(
    partial,  # [B, blocks, 3]
    energy,  # [B] out
    scale,  # [B] out, 0 where there was no weight
    blocks,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The energy of an image from the sums of its programs, always in the same order."""
    batch = tl.program_id(0)
    partial += tl.cast(batch, tl.int64) * blocks * 3
    energies = tl.zeros([BLOCK_M], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, blocks, BLOCK_M):
        block = first + tl.arange(0, BLOCK_M)
        inside = block < blocks
        energies += tl.load(partial + block * 3, mask=inside, other=0.0)
        weights += tl.load(partial + block * 3 + 1, mask=inside, other=0.0)
        squares += tl.load(partial + block * 3 + 2, mask=inside, other=0.0)
    # Over ordered pairs: twice the sums over pairs.
    norm = 2.0 * tl.sum(weights)
    if NORM == "frobenius":
        norm = tl.sqrt_rn(2.0 * tl.sum(squares))
    if NORM == "none":
        norm = 1.0
    # NaN weights stay NaN.
    tl.store(energy + batch, 4.0 * tl.sum(energies) / tl.where(norm == 0, 1.0, norm))
    tl.store(scale + batch, norm)


# ---- grids


@triton.jit
def grid_place(width, blocks, BLOCK: tl.constexpr):
    """Image, and pixels, rows and columns [BLOCK] of this program."""
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0) // blocks, pixel, pixel // width, pixel % width


@triton.jit
def neighbours(y, x, height, width, DIRECTIONS: tl.constexpr, N: tl.constexpr):
    """The other ends of the pairs of pixels (y, x) [BLOCK].

    Returns: direction [N, 1], row and column [N, BLOCK], whether both ends are in the grid [N, BLOCK]. With N twice
    the number of directions, the pixel is the lower end of the pairs in the second half.
    """
    n = tl.arange(0, N)[:, None]
    direction = n % DIRECTIONS
    # Right, down, down-right, down-left.
    down = tl.where(direction == 0, 0, 1)
    right = tl.where(direction == 1, 0, tl.where(direction == 3, -1, 1))
    sign = tl.where(n < DIRECTIONS, 1, -1)
    row = y[None, :] + sign * down
    column = x[None, :] + sign * right
    # Pixels behind the last one have their row beyond the grid.
    inside = (y < height)[None, :] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return direction, row, column, inside


@triton.jit
def pair_weights(weight, direction_stride, row_stride, column_stride, direction, y, x, inside):
    """weight[direction, y, x] of one image, 0 where not inside."""
    at = tl.cast(direction, tl.int64) * direction_stride + tl.cast(y, tl.int64) * row_stride + x * column_stride
    return tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def grid_pairs(
    prob,  # [C, H, W] of one image
    class_stride,
    here,  # [BLOCK] offsets of the pixels
    there,  # [N, BLOCK] offsets of their neighbours
    here_inside,
    there_inside,
    classes,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    RELAXATION: tl.constexpr,
):
    """(r, slope, near, far) [N, BLOCK] of each pixel p and its neighbours q."""
    product = tl.zeros([N, BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([N, BLOCK], tl.float32)
    for _ in range(classes):
        p = tl.load(prob + here, mask=here_inside, other=0.0).to(tl.float32)
        q = tl.load(prob + there, mask=there_inside, other=0.0).to(tl.float32)
        product += pair_term(p[None, :], q, RELAXATION)
        own += own_term(p, RELAXATION)
        other += own_term(q, RELAXATION)
        prob += class_stride
    return relax(product, own[None, :], other, RELAXATION)


@triton.jit
def grid_kernel(
    prob,  # [B, C, H, W]
    weight,  # [B or 1, D, H, W]
    partial,  # [B, blocks, 3] out
    prob_batch,
    prob_class,
    prob_row,
    prob_column,
    weight_batch,
    weight_direction,
    weight_row,
    weight_column,
    classes,
    height,
    width,
    blocks,
    DIRECTIONS: tl.constexpr,
    RELAXATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums over the pairs that BLOCK_M pixels own."""
    batch, _, y, x = grid_place(width, blocks, BLOCK_M)
    direction, row, column, inside = neighbours(y, x, height, width, DIRECTIONS, DIRECTIONS)
    prob += tl.cast(batch, tl.int64) * prob_batch
    weight += tl.cast(batch, tl.int64) * weight_batch
    here = tl.cast(y, tl.int64) * prob_row + x * prob_column
    there = tl.cast(row, tl.int64) * prob_row + column * prob_column
    values, _, _, _ = grid_pairs(
        prob, prob_class, here, there, y < height, inside, classes, DIRECTIONS, BLOCK_M, RELAXATION
    )
    weights = pair_weights(
        weight, weight_direction, weight_row, weight_column, direction, y[None, :], x[None, :], inside
    )
    store_sums(partial, values, weights)


@triton.jit
def grid_prob_kernel(
    prob,  # [B, C, H, W]
    weight,  # [B or 1, D, H, W]
    gradient,  # [B]
    energy,  # [B]
    scale,  # [B]
    out,  # [B, C, H, W] out, contiguous
    prob_batch,
    prob_class,
    prob_row,
    prob_column,
    weight_batch,
    weight_direction,
    weight_row,
    weight_column,
    classes,
    height,
    width,
    blocks,
    DIRECTIONS: tl.constexpr,
    RELAXATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradient of BLOCK_M pixels: each gathers from all of its neighbours."""
    N: tl.constexpr = 2 * DIRECTIONS
    batch, pixel, y, x = grid_place(width, blocks, BLOCK_M)
    direction, row, column, inside = neighbours(y, x, height, width, DIRECTIONS, N)
    factor, _, _ = image_factors(gradient, energy, scale, batch, NORM)
    prob += tl.cast(batch, tl.int64) * prob_batch
    weight += tl.cast(batch, tl.int64) * weight_batch
    here = tl.cast(y, tl.int64) * prob_row + x * prob_column
    there = tl.cast(row, tl.int64) * prob_row + column * prob_column
    # A pair belongs to its upper or left end.
    upper = tl.arange(0, N)[:, None] < DIRECTIONS
    owner_y, owner_x = tl.where(upper, y[None, :], row), tl.where(upper, x[None, :], column)
    weights = pair_weights(weight, weight_direction, weight_row, weight_column, direction, owner_y, owner_x, inside)
    # A factor of NaN is for pairs only.
    slope = tl.where(inside, weights * factor, 0.0)
    base = tl.zeros([BLOCK_M], tl.float32)
    if RELAXATION != "quadratic":
        _, pair_slope, near, _ = grid_pairs(
            prob, prob_class, here, there, y < height, inside, classes, N, BLOCK_M, RELAXATION
        )
        base = tl.sum(slope * near, 0)
        slope = slope * pair_slope
    if RELAXATION == "log_quadratic":
        base = -0.5 * tl.sum(slope, 0)
    out += tl.cast(batch, tl.int64) * classes * height * width + pixel
    for _ in range(classes):
        p = tl.load(prob + here, mask=y < height, other=0.0).to(tl.float32)
        q = tl.load(prob + there, mask=inside, other=0.0).to(tl.float32)
        if RELAXATION == "quadratic" or RELAXATION == "log_quadratic":
            sums = base + tl.sum(slope * (p[None, :] - q), 0)
        else:
            sums = base * p + tl.sum(slope * q, 0)
        tl.store(out, sums.to(out.dtype.element_ty), mask=y < height)
        prob += prob_class
        out += tl.cast(height, tl.int64) * width


@triton.jit
def grid_weight_kernel(
    prob,  # [B, C, H, W]
    weight,  # [B or 1, D, H, W]
    gradient,  # [B]
    energy,  # [B]
    scale,  # [B]
    out,  # [B or 1, D, H, W] out, contiguous
    prob_batch,
    prob_class,
    prob_row,
    prob_column,
    weight_batch,
    weight_direction,
    weight_row,
    weight_column,
    classes,
    height,
    width,
    blocks,
    images,
    DIRECTIONS: tl.constexpr,
    RELAXATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradient of the weights that BLOCK_M pixels own, summed over the images that share them."""
    group, pixel, y, x = grid_place(width, blocks, BLOCK_M)
    direction, row, column, inside = neighbours(y, x, height, width, DIRECTIONS, DIRECTIONS)
    weight += tl.cast(group, tl.int64) * weight_batch
    weights = pair_weights(
        weight, weight_direction, weight_row, weight_column, direction, y[None, :], x[None, :], inside
    )
    here = tl.cast(y, tl.int64) * prob_row + x * prob_column
    there = tl.cast(row, tl.int64) * prob_row + column * prob_column
    prob += tl.cast(group, tl.int64) * images * prob_batch
    sums = tl.zeros([DIRECTIONS, BLOCK_M], tl.float32)
    for image in range(images):
        factor, shift, by_weight = image_factors(gradient, energy, scale, group * images + image, NORM)
        values, _, _, _ = grid_pairs(
            prob, prob_class, here, there, y < height, inside, classes, DIRECTIONS, BLOCK_M, RELAXATION
        )
        sums += values * factor - (shift + by_weight * weights)
        prob += prob_batch
    out += tl.cast(group * DIRECTIONS + direction, tl.int64) * height * width + pixel[None, :]
    tl.store(out, tl.where(inside, sums, 0.0).to(out.dtype.element_ty), mask=(y < height)[None, :])


# ---- graphs


@triton.jit
def edge_tile(
    edge_index,  # [2, E] of one image
    weight,  # [E] of one image
    side_stride,
    edge_stride,
    weight_stride,
    edge,  # [BLOCK]
    edges,
    nodes,
):
    """Both ends, whether they are nodes, and weights of edges: 0 behind the last one, NaN where an end is no node."""
    there = edge < edges
    place = tl.cast(edge, tl.int64)
    first = tl.load(edge_index + place * edge_stride, mask=there, other=0)
    second = tl.load(edge_index + side_stride + place * edge_stride, mask=there, other=0)
    valid = there & (first >= 0) & (first < nodes) & (second >= 0) & (second < nodes)
    weights = tl.load(weight + place * weight_stride, mask=there, other=0.0).to(tl.float32)
    return first, second, valid, tl.where(there & ~valid, float("nan"), weights)


@triton.jit
def load_nodes(prob, node_stride, class_stride, node, valid, column, classes, COLUMNS: tl.constexpr):
    """[BLOCK, COLUMNS] rows of prob [K, C], 0 where not valid."""
    columns = column + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < classes)[None, :]
    at = node[:, None] * node_stride + tl.cast(columns, tl.int64)[None, :] * class_stride
    return tl.load(prob + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def edge_pairs(
    prob,  # [K, C] of one image
    node_stride,
    class_stride,
    first,
    second,
    valid,
    classes,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    RELAXATION: tl.constexpr,
):
    """(r, slope, near, far) [BLOCK] of edges."""
    product = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for column in range(0, classes, COLUMNS):
        p = load_nodes(prob, node_stride, class_stride, first, valid, column, classes, COLUMNS)
        q = load_nodes(prob, node_stride, class_stride, second, valid, column, classes, COLUMNS)
        product += tl.sum(pair_term(p, q, RELAXATION), 1)
        own += tl.sum(own_term(p, RELAXATION), 1)
        other += tl.sum(own_term(q, RELAXATION), 1)
    return relax(product, own, other, RELAXATION)


@triton.jit
def graph_kernel(
    prob,  # [B, K, C]
    edge_index,  # [B, 2, E]
    weight,  # [B, E]
    partial,  # [B, blocks, 3] out
    prob_batch,
    prob_node,
    prob_class,
    index_batch,
    index_side,
    index_edge,
    weight_batch,
    weight_edge,
    nodes,
    classes,
    edges,
    blocks,
    RELAXATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums over BLOCK_M edges."""
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    edge = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first, second, valid, weights = edge_tile(
        edge_index + batch * index_batch,
        weight + batch * weight_batch,
        index_side,
        index_edge,
        weight_edge,
        edge,
        edges,
        nodes,
    )
    values, _, _, _ = edge_pairs(
        prob + batch * prob_batch, prob_node, prob_class, first, second, valid, classes, BLOCK_M, BLOCK_V, RELAXATION
    )
    store_sums(partial, values, weights)


@triton.jit
def graph_pair_kernel(
    prob,  # [B, K, C]
    edge_index,  # [B, 2, E]
    weight,  # [B, E]
    gradient,  # [B]
    energy,  # [B]
    scale,  # [B]
    pairs,  # [B, 3, E] out: w * (slope, near, far); not written without PROB
    weight_gradient,  # [B, E] out, contiguous; not written without WEIGHT
    prob_batch,
    prob_node,
    prob_class,
    index_batch,
    index_side,
    index_edge,
    weight_batch,
    weight_edge,
    nodes,
    classes,
    edges,
    blocks,
    RELAXATION: tl.constexpr,
    NORM: tl.constexpr,
    PROB: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What BLOCK_M edges give to their ends, in three numbers each, and the gradient of their weights."""
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    edge = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first, second, valid, weights = edge_tile(
        edge_index + batch * index_batch,
        weight + batch * weight_batch,
        index_side,
        index_edge,
        weight_edge,
        edge,
        edges,
        nodes,
    )
    factor, shift, by_weight = image_factors(gradient, energy, scale, batch, NORM)
    values, slope, near, far = edge_pairs(
        prob + batch * prob_batch, prob_node, prob_class, first, second, valid, classes, BLOCK_M, BLOCK_V, RELAXATION
    )
    if PROB:
        k = weights * factor
        pairs += batch * 3 * edges + edge
        tl.store(pairs, k * slope, mask=edge < edges)
        tl.store(pairs + edges, k * near, mask=edge < edges)
        tl.store(pairs + 2 * edges, k * far, mask=edge < edges)
    if WEIGHT:
        found = values * factor - (shift + by_weight * weights)
        place = weight_gradient + batch * edges + edge
        tl.store(place, found.to(weight_gradient.dtype.element_ty), mask=edge < edges)


@triton.jit
def graph_prob_kernel(
    prob,  # [B, K, C]
    edge_index,  # [B, 2, E]
    weight,  # [B, E]
    gradient,  # [B]
    energy,  # [B]
    scale,  # [B]
    pairs,  # [B, 3, E], from graph_pair_kernel; not read for the quadratic relaxation
    out,  # [B, K, C] out, contiguous
    prob_batch,
    prob_node,
    prob_class,
    index_batch,
    index_side,
    index_edge,
    weight_batch,
    weight_edge,
    nodes,
    classes,
    edges,
    blocks,
    columns,
    RELAXATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of BLOCK_M nodes and BLOCK_V classes: a walk over all edges.

    Which edges end in which node is a matrix of zeros and ones; its product with the edges' gradients is the sum.
    """
    node = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = tl.program_id(0) // blocks
    column = rest % columns * BLOCK_V
    batch = tl.cast(rest // columns, tl.int64)
    factor, _, _ = image_factors(gradient, energy, scale, batch, NORM)
    prob += batch * prob_batch
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, edges, BLOCK_N):
        edge = start + tl.arange(0, BLOCK_N)
        first, second, valid, weights = edge_tile(
            edge_index + batch * index_batch,
            weight + batch * weight_batch,
            index_side,
            index_edge,
            weight_edge,
            edge,
            edges,
            nodes,
        )
        of_first = (first[None, :] == node[:, None]) & valid[None, :]
        of_second = (second[None, :] == node[:, None]) & valid[None, :]
        touched = tl.max((of_first | of_second).to(tl.int32), 0) > 0
        p = load_nodes(prob, prob_node, prob_class, first, touched, column, classes, BLOCK_V)
        q = load_nodes(prob, prob_node, prob_class, second, touched, column, classes, BLOCK_V)
        if RELAXATION == "quadratic":
            to_first = (weights * factor)[:, None] * (p - q)
            to_second = -to_first
        else:
            place = pairs + batch * 3 * edges + edge
            slope = tl.load(place, mask=edge < edges, other=0.0)[:, None]
            if RELAXATION == "log_quadratic":
                to_first = slope * (p - q) - 0.5 * slope
                to_second = slope * (q - p) - 0.5 * slope
            else:
                near = tl.load(place + edges, mask=edge < edges, other=0.0)[:, None]
                far = tl.load(place + 2 * edges, mask=edge < edges, other=0.0)[:, None]
                to_first = slope * q + near * p
                to_second = slope * p + far * q
        sums = tl.dot(of_first.to(tl.float32), to_first, sums, input_precision="ieee")
        sums = tl.dot(of_second.to(tl.float32), to_second, sums, input_precision="ieee")
    out_columns = column + tl.arange(0, BLOCK_V)
    inside = (node < nodes)[:, None] & (out_columns < classes)[None, :]
    place = out + (batch * nodes + node[:, None]) * classes + out_columns[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


# ---- launches


def forward(
    prob: Tensor, weight: Tensor, edge_index: Tensor | None, relaxation: str, norm: str
) -> tuple[Tensor, Tensor]:
    """energy (B,) and the norm (B,) it was divided by, 0 where there was no weight; both float32."""
    batch = prob.shape[0]
    energy, scale = (prob.new_empty(batch, dtype=torch.float32) for _ in range(2))
    if edge_index is None:
        _, classes, height, width = prob.shape
        blocks = tiles(height * width, GRID.m)
        partial = prob.new_empty((batch, blocks, 3), dtype=torch.float32)
        launch(
            grid_kernel,
            batch * blocks,
            *(prob, weight, partial, *prob.stride(), *_weight_strides(weight)),
            *(classes, height, width, blocks),
            DIRECTIONS=weight.shape[1],
            RELAXATION=relaxation,
            BLOCK_M=GRID.m,
            config=GRID,
        )
    else:
        blocks = tiles(weight.shape[1], EDGES.m)
        partial = prob.new_empty((batch, blocks, 3), dtype=torch.float32)
        launch(
            graph_kernel,
            batch * blocks,
            *(prob, edge_index, weight, partial, *prob.stride(), *edge_index.stride(), *weight.stride()),
            *(prob.shape[1], prob.shape[2], weight.shape[1], blocks),
            RELAXATION=relaxation,
            BLOCK_M=EDGES.m,
            BLOCK_V=EDGES.v,
            config=EDGES,
        )
    launch(finish_kernel, batch, partial, energy, scale, blocks, NORM=norm, BLOCK_M=FINISH.m, config=FINISH)
    return energy, scale


def backward(
    gradient: Tensor,
    energy: Tensor,
    scale: Tensor,
    prob: Tensor,
    weight: Tensor,
    edge_index: Tensor | None,
    relaxation: str,
    norm: str,
    prob_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of prob and weight, contiguous; empty where not needed."""
    prob_gradient = prob.new_empty(prob.shape if prob_needed else (0,))
    weight_gradient = weight.new_empty(weight.shape if weight_needed else (0,))
    images = tuple(line.contiguous() for line in (gradient, energy, scale))
    problem = (prob, weight, relaxation, norm)
    out = (prob_gradient, weight_gradient, prob_needed, weight_needed)
    if edge_index is None:
        _grid_backward(images, *problem, *out)
    else:
        _graph_backward(images, edge_index, *problem, *out)
    return prob_gradient, weight_gradient


def _grid_backward(
    images: tuple[Tensor, ...],
    prob: Tensor,
    weight: Tensor,
    relaxation: str,
    norm: str,
    prob_gradient: Tensor,
    weight_gradient: Tensor,
    prob_needed: bool,
    weight_needed: bool,
) -> None:
    batch, classes, height, width = prob.shape
    blocks = tiles(height * width, GRID.m)
    sizes = (*prob.stride(), *_weight_strides(weight), classes, height, width, blocks)
    options = {"DIRECTIONS": weight.shape[1], "RELAXATION": relaxation, "NORM": norm, "BLOCK_M": GRID.m}
    if prob_needed:
        programs = batch * blocks
        launch(grid_prob_kernel, programs, prob, weight, *images, prob_gradient, *sizes, **options, config=GRID)
    if weight_needed:
        groups = weight.shape[0]
        programs = groups * blocks
        shared = batch // max(groups, 1)
        launch(
            grid_weight_kernel, programs, prob, weight, *images, weight_gradient, *sizes, shared, **options, config=GRID
        )


def _graph_backward(
    images: tuple[Tensor, ...],
    edge_index: Tensor,
    prob: Tensor,
    weight: Tensor,
    relaxation: str,
    norm: str,
    prob_gradient: Tensor,
    weight_gradient: Tensor,
    prob_needed: bool,
    weight_needed: bool,
) -> None:
    batch, nodes, classes = prob.shape
    edges = weight.shape[1]
    sizes = (*prob.stride(), *edge_index.stride(), *weight.stride(), nodes, classes, edges)
    options = {"RELAXATION": relaxation, "NORM": norm}
    pairs_needed = prob_needed and relaxation != "quadratic"
    pairs = prob.new_empty((batch, 3, edges) if pairs_needed else (0,), dtype=torch.float32)
    if pairs_needed or weight_needed:
        blocks = tiles(edges, EDGES.m)
        launch(
            graph_pair_kernel,
            batch * blocks,
            *(prob, edge_index, weight, *images, pairs, weight_gradient, *sizes, blocks),
            **options,
            PROB=pairs_needed,
            WEIGHT=weight_needed,
            BLOCK_M=EDGES.m,
            BLOCK_V=EDGES.v,
            config=EDGES,
        )
    if prob_needed:
        blocks, columns = tiles(nodes, NODES.m), tiles(classes, NODES.v)
        launch(
            graph_prob_kernel,
            batch * blocks * columns,
            *(prob, edge_index, weight, *images, pairs, prob_gradient, *sizes, blocks, columns),
            **options,
            BLOCK_M=NODES.m,
            BLOCK_N=NODES.n,
            BLOCK_V=NODES.v,
            config=NODES,
        )


def _weight_strides(weight: Tensor) -> tuple[int, ...]:
    """Strides of the weights; the images of a batch that share them do not step."""
    batch, *others = weight.stride()
    return (0 if weight.shape[0] == 1 else batch, *others)
