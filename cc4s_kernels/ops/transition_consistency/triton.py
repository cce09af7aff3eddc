"""`transition_consistency` on Triton: one online pass forward, two passes over recomputed tiles backward.

docs/kernels/transition_consistency.md, "GPU (Triton)", explains the tiling. Tensors are (B, N, d); rows are the
positions that are normalised: `normalize="column"` swaps the roles of q and k before it comes here. See
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
    multiply_transposed,
    online_softmax,
    scores_with,
    start_softmax,
    store_positions,
    store_rows,
    valid_positions,
)


@triton.jit
def consistency_kernel(
    q,  # [B, n, KEY]
    k,  # [B, n, KEY]
    q_target,  # [B, n, KEY]
    k_target,  # [B, n, KEY]
    mask,  # [B, n] bool; not read without MASKED
    kl,  # [B, n] out, in nats
    diagonal,  # [B, n] out: P_ii
    diagonal_target,  # [B, n] out: P'_ii
    lse2,  # [B, n] out
    lse2_target,  # [B, n] out
    q_batch,
    q_row,
    k_batch,
    k_row,
    q_target_batch,
    q_target_row,
    k_target_batch,
    k_target_row,
    n,
    factor,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows first .. first + BLOCK_M: carries (peak, total) of both softmaxes and sum_j exp2(S'_ij) (S'_ij - S_ij)."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    q += batch * q_batch
    k += batch * k_batch
    q_target += batch * q_target_batch
    k_target += batch * k_target_batch
    mask += batch * n
    valid = valid_positions(mask, first, n, BLOCK_M, MASKED)
    q_own = load_rows(q, q_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    q_target_own = load_rows(q_target, q_target_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    peak, total = start_softmax(BLOCK_M)
    peak_target, total_target = start_softmax(BLOCK_M)
    excess = tl.zeros([BLOCK_M], tl.float32)
    for other in range(0, n, BLOCK_N):
        keys = valid_positions(mask, other, n, BLOCK_N, MASKED)
        scores = scores_with(
            q_own, q, q_row, first, valid, k, k_row, other, keys, factor, KEY, BLOCK_M, BLOCK_N, BLOCK_KEY, PRECISION
        )
        target = scores_with(
            q_target_own,
            q_target,
            q_target_row,
            first,
            valid,
            k_target,
            k_target_row,
            other,
            keys,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            BLOCK_KEY,
            PRECISION,
        )
        # Zero where there is no key: its weight is 0, and -inf - -inf would be NaN.
        gap = tl.where(keys[None, :], target - scores, 0.0)
        scores = tl.where(keys[None, :], scores, float("-inf"))
        target = tl.where(keys[None, :], target, float("-inf"))
        _, _, peak, total = online_softmax(scores, peak, total)
        weights, decay, peak_target, total_target = online_softmax(target, peak_target, total_target)
        excess = excess * decay + tl.sum(weights * gap, 1)
    total = tl.where(valid, total, 1.0)
    total_target = tl.where(valid, total_target, 1.0)
    peak = tl.where(valid, peak, 0.0)
    peak_target = tl.where(valid, peak_target, 0.0)
    lse = finish_softmax(peak, total, valid)
    lse_target = finish_softmax(peak_target, total_target, valid)
    # The diagonal by products of the same shape as above, so that its scores round as they did there.
    trace = tl.zeros([BLOCK_M], tl.float32)
    trace_target = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0, BLOCK_M, BLOCK_N):
        other = first + part
        keys = valid_positions(mask, other, n, BLOCK_N, MASKED)
        same = part + tl.arange(0, BLOCK_N)[None, :] == tl.arange(0, BLOCK_M)[:, None]
        scores = scores_with(
            q_own, q, q_row, first, valid, k, k_row, other, keys, factor, KEY, BLOCK_M, BLOCK_N, BLOCK_KEY, PRECISION
        )
        target = scores_with(
            q_target_own,
            q_target,
            q_target_row,
            first,
            valid,
            k_target,
            k_target_row,
            other,
            keys,
            factor,
            KEY,
            BLOCK_M,
            BLOCK_N,
            BLOCK_KEY,
            PRECISION,
        )
        trace += tl.sum(tl.where(same, scores, 0.0), 1)
        trace_target += tl.sum(tl.where(same, target, 0.0), 1)
    inside = first + tl.arange(0, BLOCK_M) < n
    start = batch * n
    # Peaks first: they nearly cancel the mean gap where few keys have all the weight.
    divergence = excess / total_target - (peak_target - peak) - (tl.log2(total_target) - tl.log2(total))
    divergence = divergence * 0.6931471805599453  # ln 2
    store_positions(kl + start, first, inside, tl.where(valid, divergence, 0.0), BLOCK_M)
    store_positions(diagonal + start, first, inside, tl.where(valid, tl.exp2(trace - lse), 0.0), BLOCK_M)
    trace_target = tl.where(valid, tl.exp2(trace_target - lse_target), 0.0)
    store_positions(diagonal_target + start, first, inside, trace_target, BLOCK_M)
    store_positions(lse2 + start, first, inside, lse, BLOCK_M)
    store_positions(lse2_target + start, first, inside, lse_target, BLOCK_M)


@triton.jit
def consistency_scores_kernel(
    a,  # [B, n, KEY], the owned side: q for BY_QUERY, else k
    b,  # [B, n, KEY], the other of q and k
    a_target,  # [B, n, KEY], of the target
    b_target,  # [B, n, KEY]
    mask,  # [B, n] bool; not read without MASKED
    lse2,  # [B, n]
    lse2_target,  # [B, n]
    kl_grad,  # [B, n], g_i
    trace_grad,  # [B, n], s P_ii
    unit,  # [1], what both are measured in
    out,  # [B, n, KEY] out: gradient of a
    a_batch,
    a_row,
    b_batch,
    b_row,
    a_target_batch,
    a_target_row,
    b_target_batch,
    b_target_row,
    out_batch,
    out_row,
    n,
    factor,
    scale,
    KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BY_QUERY: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ (BY_QUERY) or dK: dE_ij = g_i (P_ij - P'_ij) + s P_ii (delta_ij - P_ij), one side owned."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    a += batch * a_batch
    b += batch * b_batch
    a_target += batch * a_target_batch
    b_target += batch * b_target_batch
    mask += batch * n
    lse2 += batch * n
    lse2_target += batch * n
    kl_grad += batch * n
    trace_grad += batch * n
    valid = valid_positions(mask, first, n, BLOCK_M, MASKED)
    a_tile = load_rows(a, a_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    a_target_tile = load_rows(a_target, a_target_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    own_trace = load_positions(trace_grad, first, valid, 0.0, BLOCK_M)
    if BY_QUERY:
        own_lse = load_positions(lse2, first, valid, float("inf"), BLOCK_M)
        own_lse_target = load_positions(lse2_target, first, valid, float("inf"), BLOCK_M)
        own_kl = load_positions(kl_grad, first, valid, 0.0, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_KEY], tl.float32)
    for other in range(0, n, BLOCK_N):
        others = valid_positions(mask, other, n, BLOCK_N, MASKED)
        b_tile = load_rows(b, b_row, other, others, 0, KEY, BLOCK_N, BLOCK_KEY)
        b_target_tile = load_rows(b_target, b_target_row, other, others, 0, KEY, BLOCK_N, BLOCK_KEY)
        scores = multiply_transposed(a_tile, b_tile, PRECISION) * factor
        target = multiply_transposed(a_target_tile, b_target_tile, PRECISION) * factor
        if BY_QUERY:
            scores = tl.where(others[None, :], scores, float("-inf"))
            target = tl.where(others[None, :], target, float("-inf"))
            p = tl.exp2(scores - own_lse[:, None])
            gradient = own_kl[:, None] * (p - tl.exp2(target - own_lse_target[:, None])) - own_trace[:, None] * p
        else:
            # A query that is no state has lse +inf: all its probabilities are 0.
            lse_tile = load_positions(lse2, other, others, float("inf"), BLOCK_N)
            lse_target_tile = load_positions(lse2_target, other, others, float("inf"), BLOCK_N)
            kl_tile = load_positions(kl_grad, other, others, 0.0, BLOCK_N)
            trace_tile = load_positions(trace_grad, other, others, 0.0, BLOCK_N)
            p = tl.exp2(scores - lse_tile[None, :])
            gradient = kl_tile[None, :] * (p - tl.exp2(target - lse_target_tile[None, :])) - trace_tile[None, :] * p
        sums = tl.dot(gradient.to(b_tile.dtype), b_tile, sums, input_precision=PRECISION)
    # s P_ii of the diagonal, rounded as the tiles are: with one key both cancel.
    own_b = load_rows(b, b_row, first, valid, 0, KEY, BLOCK_M, BLOCK_KEY)
    own_trace = own_trace.to(own_b.dtype).to(tl.float32)
    sums += own_trace[:, None] * own_b.to(tl.float32)
    result = tl.where(valid[:, None], scale * tl.load(unit) * sums, 0.0)
    inside = first + tl.arange(0, BLOCK_M) < n
    store_rows(out + batch * out_batch, out_row, first, inside, 0, result, KEY, BLOCK_M, BLOCK_KEY)


class TritonKernels:
    """As `cc4s_kernels.ops.transition_consistency.passes.Kernels` says."""

    rows = staticmethod(rows)

    def divergences(
        self, q: Tensor, k: Tensor, q_target: Tensor, k_target: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, n, key = q.shape
        kl, diagonal, diagonal_target, lse2, lse2_target = (
            torch.empty((batch, n), dtype=torch.float32, device=q.device) for _ in range(5)
        )
        kind = precision(q.dtype)
        config = choose("consistency", target_of(q), q.dtype, kind, key)
        launch(
            consistency_kernel,
            batch * tiles(n, config.m),
            *(q, k, q_target, k_target, q if mask is None else mask.contiguous()),
            *(kl, diagonal, diagonal_target, lse2, lse2_target),
            *strides(q, k, q_target, k_target),
            *(n, scale * LOG2_E),
            KEY=key,
            BLOCK_M=config.m,
            BLOCK_N=config.n,
            BLOCK_KEY=min(config.v, block_of(key)),
            MASKED=mask is not None,
            PRECISION=kind,
            config=config,
        )
        return kl, diagonal, diagonal_target, lse2, lse2_target

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        q_target: Tensor,
        k_target: Tensor,
        mask: Tensor | None,
        lse2: Tensor,
        lse2_target: Tensor,
        kl_grad: Tensor,
        trace_grad: Tensor,
        unit: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        batch, n, key = q.shape
        q_grad, k_grad = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in "qk")
        kind = precision(q.dtype)
        config = choose("consistency_scores", target_of(q), q.dtype, kind, key)
        for by_query, sides, out in (
            (True, (q, k, q_target, k_target), q_grad),
            (False, (k, q, k_target, q_target), k_grad),
        ):
            launch(
                consistency_scores_kernel,
                batch * tiles(n, config.m),
                *(*sides, q if mask is None else mask.contiguous()),
                *(lse2, lse2_target, kl_grad, trace_grad, unit, out),
                *strides(*sides, out),
                *(n, scale * LOG2_E, scale),
                KEY=key,
                BLOCK_M=config.m,
                BLOCK_N=config.n,
                BLOCK_KEY=block_of(key),
                BY_QUERY=by_query,
                MASKED=mask is not None,
                PRECISION=kind,
                config=config,
            )
        return q_grad, k_grad
