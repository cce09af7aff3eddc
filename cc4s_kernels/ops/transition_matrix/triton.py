"""`transition_matrix` on Triton: one pass for the normalisers, one that writes the matrix; the same again backward.

Tensors are (B, N, d). Side a is normalised for each of its positions over side b: a is q for "row", k for "column"
(the matrix is then addressed transposed). For "symmetric" the kernels take both sides of both and
S_ij = (a_i b_j + b_i a_j) / 2. See `cc4s_kernels._triton.score_tiles` for the units of scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cc4s_kernels._triton.configs import choose
from cc4s_kernels._triton.launch import LOG2_E, block_of, launch, precision, rows, strides, target_of, tiles
from cc4s_kernels._triton.score_tiles import (
    finish_softmax,
    load_positions,
    load_rows,
    online_softmax,
    scores_with,
    start_softmax,
    store_positions,
    store_rows,
    valid_positions,
)


@triton.jit
def pair_scores(
    a_own,  # [M, CHUNK], the first columns of these rows of a
    b_own,  # [M, CHUNK], of b; not used without SYMMETRIC
    a,
    a_row,
    b,
    b_row,
    first,
    inside,
    other,
    others,
    factor,
    KEY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[own, other] scores."""
    scores = scores_with(a_own, a, a_row, first, inside, b, b_row, other, others, factor, KEY, M, N, CHUNK, PRECISION)
    if SYMMETRIC:
        scores += scores_with(
            b_own, b, b_row, first, inside, a, a_row, other, others, factor, KEY, M, N, CHUNK, PRECISION
        )
        scores = scores * 0.5
    return scores


