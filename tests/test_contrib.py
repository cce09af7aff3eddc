"""`cc4s_kernels.contrib` without its frameworks; with them: tests/integrations."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cc4s_kernels.contrib import mmseg, smp, torchvision, transformers
from tests.ops.tester import assert_matches, randn

LACKING: dict[str, tuple[str, Callable[[], Any]]] = {
    "torchvision": ("torchvision", lambda: torchvision.logits(nn.Identity(), torch.zeros(1, 3, 8, 8))),
    "smp": ("segmentation_models_pytorch", lambda: smp.insert_random_walk(nn.Identity())),
    "transformers": ("transformers", transformers.register),
    "mmseg": ("mmengine", mmseg.register),
}


@pytest.mark.parametrize("name", LACKING)
def test_without_the_framework(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, call = LACKING[name]
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    importlib.reload(importlib.import_module(f"cc4s_kernels.contrib.{name}"))
    with pytest.raises(ImportError, match=f"{package}.*pip install {package.replace('_', '-')}"):
        call()


def attention_inputs(heads: int = 3, key_heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q = randn(2, heads, 7, 4, dtype=torch.float64, device="cpu", seed=1)
    k = randn(2, key_heads, 7, 4, dtype=torch.float64, device="cpu", seed=2)
    return q, k, randn(2, key_heads, 7, 5, dtype=torch.float64, device="cpu", seed=3)


ENCODER = SimpleNamespace(is_causal=False)


@pytest.mark.parametrize("key_heads", [3, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_function_is_attention(key_heads: int, scaling: float | None, masked: bool) -> None:
    q, k, v = attention_inputs(key_heads=key_heads)
    mask = torch.tensor([[1] * 7, [1, 1, 0, 1, 1, 0, 0]]) if masked else None
    y, weights = transformers.random_walk_attention(ENCODER, q, k, v, mask, scaling=scaling)  # type: ignore[arg-type]
    assert weights is None
    pairs = None if mask is None else mask.bool()[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(
        q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1), attn_mask=pairs, scale=scaling
    ).transpose(1, 2)
    if mask is not None:
        expected = expected * mask[..., None, None]
    assert y.is_contiguous()
    # float64 sums of seven terms in another order.
    assert_matches("y", y, expected, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "is_causal: got True"),
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"softcap": 30.0}, "softcap: got float 30.0"),
        ({"sliding_window": 4}, "sliding_window: got int 4"),
        ({"position_bias": torch.zeros(1)}, "position_bias: got shape"),
        ({"attention_mask": torch.zeros(2, 1, 7, 7)}, r"attention_mask: got shape \(2, 1, 7, 7\)"),
        ({"attention_mask": torch.ones(2, 6, dtype=torch.bool)}, r"attention_mask: got shape \(2, 6\)"),
        ({"query": torch.zeros(2, 3, 1, 4, dtype=torch.float64)}, "key: got 7 positions, expected 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attention_function_refuses(change: dict[str, Any], message: str) -> None:
    q, k, v = attention_inputs()
    arguments = {"module": ENCODER, "query": q, "key": k, "value": v, "attention_mask": None, **change}
    with pytest.raises(ValueError, match=message):
        transformers.random_walk_attention(**arguments)


def test_modules_that_do_not_say_are_causal() -> None:
    q, k, v = attention_inputs()
    with pytest.raises(ValueError, match="is_causal"):
        transformers.random_walk_attention(nn.Identity(), q, k, v, None)


def test_losses_as_mmsegmentation_calls_them() -> None:
    score = randn(2, 3, 9, 9, dtype=torch.float64, device="cpu", seed=4)
    label = torch.randint(0, 3, (2, 9, 9), generator=torch.Generator().manual_seed(0))
    label[:, :5] = 255
    weight = torch.ones(2, 9, 9)
    weight[:, :, :4] = 0
    loss = mmseg.PartialCrossEntropyLoss(loss_weight=2.0, class_weight=[1.0, 2.0, 3.0])
    assert loss.loss_name == "loss_pce"
    kept = label.where(weight > 0, 255)
    expected = 2 * nn.functional.cross_entropy(
        score, kept, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=255
    )
    assert_matches("pce", loss(score, label, weight=weight, ignore_index=255), expected, atol=1e-6)
    entropy = mmseg.SoftEntropyLoss()(score, label)
    p = score.softmax(1)
    assert_matches("entropy", entropy, -(p * p.log()).sum(1).mean(), atol=1e-12)
    with pytest.raises(ValueError, match="avg_factor"):
        loss(score, label, avg_factor=3)
    with pytest.raises(ValueError, match="loss_name: got 'ce'"):
        mmseg.SoftEntropyLoss(loss_name="ce")
