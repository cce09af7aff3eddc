"""The authors' checkpoints, against a plain definition of their network written out here in their names."""

from __future__ import annotations

import builtins
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cc4s.errors import UserError
from cc4s.models import is_released_checkpoint, load_released_checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class PlainBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, deep: bool, shortcut: bool) -> None:
        super().__init__()
        self.deep = deep
        outputs = planes * (4 if deep else 1)
        if deep:
            self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
            self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.bn2 = nn.BatchNorm2d(planes)
        if shortcut:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.deep:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class PlainTrunk(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        deep = layers >= 50
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        settings = [(1, 1), (2, 1), (1, 2), (1, 4)]
        for i, (count, (stride, dilation)) in enumerate(zip(BLOCKS[layers], settings, strict=True)):
            planes = width << i
            outputs = planes * (4 if deep else 1)
            stage = [PlainBlock(inputs, planes, stride, dilation, deep, deep or i > 0)]
            stage += [PlainBlock(outputs, planes, 1, dilation, deep, False) for _ in range(count - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            inputs = outputs
        self.outputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1, ceil_mode=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class PlainAttention(nn.Module):
    def __init__(self, channels: int, shrink: int) -> None:
        super().__init__()
        self.shrink = shrink
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = x
        if self.shrink != 1:
            size = [(side - 1) // self.shrink + 1 for side in x.shape[2:]]
            small = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        q, k, v = (conv(small).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        walk = torch.einsum("bdi,bdj->bij", q, k).softmax(2)
        out = torch.einsum("bij,bcj->bci", walk, v).reshape(small.shape)
        if self.shrink != 1:
            size = [(side - 1) * self.shrink + 1 for side in small.shape[2:]]
            out = F.interpolate(out, size=size, mode="bilinear", align_corners=True)
        return x + self.gamma * out


class PlainNetwork(nn.Module):
    """The authors' network in evaluation mode, with their names, also of the branch that never runs."""

    def __init__(self, layers: int, classes: int, width: int = 8, channels: int = 16, shrink: int = 1) -> None:
        super().__init__()
        self.model_sed = PlainTrunk(layers, width)

        def unit(inputs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

        self.conv5a = unit(self.model_sed.outputs)
        self.conv5b = unit(self.model_sed.outputs)
        self.conv51 = unit(channels)
        self.conv6 = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))
        self.PAM_Module = PlainAttention(channels, shrink)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv6(self.conv51(self.PAM_Module(self.conv5a(self.model_sed(x)))))


def plain(layers: int = 18, classes: int = 5, **options: int) -> PlainNetwork:
    """With random weights, statistics and gamma."""
    torch.manual_seed(layers)
    network = PlainNetwork(layers, classes, **options)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and value.dim() == 1):
                value.uniform_(0.5, 1.5)
            elif value.dim() == 1:
                value.normal_(0, 0.2)
            elif value.dim() == 4:
                nn.init.kaiming_normal_(value)
        network.PAM_Module.gamma.fill_(0.8)
    return network.eval()


def content_of(network: nn.Module) -> dict:
    """What the authors save, with NumPy scores and the optimizer's state."""
    wrapped = OrderedDict((f"module.{k}", v) for k, v in network.state_dict().items())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    next(network.parameters()).grad = torch.zeros_like(next(network.parameters()))
    optimizer.step()
    iou = np.linspace(0, 1, 5)
    return {
        "epoch": 50,
        "state_dict": wrapped,
        "best_pred": (iou.mean(), iou, float(iou[2]), np.float32(0.5), np.int64(3), np.arange(3)),
        "optimizer": optimizer.state_dict(),
    }


def save(network: nn.Module, path: Path) -> Path:
    torch.save(content_of(network), path)
    return path


def old_numpy(path: Path) -> None:
    """Renames NumPy's module to what NumPy 1 wrote, at the time of the authors' files."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    renamed = 0
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            renamed += data.count(b"numpy._core")
            archive.writestr(name, data.replace(b"numpy._core", b"numpy.core"))
    assert renamed or np.lib.NumpyVersion(np.__version__) < "2.0.0"


@pytest.mark.parametrize(
    ("layers", "classes", "options"),
    [
        (18, 3, {}),
        (34, 5, {}),
        (50, 21, {}),
        (101, 60, {}),
        (152, 5, {"width": 4}),
        (50, 5, {"shrink": 2}),
        (50, 5, {"width": 16, "channels": 64}),
    ],
)
def test_same_outputs(tmp_path: Path, layers: int, classes: int, options: dict[str, int]) -> None:
    network = plain(layers, classes, **options)
    path = save(network, tmp_path / "model_best.pth.tar")
    model = load_released_checkpoint(path, num_classes=classes, shrink=options.get("shrink", 1))
    assert not model.training
    assert model.backbone.name == f"resnet{layers}"
    # 72 pixels have 10 cells here and 9 with a max-pooling that rounds down. shrink 2 needs an odd number.
    x = torch.randn(2, 3, 65, 81 if "shrink" in options else 72)
    with torch.no_grad():
        expected = network(x)
        logits = model(x).logits
    assert expected.shape[2:] == ((9, 11) if "shrink" in options else (9, 10))
    assert expected.std() > 0
    # Random weights make large logits; the error is relative to the largest of them.
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The walk is part of what is compared.
    with torch.no_grad():
        network.PAM_Module.gamma.zero_()
        assert (network(x) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_shrink_is_one_by_default(tmp_path: Path) -> None:
    path = save(plain(shrink=2), tmp_path / "a.pth.tar")
    assert load_released_checkpoint(path).head.walk.shrink == 1
    assert load_released_checkpoint(path, shrink=2).head.walk.shrink == 2


def test_forms_of_the_file(tmp_path: Path) -> None:
    network = plain()
    x = torch.randn(1, 3, 33, 33)
    expected = network(x)
    path = tmp_path / "model.pth.tar"

    def same() -> None:
        assert is_released_checkpoint(path)
        torch.testing.assert_close(load_released_checkpoint(path)(x).logits, expected, rtol=1e-4, atol=1e-4)

    save(network, path)
    same()
    old_numpy(path)
    same()
    torch.save(content_of(network), path, _use_new_zipfile_serialization=False)
    same()
    torch.save(network.state_dict(), path)
    same()
    state = {k: v for k, v in network.state_dict().items() if "conv5b" not in k and "num_batches" not in k}
    torch.save({"state_dict": state}, path)
    same()


def test_full_size(tmp_path: Path) -> None:
    """The published shapes: ResNet-50, D = 512, d = 64, 21 classes."""
    network = PlainNetwork(50, 21, width=64, channels=512)
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    model = load_released_checkpoint(path)
    assert model.head.walk.query_conv.weight.shape == (64, 512, 1, 1)
    for ours, theirs in [
        ("backbone.layer4.2.bn3.running_var", "model_sed.layer4.2.bn3.running_var"),
        ("head.conv5a.0.weight", "conv5a.0.weight"),
        ("head.walk.value_conv.bias", "PAM_Module.value_conv.bias"),
        ("head.conv51.1.weight", "conv51.1.weight"),
        ("head.conv6.1.weight", "conv6.1.weight"),
    ]:
        assert torch.equal(model.state_dict()[ours], network.state_dict()[theirs])


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {f"module.{k}": v for k, v in plain().state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.conv51.1.bias"), "missing keys conv51.1.bias"),
        (lambda s: s.pop("module.conv6.1.weight"), "missing key conv6.1.weight"),
        (lambda s: s.pop("module.PAM_Module.gamma"), "missing keys PAM_Module.gamma"),
        (
            lambda s: s.pop("module.model_sed.layer4.1.bn2.running_mean"),
            "model_sed.layer4.1.bn2.running_mean",
        ),
        (lambda s: s.update({"module.aux.0.weight": torch.zeros(1)}), "unknown key aux.0.weight"),
        (lambda s: s.update({"module.conv5b.2.weight": torch.zeros(1)}), "unknown key conv5b.2.weight"),
        (lambda s: s.update({"module.conv6.2.bias": torch.zeros(1)}), "unknown keys conv6.2.bias"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "unknown key"),
        (
            lambda s: s.update({"module.conv5a.0.weight": torch.zeros(16, 2048, 3, 3)}),
            "conv5a.0.weight has shape (16, 2048, 3, 3), expected (16, 64, 3, 3)",
        ),
        (
            lambda s: s.update({"module.conv5a.0.weight": torch.zeros(16)}),
            "conv5a.0.weight has shape (16,), expected 4 dimensions",
        ),
        (
            lambda s: s.update({"module.model_sed.layer3.2.conv1.weight": torch.zeros(1)}),
            "model_sed has 2, 2, 3, 2 basic blocks in its layers; expected one of resnet18",
        ),
    ],
)
def test_other_networks(tmp_path: Path, state: dict[str, torch.Tensor], change, message: str) -> None:
    change(state)
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError) as error:
        load_released_checkpoint(path)
    text = str(error.value)
    assert message in text, text
    assert str(path) in text
    assert "\n" not in text


def test_other_number_of_classes(tmp_path: Path) -> None:
    path = save(plain(classes=5), tmp_path / "model.pth.tar")
    with pytest.raises(UserError, match=r"conv6\.1\.weight is for 5 classes, expected 21"):
        load_released_checkpoint(path, num_classes=21)


def test_recognition(tmp_path: Path) -> None:
    network = plain()
    assert is_released_checkpoint(content_of(network))
    assert is_released_checkpoint(network.state_dict())
    path = tmp_path / "file.pth"
    for content in (
        network.model_sed.state_dict(),
        {"state_dict": 3},
        {"step": 1},
        [1],
        torch.zeros(2),
        {1: 2},
    ):
        torch.save(content, path)
        assert not is_released_checkpoint(path)
        if isinstance(content, dict):
            assert not is_released_checkpoint(content)
    with pytest.raises(UserError, match="no such file"):
        is_released_checkpoint(tmp_path / "missing.pth.tar")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        is_released_checkpoint(path)


class Trap:
    """Unpickling this calls `function` with the path."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    path, proof = tmp_path / "model.pth.tar", tmp_path / "executed"
    content = content_of(plain())
    traps = [
        Trap(builtins.open, str(proof), "w"),
        np.array([Trap(builtins.open, str(proof), "w")], dtype=object),
    ]
    for trap in traps:
        content["best_pred"] = (0.5, trap)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        for function in (load_released_checkpoint, is_released_checkpoint):
            with pytest.raises(UserError) as error:
                function(path)
            text = str(error.value)
            assert str(path) in text
            assert "\n" not in text
            assert "pickled code" in text
            assert not proof.exists()
    # The trap does work where pickled code is executed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        torch.load(path, weights_only=False)
    assert proof.exists()