@triton.jit
def load_entries(
    x,
    row_stride,
    column_stride,
    row,
    column,
    rows_inside,
    columns_inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix [n, n] in float32, 0 outside."""
    start = x + tl.cast(row, tl.int64) * row_stride + tl.cast(column, tl.int64) * column_stride
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :] * column_stride
    return tl.load(start + offsets, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def matrix_lse_kernel(
    a,  # [B, n, KEY]
    b,  # [B, n, KEY]
    lse2,  # [B, n] out, of the positions of a
    a_batch,
    a_row,
    b_batch,
    b_row,
    n,
    factor,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    inside = valid_positions(a, first, n, BLOCK_M, False)
    a_own = load_rows(a, a_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    b_own = a_own
    if SYMMETRIC:
        b_own = load_rows(b, b_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    peak, total = start_softmax(BLOCK_M)
    for other in range(0, n, BLOCK_N):
        others = valid_positions(a, other, n, BLOCK_N, False)
        scores = pair_scores(
            a_own,
            b_own,
            a,
            a_row,
            b,
            b_row,
            first,
            inside,
            other,
            others,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            CHUNK,
            SYMMETRIC,
            PRECISION,
        )
        _, _, peak, total = online_softmax(tl.where(others[None, :], scores, float("-inf")), peak, total)
    store_positions(lse2 + batch * n, first, inside, finish_softmax(peak, total, inside), BLOCK_M)


@triton.jit
def matrix_kernel(
    a,  # [B, n, KEY]
    b,  # [B, n, KEY]
    lse2,  # [B, n]
    matrix,  # [B, n, n] out, addressed as [own, other]
    a_batch,
    a_row,
    b_batch,
    b_row,
    matrix_batch,
    matrix_own,
    matrix_other,
    n,
    factor,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the matrix."""
    blocks = tl.cdiv(n, BLOCK_M)
    blocks_other = tl.cdiv(n, BLOCK_N)
    other = tl.program_id(0) % blocks_other * BLOCK_N
    rest = tl.program_id(0) // blocks_other
    first = rest % blocks * BLOCK_M
    batch = tl.cast(rest // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    lse2 += batch * n
    inside = valid_positions(a, first, n, BLOCK_M, False)
    others = valid_positions(a, other, n, BLOCK_N, False)
    a_own = load_rows(a, a_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    b_own = a_own
    level = load_positions(lse2, first, inside, 0.0, BLOCK_M)[:, None]
    if SYMMETRIC:
        b_own = load_rows(b, b_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
        level = (level + load_positions(lse2, other, others, 0.0, BLOCK_N)[None, :]) * 0.5
    entries = tl.exp2(
        pair_scores(
            a_own,
            b_own,
            a,
            a_row,
            b,
            b_row,
            first,
            inside,
            other,
            others,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            CHUNK,
            SYMMETRIC,
            PRECISION,
        )
        - level
    )
    start = matrix + batch * matrix_batch
    start += tl.cast(first, tl.int64) * matrix_own + tl.cast(other, tl.int64) * matrix_other
    offsets = tl.arange(0, BLOCK_M)[:, None] * matrix_own + tl.arange(0, BLOCK_N)[None, :] * matrix_other
    tl.store(start + offsets, entries.to(matrix.dtype.element_ty), mask=inside[:, None] & others[None, :])


@triton.jit
def matrix_level_kernel(
    a,  # [B, n, KEY]
    b,  # [B, n, KEY]
    lse2,  # [B, n]
    g,  # [B, n, n], the gradient of the matrix, addressed as [own, other]
    level,  # [B, n] out: sum_j g_ij P_ij; for SYMMETRIC sum_j (g_ij + g_ji) M_ij
    a_batch,
    a_row,
    b_batch,
    b_row,
    g_batch,
    g_own,
    g_other,
    n,
    factor,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    g += batch * g_batch
    lse2 += batch * n
    inside = valid_positions(a, first, n, BLOCK_M, False)
    a_own = load_rows(a, a_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    b_own = a_own
    if SYMMETRIC:
        b_own = load_rows(b, b_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    own_lse = load_positions(lse2, first, inside, float("inf"), BLOCK_M)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for other in range(0, n, BLOCK_N):
        others = valid_positions(a, other, n, BLOCK_N, False)
        gradient = load_entries(g, g_own, g_other, first, other, inside, others, BLOCK_M, BLOCK_N)
        shift = own_lse[:, None]
        if SYMMETRIC:
            gradient += load_entries(g, g_other, g_own, first, other, inside, others, BLOCK_M, BLOCK_N)
            shift = (shift + load_positions(lse2, other, others, float("inf"), BLOCK_N)[None, :]) * 0.5
        scores = pair_scores(
            a_own,
            b_own,
            a,
            a_row,
            b,
            b_row,
            first,
            inside,
            other,
            others,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            CHUNK,
            SYMMETRIC,
            PRECISION,
        )
        entries = tl.exp2(tl.where(others[None, :], scores, float("-inf")) - shift)
        sums += tl.sum(gradient * entries, 1)
    store_positions(level + batch * n, first, inside, sums, BLOCK_M)


@triton.jit
def matrix_scores_kernel(
    a,  # [B, n, KEY], the owned side, whose gradient this is
    b,  # [B, n, KEY], the other side
    lse2,  # [B, n], of a for NORMALIZED, else of b
    g,  # [B, n, n], the gradient of the matrix, addressed as [own, other]
    level,  # [B, n], of `matrix_level_kernel`, of the same side as lse2
    out,  # [B, n, KEY] out
    a_batch,
    a_row,
    b_batch,
    b_row,
    out_batch,
    out_row,
    g_batch,
    g_own,
    g_other,
    n,
    factor,
    scale,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dE_ij = P_ij (g_ij - level_i); SYMMETRIC: ((g_ij + g_ji) M_ij - (level_i P_ij + level_j P_ji) / 2) / 2."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    g += batch * g_batch
    lse2 += batch * n
    level += batch * n
    inside = valid_positions(a, first, n, BLOCK_M, False)
    a_own = load_rows(a, a_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    b_own = a_own
    if SYMMETRIC:
        b_own = load_rows(b, b_row, first, inside, 0, KEY, BLOCK_M, CHUNK)
    own_lse = load_positions(lse2, first, inside, float("inf"), BLOCK_M)
    own_level = load_positions(level, first, inside, 0.0, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_KEY], tl.float32)
    for other in range(0, n, BLOCK_N):
        others = valid_positions(a, other, n, BLOCK_N, False)
        b_other = load_rows(b, b_row, other, others, 0, KEY, BLOCK_N, BLOCK_KEY)
        gradient = load_entries(g, g_own, g_other, first, other, inside, others, BLOCK_M, BLOCK_N)
        if SYMMETRIC:
            gradient += load_entries(g, g_other, g_own, first, other, inside, others, BLOCK_M, BLOCK_N)
        scores = pair_scores(
            a_own,
            b_own,
            a,
            a_row,
            b,
            b_row,
            first,
            inside,
            other,
            others,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            CHUNK,
            SYMMETRIC,
            PRECISION,
        )
        lse_tile = load_positions(lse2, other, others, float("inf"), BLOCK_N)
        level_tile = load_positions(level, other, others, 0.0, BLOCK_N)
        if SYMMETRIC:
            scores = tl.where(others[None, :], scores, float("-inf"))
            entries = tl.exp2(scores - (own_lse[:, None] + lse_tile[None, :]) * 0.5)
            of_lse = own_level[:, None] * tl.exp2(scores - own_lse[:, None])
            of_lse += level_tile[None, :] * tl.exp2(scores - lse_tile[None, :])
            gradient = (gradient * entries - of_lse * 0.5) * 0.5
        elif NORMALIZED:
            scores = tl.where(others[None, :], scores, float("-inf"))
            gradient = tl.exp2(scores - own_lse[:, None]) * (gradient - own_level[:, None])
        else:
            gradient = tl.exp2(scores - lse_tile[None, :]) * (gradient - level_tile[None, :])
        sums = tl.dot(gradient.to(b_other.dtype), b_other, sums, input_precision=PRECISION)
    store_rows(out + batch * out_batch, out_row, first, inside, 0, scale * sums, KEY, BLOCK_M, BLOCK_KEY)


def _table(kernel: str, normalize: str) -> str:
    return f"{kernel}_symmetric" if normalize == "symmetric" else kernel


def forward(q: Tensor, k: Tensor, scale: float, normalize: str) -> tuple[Tensor, Tensor]:
    """The matrix (B, N, N) in the dtype of q, and lse2 (B, N) float32 of the normalised side."""
    q, k = rows(q), rows(k)
    batch, n, key = q.shape
    matrix = q.new_empty((batch, n, n))
    lse2 = q.new_empty((batch, n), dtype=torch.float32)
    a, b, entries = (k, q, matrix.mT) if normalize == "column" else (q, k, matrix)
    kind = precision(q.dtype)
    config = choose(_table("matrix", normalize), target_of(q), q.dtype, kind, key)
    constants = {
        "KEY": key,
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "CHUNK": min(config.v, block_of(key)),
        "SYMMETRIC": normalize == "symmetric",
        "PRECISION": kind,
    }
    programs = batch * tiles(n, config.m)
    options = (n, scale * LOG2_E)
    launch(matrix_lse_kernel, programs, a, b, lse2, *strides(a, b), *options, **constants, config=config)
    launch(
        matrix_kernel,
        programs * tiles(n, config.n),
        *(a, b, lse2, matrix),
        *(*strides(a, b), *entries.stride(), *options),
        **constants,
        config=config,
    )
    return matrix, lse2


def backward(
    q: Tensor, k: Tensor, lse2: Tensor, matrix_grad: Tensor, scale: float, normalize: str
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    q, k, lse2 = rows(q), rows(k), lse2.contiguous()
    batch, n, key = q.shape
    level = torch.empty_like(lse2)
    q_grad, k_grad = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in "qk")
    g, a, b, a_grad, b_grad = matrix_grad, q, k, q_grad, k_grad
    if normalize == "column":
        g, a, b, a_grad, b_grad = g.mT, k, q, k_grad, q_grad
    kind = precision(q.dtype)
    config = choose(_table("matrix_scores", normalize), target_of(q), q.dtype, kind, key)
    constants = {
        "KEY": key,
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "CHUNK": min(config.v, block_of(key)),
        "SYMMETRIC": normalize == "symmetric",
        "PRECISION": kind,
    }
    programs = batch * tiles(n, config.m)
    launch(
        matrix_level_kernel,
        programs,
        *(a, b, lse2, g, level),
        *(*strides(a, b), *g.stride(), n, scale * LOG2_E),
        **constants,
        config=config,
    )
    for normalized, sides, gradient, out in ((True, (a, b), g, a_grad), (False, (b, a), g.mT, b_grad)):
        launch(
            matrix_scores_kernel,
            programs,
            *(*sides, lse2, gradient, level, out),
            *(*strides(*sides, out), *gradient.stride(), n, scale * LOG2_E, scale),
            **constants,
            BLOCK_KEY=block_of(key),
            NORMALIZED=normalized,
            config=config,
        )
    return q_grad, k_grad
