"""`upsample_losses` on Triton: one pass over the pixels forward and one backward, nothing of size C x H x W.

docs/kernels/upsample_losses.md, "GPU (Triton)", explains the schedule. A quad is a cell between four neighbouring
positions of the logits, its corners; of an axis with one position, that position. A program owns QUADS quads and
walks over the pixels whose source lies in them, PIXELS of each at a time: tiles are [HIGH, QUADS, PIXELS, LANES] with
class = first + high * LANES + lane, so that a sum over classes takes log2(LANES) steps between threads and one over
pixels log2(32 / LANES).

Positions are exact. Pixel i of an axis has its source at min(max(step * i + offset, 0), limit) / whole; see `Axis`.
Logits are float32 or float64, and so is everything computed. Starts of images and scratch are int64; what is inside
them is INDEX: int32 where everything fits (`Plan.index_type`), for cheap divisions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cc4s_kernels._triton.configs import Config, choose
from cc4s_kernels._triton.launch import launch, target_of, tiles


@triton.jit
def pixels_of_quads(quad, quads, out, step, offset, whole):
    """First pixel of an axis in each quad, and the number of pixels there."""
    begin = tl.minimum((tl.maximum(quad * whole - offset, 0) + step - 1) // step, out)
    end = tl.minimum((tl.maximum((quad + 1) * whole - offset, 0) + step - 1) // step, out)
    # Positions before the first and behind the last one of the logits take those.
    begin = tl.where(quad == 0, 0, begin)
    end = tl.where(quad == quads - 1, out, end)
    return begin, end - begin


@triton.jit
def fraction_of(pixel, quad, step, offset, whole, limit, TYPE: tl.constexpr):
    """How far pixels lie between the two positions of their quad, 0 to 1."""
    position = tl.minimum(tl.maximum(pixel * step + offset, 0), limit)
    return (position - quad * whole).to(TYPE) / whole


@triton.jit
def corner_offsets(y, x, h, w, row, column):
    """Offsets [QUADS] of the corners of quads (y, x): upper left, upper right, lower left, lower right."""
    upper, lower = y * row, tl.minimum(y + 1, h - 1) * row
    left, right = x * column, tl.minimum(x + 1, w - 1) * column
    return upper + left, upper + right, lower + left, lower + right


@triton.jit
def class_numbers(first, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """[HIGH, LANES]"""
    return first + tl.arange(0, BLOCK_C // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def load_corner(x, offsets, class_stride, first, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """[HIGH, QUADS, LANES] logits at one corner of each quad."""
    classes = class_numbers(first, BLOCK_C, LANES)
    inside = (classes < CLASSES)[:, None, :]
    pointers = x + (offsets[None, :, None] + (classes.to(offsets.dtype) * class_stride)[:, None, :])
    # Classes behind the last: a probability of exactly 0, and finite numbers for the weights 0 and 1 of corners.
    return tl.load(pointers, mask=inside, other=-1e30)


@triton.jit
def load_corners(x, a, b, c, d, class_stride, first, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    return (
        load_corner(x, a, class_stride, first, CLASSES, BLOCK_C, LANES),
        load_corner(x, b, class_stride, first, CLASSES, BLOCK_C, LANES),
        load_corner(x, c, class_stride, first, CLASSES, BLOCK_C, LANES),
        load_corner(x, d, class_stride, first, CLASSES, BLOCK_C, LANES),
    )


@triton.jit
def interpolate(a, b, c, d, share_a, share_b, share_c, share_d):
    """The tile of upsampled logits, of corners [HIGH, QUADS, LANES] and their shares [QUADS, PIXELS].

    A sum of four shares is exact at the corners, as differences are not.
    """
    upper = a[:, :, None, :] * share_a[None, :, :, None] + b[:, :, None, :] * share_b[None, :, :, None]
    return upper + c[:, :, None, :] * share_c[None, :, :, None] + d[:, :, None, :] * share_d[None, :, :, None]


@triton.jit
def class_sum(x):
    """[QUADS, PIXELS]"""
    return tl.sum(tl.sum(x, 0), 2)


@triton.jit
def online_softmax(z, peak, total, weighted):
    """Takes a tile of logits into peak = max z, total = sum e^d and weighted = sum e^d d, d = z - peak.

    Returns: d and e^d, the factor for sums of e^d so far, and the three [QUADS, PIXELS].
    """
    new_peak = tl.maximum(peak, tl.max(tl.max(z, 0), 2))
    empty = peak == float("-inf")
    shift = tl.where(empty, 0.0, peak - new_peak)
    decay = tl.where(empty, 0.0, tl.exp(shift))
    d = z - new_peak[None, :, :, None]
    e = tl.exp(d)
    weighted = (weighted + total * shift) * decay + class_sum(e * d)
    return d, e, decay, new_peak, total * decay + class_sum(e), weighted


@triton.jit
def pool(
    fixed,  # [K, CLASSES + 1] of an image
    ids,  # [QUADS, PIXELS], num_ids = none
    prob,  # tile
    first,
    num_ids,
    unit,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the probabilities of each id in the tile to its sums, in integers: their order does not matter."""
    classes = class_numbers(first, BLOCK_C, LANES)
    left = ids
    current = tl.min(left)
    while current < num_ids:
        hit = left == current
        share = tl.where(hit[None, :, :, None], prob, 0.0)
        sums = tl.sum(tl.sum(share, 2), 1)
        row = fixed + tl.cast(current, tl.int64) * (CLASSES + 1)
        tl.atomic_add(row + classes, (sums * unit).to(tl.int64), mask=classes < CLASSES, sem="relaxed")
        if first == 0:
            tl.atomic_add(row + CLASSES, tl.sum(hit.to(tl.int32)).to(tl.int64), sem="relaxed")
        left = tl.where(hit, num_ids, left)
        current = tl.min(left)


