"""`random_walk` on Triton: forward and backward tile by tile, in O(N) memory.

docs/kernels/random_walk.md, "GPU (Triton)", explains the tiling. Tensors are (B, N, width); see
`cc4s_kernels._triton.score_tiles` for the units of scores and for positions that are no state.
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
    multiply_rows,
    multiply_transposed,
    online_softmax,
    start_softmax,
    store_positions,
    store_rows,
    valid_positions,
)


@triton.jit
def walk_kernel(
    q,  # [B, n, KEY]
    k,  # [B, n, KEY]
    v,  # [B, n, VALUE], the state Y_i
    start,  # [B, n, VALUE], Y_0; not read without RESTART
    mask,  # [B, n] bool; not read without MASKED
    y,  # [B, n, VALUE] out: keep * P v + restart * start
    lse2,  # [B, n] out
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    start_batch,
    start_row,
    y_batch,
    y_row,
    n,
    factor,
    keep,
    restart,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
    RESTART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows first .. first + BLOCK_M and value columns column .. column + BLOCK_V of one step.

    The columns are split over programs so that the accumulator fits into registers; each split computes the scores.
    """
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    rest = tl.program_id(0) // blocks
    column = rest % SPLITS * BLOCK_V
    batch = tl.cast(rest // SPLITS, tl.int64)
    q += batch * q_batch
    k += batch * k_batch
    v += batch * v_batch
    mask += batch * n
    valid = valid_positions(mask, first, n, BLOCK_M, MASKED)
    q_tile = load_rows(q, q_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    peak, total = start_softmax(BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for other in range(0, n, BLOCK_N):
        keys = valid_positions(mask, other, n, BLOCK_N, MASKED)
        k_tile = load_rows(k, k_row, other, keys, 0, KEY, BLOCK_N, BLOCK_KEY)
        v_tile = load_rows(v, v_row, other, keys, column, VALUE, BLOCK_N, BLOCK_V)
        scores = multiply_transposed(q_tile, k_tile, PRECISION) * factor
        scores = tl.where(keys[None, :], scores, float("-inf"))
        weights, decay, peak, total = online_softmax(scores, peak, total)
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums * decay[:, None], input_precision=PRECISION)
    share = keep / tl.where(valid, total, 1.0)
    result = tl.where(valid[:, None], sums * share[:, None], 0.0)
    if RESTART:
        start_tile = load_rows(start + batch * start_batch, start_row, first, valid, column, VALUE, BLOCK_M, BLOCK_V)
        result += restart * start_tile.to(tl.float32)
    inside = first + tl.arange(0, BLOCK_M) < n
    store_rows(y + batch * y_batch, y_row, first, inside, column, result, VALUE, BLOCK_M, BLOCK_V)
    if column == 0:
        store_positions(lse2 + batch * n, first, inside, finish_softmax(peak, total, valid), BLOCK_M)


@triton.jit
def walk_transposed_kernel(
    q,  # [B, n, KEY]
    k,  # [B, n, KEY]
    g,  # [B, n, VALUE], the gradient of a state
    mask,  # [B, n] bool; not read without MASKED
    lse2,  # [B, n]
    out,  # [B, n, VALUE] out: keep * Pᵀ g + restart * g
    q_batch,
    q_row,
    k_batch,
    k_row,
    g_batch,
    g_row,
    out_batch,
    out_row,
    n,
    factor,
    keep,
    restart,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
    RESTART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys first .. first + BLOCK_M and value columns column .. column + BLOCK_V; sums over all queries."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    rest = tl.program_id(0) // blocks
    column = rest % SPLITS * BLOCK_V
    batch = tl.cast(rest // SPLITS, tl.int64)
    q += batch * q_batch
    k += batch * k_batch
    g += batch * g_batch
    mask += batch * n
    lse2 += batch * n
    valid = valid_positions(mask, first, n, BLOCK_M, MASKED)
    k_tile = load_rows(k, k_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for other in range(0, n, BLOCK_N):
        queries = valid_positions(mask, other, n, BLOCK_N, MASKED)
        q_tile = load_rows(q, q_row, other, queries, 0, KEY, BLOCK_N, BLOCK_KEY)
        g_tile = load_rows(g, g_row, other, queries, column, VALUE, BLOCK_N, BLOCK_V)
        # A query that is no state has lse +inf: all its probabilities are 0.
        lse_tile = load_positions(lse2, other, queries, float("inf"), BLOCK_N)
        scores = multiply_transposed(k_tile, q_tile, PRECISION) * factor
        p = tl.exp2(scores - lse_tile[None, :])  # [key, query]
        sums = tl.dot(p.to(g_tile.dtype), g_tile, sums, input_precision=PRECISION)
    result = keep * sums
    if RESTART:
        own = load_rows(g, g_row, first, valid, column, VALUE, BLOCK_M, BLOCK_V)
        result += restart * own.to(tl.float32)
    result = tl.where(valid[:, None], result, 0.0)
    inside = first + tl.arange(0, BLOCK_M) < n
    store_rows(out + batch * out_batch, out_row, first, inside, column, result, VALUE, BLOCK_M, BLOCK_V)


@triton.jit
def walk_level_kernel(
    g,  # [B, n, VALUE], the gradient of the state y
    y,  # [B, n, VALUE]
    start,  # [B, n, VALUE]; not read without RESTART
    mask,  # [B, n] bool; not read without MASKED
    lse_grad,  # [B, n]; not read without LSE_GRAD
    level,  # [B, n] out: <g, y - restart * start> - lse_grad
    g_batch,
    g_row,
    y_batch,
    y_row,
    start_batch,
    start_row,
    n,
    restart,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    RESTART: tl.constexpr,
    LSE_GRAD: tl.constexpr,
):
    """What the gradient of a score is counted from: dE_ij = P_ij (keep <g_i, Y_j> - level_i)."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    valid = valid_positions(mask + batch * n, first, n, BLOCK_M, MASKED)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for column in range(0, VALUE, BLOCK_V):
        g_tile = load_rows(g + batch * g_batch, g_row, first, valid, column, VALUE, BLOCK_M, BLOCK_V)
        y_tile = load_rows(y + batch * y_batch, y_row, first, valid, column, VALUE, BLOCK_M, BLOCK_V).to(tl.float32)
        if RESTART:
            tile = load_rows(start + batch * start_batch, start_row, first, valid, column, VALUE, BLOCK_M, BLOCK_V)
            y_tile -= restart * tile.to(tl.float32)
        sums += tl.sum(g_tile.to(tl.float32) * y_tile, 1)
    if LSE_GRAD:
        sums -= load_positions(lse_grad + batch * n, first, valid, 0.0, BLOCK_M)
    inside = first + tl.arange(0, BLOCK_M) < n
    store_positions(level + batch * n, first, inside, sums, BLOCK_M)


@triton.jit
def walk_scores_kernel(
    a,  # [B, n, KEY], the owned side: q for BY_QUERY, else k
    b,  # [B, n, KEY], the other of q and k
    wide_a,  # [B, n, VALUE], g for BY_QUERY, else the state y
    wide_b,  # [B, n, VALUE], the other of g and y
    mask,  # [B, n] bool; not read without MASKED
    lse2,  # [B, n]
    level,  # [B, n], of `walk_level_kernel`
    out,  # [B, n, KEY] out: gradient of a, added to for ACCUMULATE
    a_batch,
    a_row,
    b_batch,
    b_row,
    wide_a_batch,
    wide_a_row,
    wide_b_batch,
    wide_b_row,
    out_batch,
    out_row,
    n,
    factor,
    keep,
    scale,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BY_QUERY: tl.constexpr,
    MASKED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ (BY_QUERY) or dK: one side owned, summed over the other; scores and their gradients are computed again."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    wide_a += batch * wide_a_batch
    wide_b += batch * wide_b_batch
    out += batch * out_batch
    mask += batch * n
    lse2 += batch * n
    level += batch * n
    valid = valid_positions(mask, first, n, BLOCK_M, MASKED)
    a_tile = load_rows(a, a_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    if BLOCK_V >= VALUE:
        wide_a_tile = load_rows(wide_a, wide_a_row, first, valid, 0, VALUE, BLOCK_M, BLOCK_V)
    if BY_QUERY:
        own_lse = load_positions(lse2, first, valid, float("inf"), BLOCK_M)
        own_level = load_positions(level, first, valid, 0.0, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_KEY], tl.float32)
    for other in range(0, n, BLOCK_N):
        others = valid_positions(mask, other, n, BLOCK_N, MASKED)
        b_tile = load_rows(b, b_row, other, others, 0, KEY, BLOCK_N, BLOCK_KEY)
        if BLOCK_V >= VALUE:
            wide_b_tile = load_rows(wide_b, wide_b_row, other, others, 0, VALUE, BLOCK_N, BLOCK_V)
            product = multiply_transposed(wide_a_tile, wide_b_tile, PRECISION)
        else:
            product = multiply_rows(
                wide_a,
                wide_a_row,
                first,
                valid,
                wide_b,
                wide_b_row,
                other,
                others,
                VALUE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_V,
                PRECISION,
            )
        scores = multiply_transposed(a_tile, b_tile, PRECISION) * factor
        if BY_QUERY:
            scores = tl.where(others[None, :], scores, float("-inf"))
            gradient = tl.exp2(scores - own_lse[:, None]) * (keep * product - own_level[:, None])
        else:
            # A query that is no state has lse +inf: all its probabilities are 0.
            lse_tile = load_positions(lse2, other, others, float("inf"), BLOCK_N)
            level_tile = load_positions(level, other, others, 0.0, BLOCK_N)
            gradient = tl.exp2(scores - lse_tile[None, :]) * (keep * product - level_tile[None, :])
        sums = tl.dot(gradient.to(b_tile.dtype), b_tile, sums, input_precision=PRECISION)
    result = tl.where(valid[:, None], scale * sums, 0.0)
    inside = first + tl.arange(0, BLOCK_M) < n
    if ACCUMULATE:
        result += load_rows(out, out_row, first, inside, 0, KEY, BLOCK_M, BLOCK_KEY)
    store_rows(out, out_row, first, inside, 0, result, KEY, BLOCK_M, BLOCK_KEY)


def _table(mask: Tensor | None, restart: float) -> str:
    return "walk" if mask is None and restart == 0.0 else "walk_general"


class TritonKernels:
    """As `cc4s_kernels.ops.random_walk.steps.Kernels` says."""

    rows = staticmethod(rows)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        x: Tensor,
        start: Tensor,
        mask: Tensor | None,
        y: Tensor,
        lse2: Tensor,
        scale: float,
        restart: float,
    ) -> None:
        batch, n, key = q.shape
        value = x.shape[-1]
        kind = precision(q.dtype)
        config = choose(_table(mask, restart), target_of(q), q.dtype, kind, key, value)
        block_v = min(config.v, block_of(value))
        splits = max(1, tiles(value, block_v))
        launch(
            walk_kernel,
            batch * tiles(n, config.m) * splits,
            *(q, k, x, start, q if mask is None else mask.contiguous(), y, lse2),
            *strides(q, k, x, start, y),
            *(n, scale * LOG2_E, 1.0 - restart, restart),
            KEY=key,
            VALUE=value,
            BLOCK_M=config.m,
            BLOCK_N=config.n,
            BLOCK_KEY=block_of(key),
            BLOCK_V=block_v,
            SPLITS=splits,
            MASKED=mask is not None,
            RESTART=restart != 0.0,
            PRECISION=kind,
            config=config,
        )

    def level(
        self, g: Tensor, y: Tensor, start: Tensor, mask: Tensor | None, lse_grad: Tensor | None, restart: float
    ) -> Tensor:
        batch, n, value = g.shape
        level = g.new_empty((batch, n), dtype=torch.float32)
        config = choose("walk_level", target_of(g), g.dtype, "ieee", 0, value)
        launch(
            walk_level_kernel,
            batch * tiles(n, config.m),
            *(g, y, start, g if mask is None else mask.contiguous(), g if lse_grad is None else lse_grad.contiguous()),
            level,
            *strides(g, y, start),
            *(n, restart),
            VALUE=value,
            BLOCK_M=config.m,
            BLOCK_V=min(config.v, block_of(value)),
            MASKED=mask is not None,
            RESTART=restart != 0.0,
            LSE_GRAD=lse_grad is not None,
            config=config,
        )
        return level

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        x: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        level: Tensor,
        q_grad: Tensor,
        k_grad: Tensor,
        scale: float,
        keep: float,
        accumulate: bool,
    ) -> None:
        batch, n, key = q.shape
        value = g.shape[-1]
        kind = precision(q.dtype)
        config = choose("walk_scores", target_of(q), q.dtype, kind, key, value)
        for sides, out in (((q, k, g, x), q_grad), ((k, q, x, g), k_grad)):
            launch(
                walk_scores_kernel,
                batch * tiles(n, config.m),
                *(*sides, q if mask is None else mask.contiguous(), lse2, level, out),
                *strides(*sides, out),
                *(n, scale * LOG2_E, keep, scale),
                KEY=key,
                VALUE=value,
                BLOCK_M=config.m,
                BLOCK_N=config.n,
                BLOCK_KEY=block_of(key),
                BLOCK_V=min(config.v, block_of(value)),
                BY_QUERY=out is q_grad,
                MASKED=mask is not None,
                ACCUMULATE=accumulate,
                PRECISION=kind,
                config=config,
            )

    def transposed(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        scale: float,
        keep: float,
        restart: float,
    ) -> Tensor:
        batch, n, key = q.shape
        value = g.shape[-1]
        out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        kind = precision(q.dtype)
        config = choose(_table(mask, restart), target_of(q), q.dtype, kind, key, value)
        block_v = min(config.v, block_of(value))
        splits = max(1, tiles(value, block_v))
        launch(
            walk_transposed_kernel,
            batch * tiles(n, config.m) * splits,
            *(q, k, g, q if mask is None else mask.contiguous(), lse2, out),
            *strides(q, k, g, out),
            *(n, scale * LOG2_E, keep, restart),
            KEY=key,
            VALUE=value,
            BLOCK_M=config.m,
            BLOCK_N=config.n,
            BLOCK_KEY=block_of(key),
            BLOCK_V=block_v,
            SPLITS=splits,
            MASKED=mask is not None,
            RESTART=restart != 0.0,
            PRECISION=kind,
            config=config,
        )
        return out
