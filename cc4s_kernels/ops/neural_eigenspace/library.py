"""Operator and backends of `neural_eigenspace`.

The iteration runs outside torch, so torch.compile sees it as one operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._library import LIBRARY, NAMESPACE
from cc4s_kernels.ops.neural_eigenspace import reference

LIBRARY.define(
    "neural_eigenspace(Tensor q, Tensor k, int num, float scale, str normalize) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _run(q: Tensor, k: Tensor, num: int, scale: float, normalize: str) -> tuple[Tensor, Tensor]:
    return reference.neural_eigenspace(q, k, num, scale=scale, normalize=normalize)


LIBRARY.impl("neural_eigenspace", _run, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::neural_eigenspace", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, num: int, scale: float, normalize: str) -> tuple[Tensor, Tensor]:
    dtype = reference.output_dtype(q.dtype, normalize)
    return (
        q.new_empty((*q.shape[:-2], num), dtype=dtype),
        q.new_empty((*q.shape[:-1], num), dtype=dtype),
    )


def neural_eigenspace(
    q: Tensor, k: Tensor, num: int = 8, *, scale: float = 1.0, normalize: str = "row"
) -> tuple[Tensor, Tensor]:
    """See `cc4s_kernels.neural_eigenspace`."""
    return torch.ops.cc4s_kernels.neural_eigenspace(q, k, num, float(scale), normalize)


backends.register("neural_eigenspace", "reference", neural_eigenspace)