@triton.jit
def load_labels(labels, offsets, inside, ignored, CLASSES: tl.constexpr):
    """Labels [QUADS, PIXELS], -1 where there is none or a wrong one. Compared before they become int32."""
    label = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (label >= 0) & (label < CLASSES) & (label != ignored), label, -1).to(tl.int32)


@triton.jit
def load_ids(superpixels, offsets, inside, num_ids):
    """Ids [QUADS, PIXELS], num_ids where there is none or a wrong one."""
    ids = tl.load(superpixels + offsets, mask=inside, other=-1).to(tl.int64)
    return tl.where((ids >= 0) & (ids < num_ids), ids, num_ids).to(tl.int32)


@triton.jit
def load_weight(weight, offsets, inside, WEIGHTED: tl.constexpr, TYPE: tl.constexpr):
    if WEIGHTED:
        return tl.load(weight + offsets, mask=inside, other=0).to(TYPE)
    return inside.to(TYPE)


@triton.jit
def load_label_weight(class_weight, label, CLASS_WEIGHTED: tl.constexpr, TYPE: tl.constexpr):
    labelled = label >= 0
    if CLASS_WEIGHTED:
        return tl.load(class_weight + label, mask=labelled, other=0.0)
    return labelled.to(TYPE)


@triton.jit
def losses_kernel(
    logits,  # [B, CLASSES, h, w], any strides
    labels,  # [B, H, W], integers
    weight,  # [B, H, W]; not read without WEIGHTED
    superpixels,  # [B, H, W], integers; not read without POOLED
    class_weight,  # [CLASSES]; not read without CLASS_WEIGHTED
    sums,  # [B, 4, programs of an image] out: cross-entropy, labelled, entropy, weight
    fixed,  # [B, K, CLASSES + 1] int64 in and out: sums of probabilities times `unit`, numbers of pixels
    batch_stride,
    class_stride,
    row_stride,
    column_stride,
    h,
    w,
    height,
    width,
    quads_y,
    quads_x,
    y_step,
    y_offset,
    y_whole,
    y_limit,
    x_step,
    x_offset,
    x_whole,
    x_limit,
    blocks,
    parts,
    ignored,
    num_ids,
    unit,
    CLASSES: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POOLED: tl.constexpr,
    CLASS_WEIGHTED: tl.constexpr,
):
    """Sums over part `part` of the pixels of QUADS quads."""
    TYPE: tl.constexpr = logits.dtype.element_ty
    program = tl.program_id(0)
    part = program % parts
    block = program // parts % blocks
    batch = tl.cast(program // (parts * blocks), tl.int64)
    number = tl.cast(block, INDEX) * QUADS + tl.arange(0, QUADS)
    quad = tl.minimum(number, tl.cast(quads_y, INDEX) * quads_x - 1)
    qy, qx = quad // quads_x, quad % quads_x
    top, rows = pixels_of_quads(qy, quads_y, height, y_step, y_offset, y_whole)
    left, columns = pixels_of_quads(qx, quads_x, width, x_step, x_offset, x_whole)
    count = tl.where(number == quad, rows * columns, 0)
    a, b, c, d = corner_offsets(qy, qx, h, w, row_stride, column_stride)
    logits += batch * batch_stride
    labels += batch * height * width
    weight += batch * height * width
    superpixels += batch * height * width
    if BLOCK_C >= CLASSES:
        ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, 0, CLASSES, BLOCK_C, LANES)
    cross_entropy = tl.zeros([QUADS, PIXELS], TYPE)
    labelled = tl.zeros([QUADS, PIXELS], TYPE)
    entropy = tl.zeros([QUADS, PIXELS], TYPE)
    weights = tl.zeros([QUADS, PIXELS], TYPE)
    begin = part * (STEPS * PIXELS)
    for first in range(begin, tl.minimum(begin + STEPS * PIXELS, tl.max(count)), PIXELS):
        pixel = first + tl.arange(0, PIXELS)[None, :]
        inside = pixel < count[:, None]
        y = top[:, None] + pixel // tl.maximum(columns, 1)[:, None]
        x = left[:, None] + pixel % tl.maximum(columns, 1)[:, None]
        offsets = y * width + x
        label = load_labels(labels, offsets, inside, ignored, CLASSES)
        m = load_weight(weight, offsets, inside, WEIGHTED, TYPE)
        scale = load_label_weight(class_weight, label, CLASS_WEIGHTED, TYPE)
        seen = (label >= 0) | (m != 0.0)
        if POOLED:
            ids = load_ids(superpixels, offsets, inside, num_ids)
            seen = seen | (ids < num_ids)
        if tl.max(seen.to(tl.int32)) > 0:
            fy = tl.where(inside, fraction_of(y, qy[:, None], y_step, y_offset, y_whole, y_limit, TYPE), 0.0)
            fx = tl.where(inside, fraction_of(x, qx[:, None], x_step, x_offset, x_whole, x_limit, TYPE), 0.0)
            sa, sb, sc, sd = (1.0 - fy) * (1.0 - fx), (1.0 - fy) * fx, fy * (1.0 - fx), fy * fx
            peak = tl.full([QUADS, PIXELS], float("-inf"), TYPE)
            total = tl.zeros([QUADS, PIXELS], TYPE)
            weighted = tl.zeros([QUADS, PIXELS], TYPE)
            if BLOCK_C >= CLASSES:
                z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd)
                z, e, _, peak, total, weighted = online_softmax(z, peak, total, weighted)
                if POOLED:
                    prob = e * (1.0 / total)[None, :, :, None]
                    image = fixed + batch * num_ids * (CLASSES + 1)
                    pool(image, ids, prob, 0, num_ids, unit, CLASSES, BLOCK_C, LANES)
            else:
                for start in range(0, CLASSES, BLOCK_C):
                    ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, start, CLASSES, BLOCK_C, LANES)
                    z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd)
                    z, e, _, peak, total, weighted = online_softmax(z, peak, total, weighted)
                if POOLED:
                    for start in range(0, CLASSES, BLOCK_C):
                        ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, start, CLASSES, BLOCK_C, LANES)
                        z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd)
                        prob = tl.exp(z - peak[None, :, :, None]) * (1.0 / total)[None, :, :, None]
                        image = fixed + batch * num_ids * (CLASSES + 1)
                        pool(image, ids, prob, start, num_ids, unit, CLASSES, BLOCK_C, LANES)
            log_total = tl.log(total)
            entropy += m * (log_total - weighted / total)
            own = logits + label.to(INDEX) * class_stride
            hit = label >= 0
            chosen = sa * tl.load(own + a[:, None], mask=hit, other=0.0)
            chosen += sb * tl.load(own + b[:, None], mask=hit, other=0.0)
            chosen += sc * tl.load(own + c[:, None], mask=hit, other=0.0)
            chosen += sd * tl.load(own + d[:, None], mask=hit, other=0.0)
            cross_entropy += scale * (log_total - (chosen - peak))
            labelled += scale
            weights += m
    programs = parts * blocks
    out = sums + batch * 4 * programs + program % programs
    tl.store(out, tl.sum(tl.sum(cross_entropy, 1), 0))
    tl.store(out + programs, tl.sum(tl.sum(labelled, 1), 0))
    tl.store(out + 2 * programs, tl.sum(tl.sum(entropy, 1), 0))
    tl.store(out + 3 * programs, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def sum_kernel(
    sums,  # [B, 4, programs]
    cross_entropy,  # [B] out
    labelled,  # [B] out
    entropy,  # [B] out
    weight,  # [B] out
    programs,
    BLOCK: tl.constexpr,
):
    """The sums of one image, in a fixed order."""
    batch = tl.program_id(0)
    TYPE: tl.constexpr = sums.dtype.element_ty
    kind = tl.arange(0, 4)
    start = sums + (tl.cast(batch, tl.int64) * 4 + kind[:, None]) * programs
    total = tl.zeros([4, BLOCK], TYPE)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)[None, :]
        total += tl.load(start + program, mask=program < programs, other=0.0)
    each = tl.sum(total, 1)
    tl.store(cross_entropy + batch, tl.sum(tl.where(kind == 0, each, 0.0)))
    tl.store(labelled + batch, tl.sum(tl.where(kind == 1, each, 0.0)))
    tl.store(entropy + batch, tl.sum(tl.where(kind == 2, each, 0.0)))
    tl.store(weight + batch, tl.sum(tl.where(kind == 3, each, 0.0)))


