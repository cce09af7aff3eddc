"""Device functions of the pairwise kernels: a tile of scores, its online softmax, and the loads around it.

A kernel owns BLOCK_M positions of one side and walks over tiles of BLOCK_N positions of the other. Scores are in
units of log 2 (`factor` = scale / ln 2), so that exp2 and log2 are single instructions; a logsumexp in these units
is called `lse2`. Positions that are no state (masked, or past the end) load as zeros and are taken out by
`valid`. Addresses: the start of a tile in int64, offsets inside a tile in int32 (`launch.rows` bounds the strides).
Loops are `range`, not `while`: only those are software-pipelined.
"""

import triton
import triton.language as tl


@triton.jit
def valid_positions(mask, first, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Which of the positions first .. first + BLOCK are states.  mask: [n] bool of this batch entry."""
    positions = first + tl.arange(0, BLOCK)
    valid = positions < n
    if MASKED:
        valid = valid & (tl.load(mask + positions, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_rows(x, row_stride, first, valid, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of x [n, WIDTH] from row `first` and column `column`, 0 where not valid."""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = valid[:, None]
    if WIDTH == 0 or WIDTH % COLUMNS != 0:
        inside = inside & (columns[None, :] < WIDTH)
    tile = x + tl.cast(first, tl.int64) * row_stride
    return tl.load(tile + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    x, row_stride, first, inside, column, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes `tile` [ROWS, COLUMNS] into x [n, WIDTH] where `inside` [ROWS]."""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = inside[:, None]
    if WIDTH == 0 or WIDTH % COLUMNS != 0:
        inside = inside & (columns[None, :] < WIDTH)
    start = x + tl.cast(first, tl.int64) * row_stride
    tl.store(start + rows[:, None] * row_stride + columns[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_positions(x, first, inside, other, BLOCK: tl.constexpr):
    """[BLOCK] of x [n], `other` where not inside."""
    return tl.load(x + first + tl.arange(0, BLOCK), mask=inside, other=other)


@triton.jit
def store_positions(x, first, inside, values, BLOCK: tl.constexpr):
    tl.store(x + first + tl.arange(0, BLOCK), values, mask=inside)


@triton.jit
def multiply_transposed(a, b, PRECISION: tl.constexpr):
    """a [M, D], b [N, D] -> a bᵀ [M, N] in float32."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def multiply_rows(
    a,  # [n, WIDTH]
    a_row,
    first_a,
    valid_a,  # [M]
    b,  # [n, WIDTH]
    b_row,
    first_b,
    valid_b,  # [N]
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a bᵀ [M, N] of M rows of a and N rows of b, loaded COLUMNS columns at a time."""
    product = tl.zeros([M, N], tl.float32)
    for column in range(0, WIDTH, COLUMNS):
        part_a = load_rows(a, a_row, first_a, valid_a, column, WIDTH, M, COLUMNS)
        part_b = load_rows(b, b_row, first_b, valid_b, column, WIDTH, N, COLUMNS)
        product = tl.dot(part_a, tl.trans(part_b), product, input_precision=PRECISION)
    return product


@triton.jit
def scores_with(
    own,  # [M, COLUMNS], the first columns of these rows of a
    a,
    a_row,
    first_a,
    valid_a,
    b,
    b_row,
    first_b,
    valid_b,
    factor,
    KEY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [M, N] of owned rows of a and rows of b, in chunks where COLUMNS < KEY."""
    if COLUMNS >= KEY:
        tile = load_rows(b, b_row, first_b, valid_b, 0, KEY, N, COLUMNS)
        product = multiply_transposed(own, tile, PRECISION)
    else:
        product = multiply_rows(a, a_row, first_a, valid_a, b, b_row, first_b, valid_b, KEY, M, N, COLUMNS, PRECISION)
    return product * factor


@triton.jit
def start_softmax(BLOCK: tl.constexpr):
    """(peak, total) of rows without a key so far."""
    return tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def online_softmax(scores, peak, total):
    """Takes a tile of scores [M, N] into the running (peak, total) [M].

    Returns: weights exp2(scores - new peak) [M, N], the factor [M] for what was summed before, new peak, new total.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row without a valid key so far has peak -inf, and -inf - -inf is NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def finish_softmax(peak, total, valid):
    """lse2 [M] of rows, 0 where not valid."""
    return tl.where(valid, peak + tl.log2(tl.where(valid, total, 1.0)), 0.0)
