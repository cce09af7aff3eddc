"""Which calls the CUDA kernels of the pairwise ops take, and how their tensors are brought to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cc4s_kernels import _cuda, backends
from tests.cuda_on_cpu.pairwise import draw

X = draw(2, 5, 64, dtype=torch.bfloat16, seed=1)


@pytest.mark.parametrize("x", [X, X[:, 1:, 8:24], X[:1, :, :8], X.expand(2, 5, 64)])
def test_aligned_rows_are_not_copied(x: Tensor) -> None:
    assert _cuda.aligned_rows(x) is x


@pytest.mark.parametrize(
    "x",
    [
        X[..., 1:9],
        X.mT,
        X[..., :5],
        X[..., :0],
        X.contiguous().view(2, -1)[:, :316].view(2, 4, 79),
        X[:, :, :1].expand(2, 5, 8),
        draw(2, 3, 9, dtype=torch.float16, seed=2)[..., :8],
    ],
)
def test_other_rows_are_copied_once_and_padded(x: Tensor) -> None:
    rows = _cuda.aligned_rows(x)
    width = x.shape[-1]
    assert torch.equal(rows[..., :width], x)
    assert bool((rows[..., width:] == 0).all())
    assert rows.is_contiguous()
    assert rows.shape[-1] % 8 == 0
    assert 0 < rows.shape[-1] < width + 9
    assert _cuda.aligned_rows(rows) is rows


@pytest.mark.parametrize("op", ["random_walk", "transition_consistency"])
def test_what_the_kernels_do_not_take(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: None)
    count = 3 if op == "random_walk" else 4

    def reason(dtype: torch.dtype, width: int = 64) -> str:
        return backends._explain(op, (torch.zeros(1, 4, width, dtype=dtype),) * count, {}).reasons["cuda"]

    takes = "the CUDA kernels take float16 and bfloat16"
    assert reason(torch.float32) == f"q is torch.float32, {takes}; float32 runs in Triton"
    assert reason(torch.float64) == f"q is torch.float64, {takes}"
    assert reason(torch.float16) == "q is on cpu"
    assert reason(torch.float16, 136).endswith(
        "the CUDA kernels take d <= 128 and D <= 1024" if op == "random_walk" else "the CUDA kernels take d <= 128"
    )