@triton.jit
def pooled_gradients(
    gradient,  # [K, CLASSES] of an image
    ids,  # [QUADS, PIXELS]
    first,
    num_ids,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Tile of the gradient of the sums that each pixel went into, 0 where none: one row for each id in the tile."""
    classes = class_numbers(first, BLOCK_C, LANES)
    tile = tl.zeros([BLOCK_C // LANES, ids.shape[0], ids.shape[1], LANES], TYPE)
    left = ids
    current = tl.min(left)
    while current < num_ids:
        hit = left == current
        row = tl.load(gradient + tl.cast(current, tl.int64) * CLASSES + classes, mask=classes < CLASSES, other=0.0)
        tile = tl.where(hit[None, :, :, None], row[:, None, None, :], tile)
        left = tl.where(hit, num_ids, left)
        current = tl.min(left)
    return tile


@triton.jit
def logit_gradient(d, e, outer, label, base, slope, inverse, given, first, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """Tile of p (base - slope d + outer) - given [class = label]."""
    classes = class_numbers(first, BLOCK_C, LANES)[:, None, None, :]
    prob = e * inverse[None, :, :, None]
    picked = tl.where(classes == label[None, :, :, None], given[None, :, :, None], 0.0)
    return prob * (base[None, :, :, None] - slope[None, :, :, None] * d + outer) - picked


@triton.jit
def corner_sum(gradient, share):
    """[HIGH, QUADS, LANES]"""
    return tl.sum(gradient * share[None, :, :, None], 2)


@triton.jit
def store_corner(
    out,  # [quads, CLASSES] of a corner
    number,
    quads,
    tile,
    first,
    ADD: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):
    classes = class_numbers(first, BLOCK_C, LANES)[:, None, :]
    inside = (classes < CLASSES) & (number < quads)[None, :, None]
    pointers = out + (number[None, :, None] * CLASSES + classes)
    if ADD:
        tile += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, tile, mask=inside)


@triton.jit
def corner_gradients_kernel(
    logits,  # [B, CLASSES, h, w], any strides
    labels,  # [B, H, W], integers
    weight,  # [B, H, W]; not read without WEIGHTED
    superpixels,  # [B, H, W], integers; not read without POOLED
    class_weight,  # [CLASSES]; not read without CLASS_WEIGHTED
    cross_entropy_gradient,  # [B]
    entropy_gradient,  # [B]
    pooled_gradient,  # [B, K, CLASSES]; not read without POOLED
    corners,  # [B, parts, 4, quads, CLASSES] out; where BLOCK_C < CLASSES zeros before
    batch_stride,
    class_stride,
    row_stride,
    column_stride,
    h,
    w,
    height,
    width,
    quads_y,
    quads_x,
    y_step,
    y_offset,
    y_whole,
    y_limit,
    x_step,
    x_offset,
    x_whole,
    x_limit,
    blocks,
    parts,
    ignored,
    num_ids,
    CLASSES: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POOLED: tl.constexpr,
    CLASS_WEIGHTED: tl.constexpr,
):
    """What part `part` of the pixels of QUADS quads gives to the four corners of each."""
    TYPE: tl.constexpr = logits.dtype.element_ty
    program = tl.program_id(0)
    part = program % parts
    block = program // parts % blocks
    batch = tl.cast(program // (parts * blocks), tl.int64)
    number = tl.cast(block, INDEX) * QUADS + tl.arange(0, QUADS)
    quads = tl.cast(quads_y, INDEX) * quads_x
    quad = tl.minimum(number, quads - 1)
    qy, qx = quad // quads_x, quad % quads_x
    top, rows = pixels_of_quads(qy, quads_y, height, y_step, y_offset, y_whole)
    left, columns = pixels_of_quads(qx, quads_x, width, x_step, x_offset, x_whole)
    count = tl.where(number == quad, rows * columns, 0)
    a, b, c, d = corner_offsets(qy, qx, h, w, row_stride, column_stride)
    logits += batch * batch_stride
    labels += batch * height * width
    weight += batch * height * width
    superpixels += batch * height * width
    pooled_gradient += batch * num_ids * CLASSES
    ce_gradient = tl.load(cross_entropy_gradient + batch)
    h_gradient = tl.load(entropy_gradient + batch)
    next_corner = tl.cast(quads, tl.int64) * CLASSES
    out = corners + (batch * parts + part) * 4 * next_corner
    ga = tl.zeros([BLOCK_C // LANES, QUADS, LANES], TYPE)
    gb = tl.zeros([BLOCK_C // LANES, QUADS, LANES], TYPE)
    gc = tl.zeros([BLOCK_C // LANES, QUADS, LANES], TYPE)
    gd = tl.zeros([BLOCK_C // LANES, QUADS, LANES], TYPE)
    if BLOCK_C >= CLASSES:
        ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, 0, CLASSES, BLOCK_C, LANES)
    begin = part * (STEPS * PIXELS)
    for first in range(begin, tl.minimum(begin + STEPS * PIXELS, tl.max(count)), PIXELS):
        pixel = first + tl.arange(0, PIXELS)[None, :]
        inside = pixel < count[:, None]
        y = top[:, None] + pixel // tl.maximum(columns, 1)[:, None]
        x = left[:, None] + pixel % tl.maximum(columns, 1)[:, None]
        offsets = y * width + x
        label = load_labels(labels, offsets, inside, ignored, CLASSES)
        given = ce_gradient * load_label_weight(class_weight, label, CLASS_WEIGHTED, TYPE)
        slope = h_gradient * load_weight(weight, offsets, inside, WEIGHTED, TYPE)
        seen = (given != 0.0) | (slope != 0.0)
        if POOLED:
            ids = load_ids(superpixels, offsets, inside, num_ids)
            seen = seen | (ids < num_ids)
        if tl.max(seen.to(tl.int32)) > 0:
            fy = tl.where(inside, fraction_of(y, qy[:, None], y_step, y_offset, y_whole, y_limit, TYPE), 0.0)
            fx = tl.where(inside, fraction_of(x, qx[:, None], x_step, x_offset, x_whole, x_limit, TYPE), 0.0)
            sa, sb, sc, sd = (1.0 - fy) * (1.0 - fx), (1.0 - fy) * fx, fy * (1.0 - fx), fy * fx
            peak = tl.full([QUADS, PIXELS], float("-inf"), TYPE)
            total = tl.zeros([QUADS, PIXELS], TYPE)
            weighted = tl.zeros([QUADS, PIXELS], TYPE)
            inner = tl.zeros([QUADS, PIXELS], TYPE)
            if BLOCK_C >= CLASSES:
                z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd)
                z, e, _, peak, total, weighted = online_softmax(z, peak, total, weighted)
                if POOLED:
                    outer = pooled_gradients(pooled_gradient, ids, 0, num_ids, CLASSES, BLOCK_C, LANES, TYPE)
                    inner = class_sum(e * outer)
                else:
                    outer = 0.0
                inverse = 1.0 / total
                base = given + (slope * weighted - inner) * inverse
                gradient = logit_gradient(z, e, outer, label, base, slope, inverse, given, 0, BLOCK_C, LANES)
                ga += corner_sum(gradient, sa)
                gb += corner_sum(gradient, sb)
                gc += corner_sum(gradient, sc)
                gd += corner_sum(gradient, sd)
            else:
                for start in range(0, CLASSES, BLOCK_C):
                    ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, start, CLASSES, BLOCK_C, LANES)
                    z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd)
                    z, e, decay, peak, total, weighted = online_softmax(z, peak, total, weighted)
                    if POOLED:
                        outer = pooled_gradients(pooled_gradient, ids, start, num_ids, CLASSES, BLOCK_C, LANES, TYPE)
                        inner = inner * decay + class_sum(e * outer)
                inverse = 1.0 / total
                base = given + (slope * weighted - inner) * inverse
                for start in range(0, CLASSES, BLOCK_C):
                    ca, cb, cc, cd = load_corners(logits, a, b, c, d, class_stride, start, CLASSES, BLOCK_C, LANES)
                    z = interpolate(ca, cb, cc, cd, sa, sb, sc, sd) - peak[None, :, :, None]
                    e = tl.exp(z)
                    if POOLED:
                        outer = pooled_gradients(pooled_gradient, ids, start, num_ids, CLASSES, BLOCK_C, LANES, TYPE)
                    else:
                        outer = 0.0
                    gradient = logit_gradient(z, e, outer, label, base, slope, inverse, given, start, BLOCK_C, LANES)
                    # The sums of all classes do not fit into registers: they are kept in `corners`.
                    ga, gb = corner_sum(gradient, sa), corner_sum(gradient, sb)
                    gc, gd = corner_sum(gradient, sc), corner_sum(gradient, sd)
                    store_corner(out, number, quads, ga, start, True, CLASSES, BLOCK_C, LANES)
                    store_corner(out + next_corner, number, quads, gb, start, True, CLASSES, BLOCK_C, LANES)
                    store_corner(out + 2 * next_corner, number, quads, gc, start, True, CLASSES, BLOCK_C, LANES)
                    store_corner(out + 3 * next_corner, number, quads, gd, start, True, CLASSES, BLOCK_C, LANES)
                # The next step may read a sum with another thread.
                tl.debug_barrier()
    if BLOCK_C >= CLASSES:
        store_corner(out, number, quads, ga, 0, False, CLASSES, BLOCK_C, LANES)
        store_corner(out + next_corner, number, quads, gb, 0, False, CLASSES, BLOCK_C, LANES)
        store_corner(out + 2 * next_corner, number, quads, gc, 0, False, CLASSES, BLOCK_C, LANES)
        store_corner(out + 3 * next_corner, number, quads, gd, 0, False, CLASSES, BLOCK_C, LANES)


@triton.jit
def gather_kernel(
    corners,  # [B, parts, 4, quads, CLASSES]
    gradient,  # [B, CLASSES, h, w] out
    h,
    w,
    quads_y,
    quads_x,
    parts,
    CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M positions of the logits' gradient, of BLOCK_C classes: each is a corner of at most four quads."""
    program = tl.program_id(0)
    splits: tl.constexpr = (CLASSES + BLOCK_C - 1) // BLOCK_C
    positions = tl.cast(h, tl.int64) * w
    blocks = tl.cdiv(positions, BLOCK_M)
    classes = program % splits * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = program // splits // blocks
    position = program // splits % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = position // w, position % w
    known = (position < positions)[:, None] & (classes < CLASSES)[None, :]
    quads = tl.cast(quads_y, tl.int64) * quads_x
    total = tl.zeros([BLOCK_M, BLOCK_C], gradient.dtype.element_ty)
    for part in range(parts):
        start = corners + (batch * parts + part) * 4 * quads * CLASSES
        for corner in tl.static_range(4):
            qy, qx = y - corner // 2, x - corner % 2
            inside = known & ((qy >= 0) & (qy < quads_y) & (qx >= 0) & (qx < quads_x))[:, None]
            offsets = (corner * quads + qy * quads_x + qx)[:, None] * CLASSES + classes[None, :]
            total += tl.load(start + offsets, mask=inside, other=0.0)
    offsets = (batch * CLASSES + classes.to(tl.int64))[None, :] * positions + position[:, None]
    tl.store(gradient + offsets, total, mask=known)


class Axis(NamedTuple):
    """Where the pixels of an axis have their source, in exact integers.

    Pixel i lies at clamp(step * i + offset, 0, limit) / whole positions of the logits; `quads` lie between them.
    The same points as those of `torch.nn.functional.interpolate`, which rounds them to the dtype of the logits.
    """

    step: int
    offset: int
    whole: int
    limit: int
    quads: int
    size: int
    out: int

    @classmethod
    def of(cls, size: int, out: int, align_corners: bool) -> Axis:
        step, offset, whole = (size - 1, 0, out - 1) if align_corners else (2 * size, size - out, 2 * out)
        if align_corners and out == 1:
            whole, step = 1, 0
        # A step of 0 (one position, or one pixel) would divide by 0; that one pixel or position stays where it is.
        return cls(max(step, 1), offset, whole, (size - 1) * whole, max(size - 1, 1), size, out)

    def first(self, quad: int) -> int:
        """First pixel of a quad, or the number of pixels behind the last quad."""
        if quad == 0:
            return 0
        if quad == self.quads:
            return self.out
        return min(-(-max(quad * self.whole - self.offset, 0) // self.step), self.out)

    @property
    def typical(self) -> int:
        """Pixels of an inner quad, rounded up."""
        return min(-(-self.whole // self.step), self.out)

    @property
    def most(self) -> int:
        """No quad has more pixels: the first and the last also hold those beyond the positions."""
        return max(self.typical, self.first(1), self.out - self.first(self.quads - 1))


# Steps over the pixels of a quad in one program; a quad with more pixels is shared by several.
STEPS = 32


class Plan(NamedTuple):
    """How the pixels are divided: what both passes need to be launched."""

    y: Axis
    x: Axis
    config: Config
    group: int
    pixels: int
    blocks: int
    parts: int

    @classmethod
    def of(cls, kernel: str, logits: Tensor, labels: Tensor, align_corners: bool) -> Plan:
        classes, h, w = logits.shape[1:]
        y, x = Axis.of(h, labels.shape[1], align_corners), Axis.of(w, labels.shape[2], align_corners)
        config = choose(kernel, target_of(logits), logits.dtype, "ieee", classes)
        pixels = min(config.m, triton.next_power_of_2(y.typical * x.typical))
        # The four corners of a quad and their gradients take as many registers as eight of its pixels.
        group = 1 << ((config.m + 8) // (pixels + 8)).bit_length() - 1
        blocks = tiles(y.quads * x.quads, group)
        return cls(y, x, config, group, pixels, blocks, tiles(y.most * x.most, pixels * STEPS))

    @property
    def quads(self) -> int:
        return self.y.quads * self.x.quads

    def scalars(self, logits: Tensor, labels: Tensor, ignore_index: int, num_ids: int) -> tuple[int, ...]:
        classes = logits.shape[1]
        # Any other label is ignored because it is no class.
        ignored = ignore_index if 0 <= ignore_index < classes else -1
        axes = (self.y.quads, self.x.quads, *self.y[:4], *self.x[:4])
        sizes = (*logits.shape[2:], *labels.shape[1:])
        return (*logits.stride(), *sizes, *axes, self.blocks, self.parts, ignored, num_ids)

    def index_type(self, logits: Tensor, num_ids: int) -> tl.dtype:
        classes = logits.shape[1]
        image = sum(stride * (n - 1) for stride, n in zip(logits.stride()[1:], logits.shape[1:], strict=True))
        # Products of an axis: whole * quads and step * pixel, each at most this.
        axes = (2 * (axis.size + 1) * (axis.out + 1) for axis in (self.y, self.x))
        # A block of quads, of pixels or of classes more than there are.
        most = max(image, *axes, (self.quads + 256) * classes, self.y.out * self.x.out, num_ids * (classes + 1))
        return tl.int32 if most < 2**30 else tl.int64

    def constants(self, logits: Tensor, num_ids: int) -> dict[str, Any]:
        classes = logits.shape[1]
        block = min(self.config.n, triton.next_power_of_2(classes))
        return {
            "CLASSES": classes,
            "QUADS": self.group,
            "PIXELS": self.pixels,
            "STEPS": STEPS,
            "BLOCK_C": block,
            # Eight classes of a tile to a thread.
            "LANES": min(32, max(1, block // 8)),
            "INDEX": self.index_type(logits, num_ids),
        }


def _maps(
    logits: Tensor, labels: Tensor, weight: Tensor | None, superpixels: Tensor | None, class_weight: Tensor | None
) -> tuple[Tensor, ...]:
    """The kernel's maps; logits stand for those that are not read."""
    if weight is not None and weight.dtype == torch.bool:
        weight = weight.view(torch.uint8)
    return tuple(logits if t is None else t.contiguous() for t in (labels, weight, superpixels, class_weight))


def forward(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    superpixels: Tensor | None,
    class_weight: Tensor | None,
    num_superpixels: int,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, ...]:
    """cross_entropy, labelled, entropy, weight (B,), pooled (B, K, C), counts (B, K) in the dtype of logits."""
    batch, classes = logits.shape[:2]
    num_ids = 0 if superpixels is None else num_superpixels
    plan = Plan.of("upsample_losses", logits, labels, align_corners)
    programs = plan.blocks * plan.parts
    sums = logits.new_empty((batch, 4, programs))
    # Probabilities of at most H W pixels, in units that keep their sum below 2^62.
    bits = 62 - (labels.shape[1] * labels.shape[2]).bit_length()
    fixed = torch.zeros((batch, num_ids, classes + 1), dtype=torch.int64, device=logits.device)
    launch(
        losses_kernel,
        batch * programs,
        *(logits, *_maps(logits, labels, weight, superpixels, class_weight), sums, fixed),
        *(*plan.scalars(logits, labels, ignore_index, num_ids), 2.0**bits),
        **plan.constants(logits, num_ids),
        WEIGHTED=weight is not None,
        POOLED=num_ids > 0,
        CLASS_WEIGHTED=class_weight is not None,
        config=plan.config,
    )
    totals = [logits.new_empty(batch) for _ in range(4)]
    config = choose("upsample_sum", target_of(logits), logits.dtype, "ieee", classes)
    launch(sum_kernel, batch, sums, *totals, programs, BLOCK=config.m, config=config)
    pooled = fixed[..., :-1].to(logits.dtype).mul_(2.0**-bits)
    return (*totals, pooled, fixed[..., -1].to(logits.dtype))


def backward(
    cross_entropy_gradient: Tensor,
    entropy_gradient: Tensor,
    pooled_gradient: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    superpixels: Tensor | None,
    class_weight: Tensor | None,
    num_superpixels: int,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The gradient of the logits (B, C, h, w), contiguous."""
    batch, classes, h, w = logits.shape
    num_ids = 0 if superpixels is None or pooled_gradient is None else num_superpixels
    plan = Plan.of("upsample_gradient", logits, labels, align_corners)
    constants = plan.constants(logits, num_ids)
    new = torch.empty if constants["BLOCK_C"] >= classes else torch.zeros
    corners = new((batch, plan.parts, 4, plan.quads, classes), dtype=logits.dtype, device=logits.device)
    gradients = [cross_entropy_gradient, entropy_gradient, logits if pooled_gradient is None else pooled_gradient]
    launch(
        corner_gradients_kernel,
        batch * plan.blocks * plan.parts,
        *(logits, *_maps(logits, labels, weight, superpixels, class_weight)),
        *(*(g.contiguous() for g in gradients), corners),
        *plan.scalars(logits, labels, ignore_index, num_ids),
        **constants,
        WEIGHTED=weight is not None,
        POOLED=num_ids > 0,
        CLASS_WEIGHTED=class_weight is not None,
        config=plan.config,
    )
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    config = choose("upsample_gather", target_of(logits), logits.dtype, "ieee", classes)
    launch(
        gather_kernel,
        batch * tiles(h * w, config.m) * tiles(classes, config.n),
        *(corners, out, h, w, plan.y.quads, plan.x.quads, plan.parts),
        CLASSES=classes,
        BLOCK_M=config.m,
        BLOCK_C=config.n,
        config=config,
    )
    return out
