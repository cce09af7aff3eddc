"""The U-Net: its grids, its symmetries, and the walk at the level it is asked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from cc4s.cli import main
from cc4s.config import ModelConfig, cell_pitch
from cc4s.errors import UserError
from cc4s.models import UNet, build_model
from tests.cc4s.run_tools import TINY, read_log


def build(**options: object) -> UNet:
    torch.manual_seed(0)
    network = build_model(ModelConfig(backbone="unet", width=2, **options), num_classes=3, in_channels=1)  # type: ignore[arg-type]
    assert isinstance(network, UNet)
    return network.eval()


def test_the_usual_width_has_the_usual_layers() -> None:
    """Parameters of five levels of 16 to 256 channels, counted from the definition."""
    torch.manual_seed(0)
    network = UNet(1, 4, width=16, random_walk=False)
    widths = [16, 32, 64, 128, 256]
    convolutions = [(1, 16), *itertools.pairwise(widths)]
    # Two 3x3 convolutions, each with an affine norm.
    expected = sum(9 * a * b + 9 * b * b + 4 * b for a, b in convolutions)
    # 1x1 to half the channels with bias, then two 3x3 convolutions on them and the skip.
    expected += sum(2 * b * b + b + 18 * b * b + 9 * b * b + 4 * b for b in widths[:-1])
    expected += 16 * 4 + 4
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(("level", "pitch"), [(1, 2), (3, 8), (4, 16)])
def test_the_walk_is_at_its_level(level: int, pitch: int) -> None:
    network = build(walk_level=level)
    assert cell_pitch(ModelConfig(backbone="unet", walk_level=level)) == pitch
    output = network(torch.randn(2, 1, 33, 49))
    rows, columns = 32 // pitch + 1, 48 // pitch + 1
    assert output.logits.shape == (2, 3, 33, 49)
    assert output.grid == (rows, columns)
    assert output.features.shape == (2, 2 * 2**level, rows, columns)
    assert output.q.shape == output.k.shape == (2, rows * columns, max(1, 2 * 2**level // 8))
    output.logits.sum().backward()
    assert network.walk.gamma.grad is not None


def test_a_mirrored_image_has_mirrored_positions() -> None:
    """With mirrored weights: kernels are made symmetric, then sizes 8m+1 keep cells on pixels at every level."""
    network = build()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.copy_((layer.weight + layer.weight.flip(-1)) / 2)
        network.walk.gamma.fill_(0.5)
    network.double()
    image = torch.randn(1, 1, 33, 49, dtype=torch.float64)
    plain, mirrored = network(image), network(image.flip(-1))
    torch.testing.assert_close(mirrored.logits, plain.logits.flip(-1), rtol=1e-9, atol=1e-9)
    q = plain.q.unflatten(1, plain.grid)
    torch.testing.assert_close(mirrored.q.unflatten(1, plain.grid), q.flip(2), rtol=1e-9, atol=1e-9)


def test_padding_is_no_state_of_the_walk() -> None:
    network = build()
    with torch.no_grad():
        network.walk.gamma.fill_(1.0)
    image, mask = torch.randn(1, 1, 33, 33), torch.ones(1, 33, 33, dtype=torch.bool)
    mask[:, :, 20:] = False
    seen = []
    network.walk.register_forward_pre_hook(lambda _, inputs, options: seen.append(options["mask"]), with_kwargs=True)
    network(image, mask)
    assert seen[0].shape == (1, 5, 5)
    # Cells on pixels 0, 8, 16 are inside, 24 and 32 are not.
    assert seen[0][0].sum(0).tolist() == [5, 5, 5, 0, 0]
    with pytest.raises(ValueError, match="mask"):
        network(image, mask[:, :5])


def test_without_walk() -> None:
    config = ModelConfig(backbone="unet", width=2)
    network = build_model(config, num_classes=3, in_channels=3, random_walk=False)
    output = network.eval()(torch.randn(1, 3, 20, 31))
    assert output.q is None
    assert not network.has_walk
    assert output.logits.shape == (1, 3, 20, 31)


@pytest.mark.parametrize(
    "options", [{"head": "aspp"}, {"backbone_weights": "some.pth"}, {"walk_level": 0}, {"walk_level": 5}]
)
def test_what_a_unet_does_not_have(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"model.{next(iter(options))}"):
        build(**options)


def test_the_losses_train_on_it(tmp_path: Path) -> None:
    """All four terms, with the walk at the bottleneck: cells every 16 pixels."""
    words = ["train", "synthetic", "--stage", "ur", "--out", str(tmp_path / "run"), *TINY]
    words += ["model.backbone=unet", "model.walk_level=4", "stages.0.losses=[entropy,consistency,color]"]
    assert main(words) == 0
    terms = {"cross_entropy", "entropy", "color", "consistency_kl", "consistency_trace"}
    steps = [entry for entry in read_log(tmp_path / "run") if entry["event"] == "step"]
    assert terms <= steps[-1].keys()
