"""mmsegmentation: registered losses and block, heads that never upsample their logits, patched heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv.cnn import NonLocal2d
from mmcv.cnn.bricks.plugin import build_plugin_layer
from mmengine.registry import Registry
from mmengine.structures import PixelData
from mmseg.models.decode_heads import DAHead, FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import cc4s_kernels as ck
from cc4s_kernels.contrib import mmseg
from tests.integrations.examples import losses_of

LOSSES = [
    {"type": "CC4SPartialCrossEntropyLoss", "loss_weight": 1.5},
    {"type": "CC4SSoftEntropyLoss", "loss_weight": 0.2},
    {"type": "CC4SSoftEntropyLoss", "loss_weight": 0.3},
]


class FusedFCNHead(mmseg.FusedUpsampleMixin, FCNHead):
    pass


def head(kind: type[FCNHead], losses: Any = LOSSES, **options: Any) -> FCNHead:
    torch.manual_seed(0)
    return kind(in_channels=6, in_index=0, channels=6, num_convs=1, num_classes=3, loss_decode=losses, **options)


def samples() -> list[SegDataSample]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2, 1, 33, 41), generator=generator)
    labels[:, :, 10:] = 255
    return [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


@pytest.mark.parametrize("align_corners", [False, True])
def test_fused_head_has_the_losses_of_the_plain_one(align_corners: bool) -> None:
    features = [torch.rand(2, 6, 9, 11)]
    plain = head(FCNHead, align_corners=align_corners).loss(features, samples(), None)
    fused_head = head(FusedFCNHead, align_corners=align_corners)
    fused = fused_head.loss(features, samples(), None)
    assert set(fused) == {"loss_pce", "loss_entropy"}
    for name, value in fused.items():
        # float32 means over 3000 pixels.
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
    sum(fused.values()).backward()
    assert fused_head.conv_seg.weight.grad.abs().max() > 0


def test_partial_cross_entropy_is_mmsegmentations_over_labelled_pixels() -> None:
    features = [torch.rand(2, 6, 9, 11)]
    own = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
    expected = head(FCNHead, own).loss(features, samples(), None)["loss_ce"]
    found = head(FusedFCNHead, LOSSES[:1]).loss(features, samples(), None)["loss_pce"]
    torch.testing.assert_close(found, 1.5 * expected, rtol=1e-5, atol=1e-6)


def test_other_losses_and_samplers_are_refused() -> None:
    features = [torch.rand(2, 6, 9, 11)]
    with pytest.raises(TypeError, match="loss_decode: got str 'CrossEntropyLoss'"):
        head(FusedFCNHead, {"type": "CrossEntropyLoss"}).loss(features, samples(), None)
    sampled = head(FusedFCNHead, sampler={"type": "OHEMPixelSampler"})
    with pytest.raises(ValueError, match="sampler: got OHEMPixelSampler"):
        sampled.loss(features, samples(), None)


def test_sampler_with_a_plain_head() -> None:
    sampler = {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 100}
    losses = head(FCNHead, LOSSES[:1], sampler=sampler).loss([torch.rand(2, 6, 9, 11)], samples(), None)
    assert losses["loss_pce"] > 0


def test_block_is_registered_and_a_plugin() -> None:
    block = MODELS.build({"type": "CC4SRandomWalk2d", "in_channels": 8, "shrink": 2})
    assert isinstance(block, ck.nn.RandomWalk2d)
    name, plugin = build_plugin_layer({"type": "CC4SRandomWalk2d"}, postfix="_after", in_channels=8)
    assert name == "random_walk_after"
    assert plugin.in_channels == 8
    registry = Registry("other")
    mmseg.register(registry)
    mmseg.register(registry)
    assert registry.get("CC4SRandomWalk2d") is mmseg.RandomWalk2d


def test_patch_of_heads_and_blocks() -> None:
    torch.manual_seed(0)
    dual = DAHead(in_channels=6, in_index=0, channels=8, pam_channels=2, num_classes=3, dropout_ratio=0.0).eval()
    model = nn.ModuleList([dual, NonLocal2d(6), NonLocal2d(6, sub_sample=True), NonLocal2d(6, mode="gaussian")])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.rand(2, 6, 9, 11)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [*dual([x]), model[1](x)]

    before = outputs()
    with ck.patch(model) as patch:
        assert {r.name for r in patch.replaced} == {"0.pam", "1"}
        assert {left.name: left.reason for left in patch.left}.keys() == {"2"}
        for a, b in zip(outputs(), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(outputs(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_example() -> None:
    losses = losses_of("mmseg_fcn.py")
    assert losses[-1] < losses[0]
