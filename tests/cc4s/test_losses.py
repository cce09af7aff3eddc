"""The loss of a stage, and the transforms of its consistency term."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cc4s.config import Config, ConsistencyConfig, load_config
from cc4s.losses import StageLoss, balanced_weights
from cc4s.models import build_model
from cc4s.transforms import draw
from tests.cc4s.run_tools import TINY

CROP, CLASSES = 65, 5


def small_config(*words: str) -> Config:
    return load_config("synthetic", [*TINY, f"augment.crop={CROP}", "model.dropout=0", *words])


def small_batch(images: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.full((images, CROP, CROP), 255, dtype=torch.uint8)
    label[:, 20, 5:50] = torch.randint(0, CLASSES, (images, 45), generator=generator).to(torch.uint8)
    valid = torch.ones(images, CROP, CROP, dtype=torch.bool)
    valid[1, :, 40:] = False
    rows, columns = torch.meshgrid(torch.arange(CROP), torch.arange(CROP), indexing="ij")
    superpixels = (rows // 22 * 3 + columns // 22).to(torch.int32).repeat(images, 1, 1)
    return {
        "image": torch.randn(images, 3, CROP, CROP, generator=generator),
        "rgb": torch.randint(0, 256, (images, 3, CROP, CROP), generator=generator, dtype=torch.uint8),
        "label": label.masked_fill(~valid, 255),
        "valid": valid,
        "superpixels": superpixels.masked_fill(~valid, -1),
    }


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("kind", ["flip", "crop", "bands"])
def test_transforms_of_pixels_and_cells_agree(kind: str, shrink: int) -> None:
    """Cells of the transformed image are the cells that the loss takes from the image."""
    pitch = 8 * shrink
    side = 8 * pitch + 1
    image = torch.arange(side * side).reshape(1, side, side)
    config = ConsistencyConfig(transforms=[kind], crop_shares=[0.5, 0.7, 0.9])
    sizes = set()
    for seed in range(30):
        transform = draw(config, side, pitch, random.Random(seed))
        of_image = transform.cells.of_image(image[..., ::pitch, ::pitch].reshape(1, -1, 1), "q")
        moved = transform.pixels(image)
        sizes.add(moved.shape[1:])
        of_target = transform.cells.of_target(moved[..., ::pitch, ::pitch].reshape(1, -1, 1), "q_target")
        assert torch.equal(of_image, of_target)
        assert all((edge - 1) % pitch == 0 for edge in moved.shape[1:])
    assert len(sizes) == {"flip": 1, "crop": 9, "bands": 1}[kind]


def test_released_bands_are_49_of_59_rows_at_either_end() -> None:
    config = ConsistencyConfig(transforms=["bands"])
    image = torch.arange(465).reshape(1, 465, 1).expand(1, 465, 465)
    found = {
        (int(t[0, 0, 0]), int(t[0, -1, 0]), t.shape[2])
        for t in (draw(config, 465, 8, random.Random(seed)).pixels(image) for seed in range(20))
    }
    assert found == {(0, 384, 465), (80, 464, 465)}


def by_hand(network: nn.Module, batch: dict[str, Tensor], config: Config) -> Tensor:
    """Cross-entropy + entropy off the boundaries, from full-resolution logits."""
    output = network(batch["image"], batch["valid"])
    logits = F.interpolate(output.logits, (CROP, CROP), mode="bilinear", align_corners=True)
    cross_entropy = F.cross_entropy(logits, batch["label"].long(), ignore_index=255)
    ids = batch["superpixels"]
    inside = ids >= 0
    inside[:, 1:] &= ids[:, 1:] == ids[:, :-1]
    inside[:, :-1] &= ids[:, 1:] == ids[:, :-1]
    inside[:, :, 1:] &= ids[:, :, 1:] == ids[:, :, :-1]
    inside[:, :, :-1] &= ids[:, :, 1:] == ids[:, :, :-1]
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    return config.loss.cross_entropy * cross_entropy + config.loss.entropy * entropy[inside].mean()


def test_stage_loss_is_the_sum_of_its_terms() -> None:
    config = small_config("loss.entropy=0.3")
    torch.manual_seed(0)
    network = build_model(config.model, num_classes=CLASSES, in_channels=3).train()
    loss = StageLoss(config, config.stages[0], CLASSES)
    batch = small_batch()
    terms = loss(network, batch, None, loss.global_counts([batch], [None]))
    torch.testing.assert_close(terms["loss"], by_hand(network, batch, config))


def test_consistency_is_zero_for_a_network_that_sees_no_difference() -> None:
    """One pixel of receptive field and no batch statistics: the flipped image has the flipped P."""
    config = small_config("loss.cross_entropy=0", "loss.entropy=0", "loss.consistency.transforms=[flip]")

    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> object:
            from cc4s.models import SegmenterOutput

            cells = x[..., ::8, ::8]
            q, k = (conv(cells).flatten(2).mT for conv in (self.q, self.k))
            return SegmenterOutput(cells, q, k, cells, (cells.shape[2], cells.shape[3]))

    stage = config.stages[1]
    loss = StageLoss(config, stage, 3)
    batch = small_batch()
    batch["label"] = torch.full_like(batch["label"], 255)
    transform = draw(config.loss.consistency, CROP, 8, random.Random(0))
    terms = loss(Pointwise(), batch, transform, loss.global_counts([batch], [transform]))
    # A few float32 roundings of scores of size 1.
    assert abs(float(terms["consistency_kl"])) < 1e-5
    assert float(terms["consistency_trace"]) < 1e-6


def test_target_pass_leaves_batch_statistics_alone() -> None:
    batch = small_batch()
    for update in (False, True):
        config = small_config(f"loss.consistency.update_statistics={str(update).lower()}")
        torch.manual_seed(0)
        network = build_model(config.model, num_classes=CLASSES, in_channels=3).train()
        loss = StageLoss(config, config.stages[1], CLASSES)
        transform = draw(config.loss.consistency, CROP, 8, random.Random(0))
        loss(network, batch, transform, loss.global_counts([batch], [transform]))
        counted = {int(value) for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
        assert counted == {2 if update else 1}


def test_batches_without_scribbles_train_on() -> None:
    config = small_config()
    network = build_model(config.model, num_classes=CLASSES, in_channels=3).train()
    loss = StageLoss(config, config.stages[0], CLASSES)
    batch = small_batch()
    batch["label"] = torch.full_like(batch["label"], 255)
    terms = loss(network, batch, None, loss.global_counts([batch], [None]))
    assert float(terms["cross_entropy"]) == 0
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_balanced_weights() -> None:
    """A quarter and three quarters of the pixels; a class without pixels weighs as much as the rarest."""
    pixels = torch.tensor([75, 25, 0])
    torch.testing.assert_close(balanced_weights(pixels, 0.0), torch.ones(3))
    # Every class has the same weight in total: 0.75 w0 = 0.25 w1, and the mean over pixels is 1.
    torch.testing.assert_close(balanced_weights(pixels, 1.0), torch.tensor([2 / 3, 2.0, 2.0]))
    half = balanced_weights(pixels, 0.5)
    assert float(half[1] / half[0]) == pytest.approx(3**0.5)
    torch.testing.assert_close(balanced_weights(torch.zeros(2), 0.5), torch.ones(2))


def test_class_weights_reach_the_cross_entropy() -> None:
    """Against torch's weighted cross-entropy on the upsampled logits."""
    config, batch = small_config(), small_batch()
    stage = next(stage for stage in config.stages if stage.name == "ur")
    stage.losses = []
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    torch.manual_seed(0)
    network = build_model(config.model, num_classes=CLASSES, in_channels=3).eval()
    loss = StageLoss(config, stage, CLASSES, weight)
    found = loss(network, batch, None, loss.global_counts([batch], [None]))["loss"]
    logits = network(batch["image"], batch["valid"]).logits
    logits = F.interpolate(logits, size=(CROP, CROP), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(logits, batch["label"].long(), weight, ignore_index=255)
    # float32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
