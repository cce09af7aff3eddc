"""Tile shapes of the Triton kernels: a plain table, chosen by arithmetic, never by timing at import.

The first row that fits is taken. docs/kernels/random_walk.md (pairwise ops) and docs/kernels/upsample_losses.md say how
a row is reasoned; `make compile-check` compiles the rows for their GPUs and fails on register spills or too much
shared memory.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Target = Literal["sm_80", "sm_86", "sm_90", "sm_100", "interpreter"]
"""sm_86 stands for the chips with 99 KiB of shared memory (8.6, 8.9, 12.x)."""

Kind = Literal["float64", "float32", "tf32", "half"]


class Config(NamedTuple):
    """Shape of a kernel instance.

    m: positions a program owns. n: positions of the other side in one step. v: value columns in one step.
    warps: of 32 threads. stages: tiles in flight. `upsample_*`: m pixels (or positions), n classes in one step.
    """

    m: int
    n: int
    v: int
    warps: int
    stages: int


class Row(NamedTuple):
    """targets, kinds: where the row counts. key, value: largest d (or number of classes) and D. config: what is then
    taken."""

    targets: tuple[Target, ...]
    kinds: tuple[Kind, ...]
    key: int
    value: int
    config: Config


ANY = 1 << 30
ALL: tuple[Target, ...] = ("sm_80", "sm_86", "sm_90", "sm_100")
HOPPER: tuple[Target, ...] = ("sm_90", "sm_100")
AMPERE: tuple[Target, ...] = ("sm_80", "sm_86")
EVERY: tuple[Kind, ...] = ("float32", "tf32", "half")
DOUBLE: tuple[Kind, ...] = ("float64",)

# Several tiles already at N = 33.
INTERPRETER = Row(("interpreter",), EVERY, ANY, ANY, Config(32, 32, 32, 4, 1))

_WALK = (
    INTERPRETER,
    Row(HOPPER, ("half",), 64, 128, Config(128, 64, 128, 8, 3)),
    Row(HOPPER, ("half",), 64, ANY, Config(128, 64, 256, 8, 3)),
    Row(HOPPER, ("half",), 128, ANY, Config(128, 64, 128, 8, 3)),
    Row(HOPPER, ("half",), 256, ANY, Config(128, 64, 128, 8, 2)),
    Row(AMPERE, ("half",), 64, ANY, Config(128, 32, 128, 8, 3)),
    Row(AMPERE, ("half",), 128, ANY, Config(64, 32, 128, 4, 2)),
    Row(AMPERE, ("half",), 256, ANY, Config(64, 32, 64, 4, 2)),
    Row(ALL, ("tf32",), 64, ANY, Config(64, 32, 64, 4, 2)),
    Row(ALL, ("tf32",), 256, ANY, Config(32, 32, 64, 8, 1)),
    Row(ALL, ("float32",), 64, ANY, Config(64, 32, 64, 8, 2)),
    Row(ALL, ("float32",), 256, ANY, Config(32, 32, 32, 8, 1)),
)

# Several programs already at 20 x 20 pixels, and several steps over 40 classes.
_UPSAMPLE_INTERPRETER = Row(("interpreter",), EVERY + DOUBLE, ANY, ANY, Config(512, 32, 0, 4, 1))
_UPSAMPLE_DOUBLE = (
    Row(ALL, DOUBLE, 32, ANY, Config(32, 32, 0, 4, 1)),
    Row(ALL, DOUBLE, 64, ANY, Config(16, 64, 0, 4, 1)),
    Row(ALL, DOUBLE, ANY, ANY, Config(8, 128, 0, 4, 1)),
)

TABLE: dict[str, tuple[Row, ...]] = {
    # P V by rows, or Pᵀ G by columns: v columns to a program.
    "walk": _WALK,
    # The same with a mask or a restart, which need more registers.
    "walk_general": (Row(HOPPER, ("half",), 64, ANY, Config(128, 64, 128, 8, 3)), *_WALK),
    # <G, Y> by rows: bound by memory.
    "walk_level": (INTERPRETER, Row(ALL, EVERY, ANY, ANY, Config(32, 0, 64, 4, 1))),
    # dQ or dK. v columns of the product G Yᵀ at a time; where v >= D the owned rows stay in shared memory.
    "walk_scores": (
        INTERPRETER,
        Row(HOPPER, ("half",), 64, 128, Config(128, 64, 128, 8, 2)),
        Row(HOPPER, ("half",), 64, 256, Config(128, 64, 256, 8, 2)),
        Row(HOPPER, ("half",), 64, 512, Config(128, 32, 512, 8, 2)),
        Row(HOPPER, ("half",), 64, ANY, Config(128, 64, 128, 8, 2)),
        Row(HOPPER, ("half",), 256, ANY, Config(64, 64, 128, 8, 2)),
        Row(AMPERE, ("half",), 128, ANY, Config(64, 64, 64, 8, 2)),
        Row(AMPERE, ("half",), 256, ANY, Config(32, 64, 64, 8, 1)),
        Row(ALL, ("tf32",), 64, ANY, Config(64, 32, 64, 8, 2)),
        Row(ALL, ("tf32",), 128, ANY, Config(32, 32, 32, 8, 1)),
        Row(ALL, ("tf32",), 256, ANY, Config(32, 16, 32, 8, 1)),
        Row(ALL, ("float32",), 64, ANY, Config(64, 32, 32, 8, 1)),
        Row(ALL, ("float32",), 256, ANY, Config(32, 16, 32, 8, 1)),
    ),
    # Both softmaxes of a row at once; bound by exp2. m is a multiple of n; v columns of d at a time.
    "consistency": (
        INTERPRETER,
        Row(HOPPER, ("half",), 64, ANY, Config(64, 64, 64, 4, 3)),
        Row(HOPPER, ("half",), 256, ANY, Config(64, 64, 128, 4, 2)),
        Row(AMPERE, ("half",), 128, ANY, Config(64, 32, 128, 4, 2)),
        Row(AMPERE, ("half",), 256, ANY, Config(64, 64, 64, 4, 2)),
        Row(ALL, ("tf32",), 64, ANY, Config(64, 32, 64, 8, 2)),
        Row(ALL, ("tf32",), 256, ANY, Config(64, 32, 32, 4, 2)),
        Row(ALL, ("float32",), 256, ANY, Config(32, 16, 32, 4, 1)),
    ),
    "consistency_scores": (
        INTERPRETER,
        Row(HOPPER, ("half",), 64, ANY, Config(64, 64, 0, 4, 3)),
        Row(HOPPER, ("half",), 128, ANY, Config(64, 64, 0, 8, 2)),
        Row(HOPPER, ("half",), 256, ANY, Config(64, 32, 0, 8, 2)),
        Row(AMPERE, ("half",), 128, ANY, Config(64, 32, 0, 4, 2)),
        Row(AMPERE, ("half",), 256, ANY, Config(64, 32, 0, 8, 1)),
        Row(ALL, ("tf32",), 64, ANY, Config(32, 32, 0, 8, 1)),
        Row(ALL, ("tf32",), 256, ANY, Config(16, 32, 0, 8, 1)),
        Row(ALL, ("float32",), 128, ANY, Config(16, 16, 0, 8, 1)),
        Row(ALL, ("float32",), 256, ANY, Config(16, 16, 0, 4, 1)),
    ),
    # The matrix itself, and its backward: bound by the matrix's traffic. v columns of d at a time.
    "matrix": (
        INTERPRETER,
        Row(HOPPER, ("half",), 256, ANY, Config(64, 64, 256, 4, 2)),
        Row(AMPERE, ("half",), 128, ANY, Config(64, 64, 256, 4, 2)),
        Row(AMPERE, ("half",), 256, ANY, Config(64, 32, 256, 4, 1)),
        Row(ALL, ("tf32",), 64, ANY, Config(64, 32, 256, 4, 2)),
        Row(ALL, ("tf32",), 256, ANY, Config(32, 32, 256, 8, 1)),
        Row(ALL, ("float32",), 64, ANY, Config(32, 32, 256, 4, 2)),
        Row(ALL, ("float32",), 256, ANY, Config(32, 32, 256, 8, 1)),
    ),
    "matrix_scores": (
        INTERPRETER,
        Row(HOPPER, ("half",), 64, ANY, Config(64, 64, 256, 4, 2)),
        Row(HOPPER, ("half",), 256, ANY, Config(64, 32, 256, 8, 2)),
        Row(AMPERE, ("half",), 128, ANY, Config(64, 32, 256, 8, 2)),
        Row(AMPERE, ("half",), 256, ANY, Config(64, 32, 256, 8, 1)),
        Row(ALL, ("tf32",), 64, ANY, Config(64, 32, 256, 4, 2)),
        Row(ALL, ("tf32",), 256, ANY, Config(32, 32, 256, 8, 1)),
        Row(ALL, ("float32",), 64, ANY, Config(32, 32, 256, 4, 2)),
        Row(ALL, ("float32",), 128, ANY, Config(32, 16, 32, 8, 1)),
        Row(ALL, ("float32",), 256, ANY, Config(16, 16, 32, 8, 1)),
    ),
    # Two products to a score.
    "matrix_symmetric": (
        INTERPRETER,
        Row(ALL, ("half",), 64, ANY, Config(64, 64, 64, 4, 2)),
        Row(ALL, ("half",), 256, ANY, Config(64, 64, 64, 8, 2)),
        Row(ALL, ("tf32", "float32"), 256, ANY, Config(32, 32, 32, 8, 1)),
    ),
    "matrix_scores_symmetric": (
        INTERPRETER,
        Row(ALL, ("half",), 128, ANY, Config(64, 32, 64, 8, 2)),
        Row(ALL, ("half",), 256, ANY, Config(32, 32, 64, 8, 1)),
        Row(ALL, ("tf32",), 256, ANY, Config(32, 32, 32, 8, 1)),
        Row(ALL, ("float32",), 128, ANY, Config(32, 16, 32, 8, 1)),
        Row(ALL, ("float32",), 256, ANY, Config(16, 16, 32, 4, 1)),
    ),
    # m and n: pixels of a patch 16 wide; v: channels of a program, whose weights are computed again for more.
    "bilateral_filter": (
        # Several patches already at 7 rows.
        Row(("interpreter",), EVERY, ANY, ANY, Config(64, 64, 32, 4, 1)),
        Row(ALL, ("half",), 32, ANY, Config(128, 64, 32, 8, 2)),
        Row(ALL, ("half",), ANY, ANY, Config(64, 64, 128, 8, 2)),
        Row(ALL, ("tf32", "float32"), 32, ANY, Config(64, 32, 32, 4, 2)),
        Row(ALL, ("tf32", "float32"), ANY, ANY, Config(32, 32, 64, 4, 2)),
    ),
    # 64 numbers of a tile in a thread where no four sums of corners stand beside them, else 32, or 8 of float64.
    "upsample_losses": (
        _UPSAMPLE_INTERPRETER,
        Row(ALL, EVERY, 32, ANY, Config(64, 32, 0, 1, 1)),
        Row(ALL, EVERY, 64, ANY, Config(32, 64, 0, 4, 1)),
        Row(ALL, EVERY, 128, ANY, Config(32, 128, 0, 4, 1)),
        Row(ALL, EVERY, 256, ANY, Config(16, 256, 0, 4, 1)),
        Row(ALL, EVERY, ANY, ANY, Config(8, 256, 0, 4, 1)),
        *_UPSAMPLE_DOUBLE,
    ),
    "upsample_gradient": (
        _UPSAMPLE_INTERPRETER,
        Row(ALL, EVERY, 32, ANY, Config(64, 32, 0, 2, 1)),
        Row(ALL, EVERY, 64, ANY, Config(64, 64, 0, 4, 1)),
        Row(ALL, EVERY, 128, ANY, Config(32, 128, 0, 4, 1)),
        Row(ALL, EVERY, 256, ANY, Config(16, 256, 0, 4, 1)),
        Row(ALL, EVERY, ANY, ANY, Config(8, 256, 0, 4, 1)),
        *_UPSAMPLE_DOUBLE,
    ),
    # m pixels and n classes in one step.
    "gated_crf": (
        Row(("interpreter",), EVERY, ANY, ANY, Config(128, 32, 0, 4, 1)),
        Row(ALL, EVERY, ANY, ANY, Config(64, 32, 0, 4, 1)),
    ),
    # Bound by memory.
    "upsample_sum": (Row((*ALL, "interpreter"), EVERY + DOUBLE, ANY, ANY, Config(512, 0, 0, 4, 1)),),
    "upsample_gather": (Row((*ALL, "interpreter"), EVERY + DOUBLE, ANY, ANY, Config(32, 32, 0, 4, 1)),),
}


def choose(kernel: str, target: Target, dtype: torch.dtype, precision: str, key: int, value: int = 0) -> Config:
    """The configuration of `kernel` for d = key (or that many classes) and D = value."""
    kind: Kind
    if dtype == torch.float64:
        kind = "float64"
    elif dtype == torch.float32:
        kind = "tf32" if precision == "tf32" else "float32"
    else:
        kind = "half"
    for row in TABLE[kernel]:
        if target in row.targets and kind in row.kinds and key <= row.key and value <= row.value:
            return row.config
    raise ValueError(f"{kernel}: no configuration for {target}, {kind}, d = {key}, D = {value}")
