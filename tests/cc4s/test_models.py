"""Backbones, heads and the whole segmenter, against definitions written out here."""

from __future__ import annotations

import builtins
import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cc4s.config import ModelConfig
from cc4s.errors import UserError
from cc4s.models import (
    ResNet,
    Segmenter,
    build_backbone,
    build_model,
    load_backbone_weights,
)
from cc4s.models.norm import group_norm, norm_layer
from cc4s.models.segmenter import ASPPHead, cell_mask

TINY = ModelConfig(backbone="resnet18", width=8, head_channels=16, key_channels=4)


def tiny(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def build(config: ModelConfig = TINY, *, num_classes: int = 3, in_channels: int = 3, **options: bool) -> Segmenter:
    torch.manual_seed(0)
    return build_model(config, num_classes=num_classes, in_channels=in_channels, **options)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine maps and statistics: a fresh batch norm in evaluation mode is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("bn1.weight", "bn2.weight", "bn3.weight", "running_var")) or value.dim() == 1:
                value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
            if name.endswith(("bias", "running_mean")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return module


# Keys of torchvision's state dicts without the two of fc, and its published numbers of parameters without fc.
COUNTS = {
    "resnet18": (120, 11_689_512 - 513_000),
    "resnet34": (216, 21_797_672 - 513_000),
    "resnet50": (318, 25_557_032 - 2_049_000),
    "resnet101": (624, 44_549_160 - 2_049_000),
    "resnet152": (930, 60_192_808 - 2_049_000),
}


@pytest.mark.parametrize("name", list(COUNTS))
@pytest.mark.parametrize("style", ["torchvision", "released"])
def test_torchvision_names(name: str, style: str) -> None:
    with torch.device("meta"):
        network = ResNet(name, style=style)
    state = network.state_dict()
    assert (len(state), sum(p.numel() for p in network.parameters())) == COUNTS[name]
    assert network.out_channels == (512 if name in ("resnet18", "resnet34") else 2048)
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.running_var": (64,), "bn1.num_batches_tracked": ()}
    if name == "resnet18":
        shapes |= {
            "layer1.1.conv2.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.bias": (512,),
        }
        assert "layer1.0.downsample.0.weight" not in state
    if name == "resnet50":
        shapes |= {
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.0.downsample.1.running_mean": (256,),
            "layer3.5.conv1.weight": (256, 1024, 1, 1),
            "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
            "layer4.2.conv2.weight": (512, 512, 3, 3),
            "layer4.2.bn3.weight": (2048,),
        }
    for key, shape in shapes.items():
        assert tuple(state[key].shape) == shape, key


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_grid(name: str) -> None:
    with torch.device("meta"):
        networks = {s: ResNet(name, width=4, norm=group_norm, style=s) for s in ("torchvision", "released")}
        for height in range(1, 90, 1 if name == "resnet18" else 7):
            x = torch.empty(1, 3, height, 90 - height)
            for style, network in networks.items():
                got = tuple(network(x).shape[2:])
                assert got == (network.cells(height), network.cells(90 - height)), (style, height)
            # Rounding up in the released max-pooling adds a cell for two sides in eight.
            assert networks["torchvision"].cells(height) == (height - 1) // 8 + 1
            extra = height % 8 in (7, 0)
            assert networks["released"].cells(height) == (height - 1) // 8 + 1 + extra
        for network in networks.values():
            assert network(torch.empty(1, 3, 465, 465)).shape[2:] == (59, 59)


def plain_resnet(state: dict[str, torch.Tensor], counts: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """The undilated stride-32 ResNet of torchvision in evaluation mode, from its state dict."""

    def bn(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5) ** 0.5 * weight + bias

    x = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(bn("bn1", x).clamp(min=0), 3, 2, 1)
    for stage, count in enumerate(counts, 1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            bottleneck = f"{name}.conv3.weight" in state
            strides, paddings = ((1, stride, 1), (0, 1, 0)) if bottleneck else ((stride, 1), (1, 1))
            y = x
            for i, (s, p) in enumerate(zip(strides, paddings, strict=True), 1):
                y = bn(f"{name}.bn{i}", F.conv2d(y, state[f"{name}.conv{i}.weight"], stride=s, padding=p))
                if i < len(strides):
                    y = y.clamp(min=0)
            if f"{name}.downsample.0.weight" in state:
                x = bn(f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride))
            x = (x + y).clamp(min=0)
    return x


@pytest.mark.parametrize(("name", "counts"), [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3))])
@pytest.mark.parametrize("size", [(65, 97), (70, 64)])
def test_dilated_features_are_the_plain_ones(name: str, counts: tuple[int, ...], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = randomize(ResNet(name, width=8)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    plain = plain_resnet(network.state_dict(), counts, x)
    dilated = network(x)
    assert plain.abs().mean() > 1e-3
    # float64; the same sums in another order.
    torch.testing.assert_close(dilated[:, :, ::4, ::4], plain, rtol=1e-10, atol=1e-10)


def test_parts_of_the_state() -> None:
    model = build()
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"backbone", "head"}
    own = {
        "head.conv5a.0.weight": (16, 64, 3, 3),
        "head.conv5a.1.running_mean": (16,),
        "head.walk.query_conv.weight": (4, 16, 1, 1),
        "head.walk.key_conv.bias": (4,),
        "head.walk.value_conv.weight": (16, 16, 1, 1),
        "head.conv51.0.weight": (16, 16, 3, 3),
        "head.conv51.1.num_batches_tracked": (),
        "head.conv6.1.weight": (3, 16, 1, 1),
        "head.conv6.1.bias": (3,),
    }
    for key, shape in own.items():
        assert tuple(state[key].shape) == shape, key
    assert state["head.walk.gamma"].numel() == 1
    assert state["head.walk.gamma"].item() == 0
    without = build(random_walk=False).state_dict()
    assert set(state) - set(without) == {k for k in state if k.startswith("head.walk.")}
    assert not set(without) - set(state)
    # D / 8 key channels unless told otherwise.
    assert build(tiny(key_channels=0)).head.walk.query_conv.out_channels == 2


def walk_by_loops(
    x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, gamma: float, mask: np.ndarray
) -> np.ndarray:
    """z = x + gamma P V position by position; x, v (N, D), q, k (N, d), mask (N)."""
    z = x.copy()
    for i in range(len(x)):
        if not mask[i]:
            continue
        weights = np.array([np.exp(np.dot(q[i], k[j])) if mask[j] else 0.0 for j in range(len(x))])
        weights /= weights.sum()
        for j in range(len(x)):
            z[i] += gamma * weights[j] * v[j]
    return z


@pytest.mark.parametrize("masked", [False, True])
def test_segmenter_by_hand(masked: bool) -> None:
    model = randomize(build()).double().eval()
    with torch.no_grad():
        model.head.walk.gamma.fill_(0.7)
        for conv in (model.head.walk.query_conv, model.head.walk.key_conv):
            conv.weight.mul_(5)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    image = torch.randn(2, 3, 33, 41, dtype=torch.float64)
    mask = torch.ones(2, 33, 41, dtype=torch.bool)
    if masked:
        mask[0, 20:] = False
        mask[1, :, :9] = False
    out = model(image, mask if masked else None)
    backbone = model.backbone(image)
    assert out.grid == (5, 6)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.from_numpy(state[f"{name}.{p}"]) for p in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, False, 0.0, 1e-5)

    def weight(name: str) -> torch.Tensor:
        return torch.from_numpy(state[name])

    x = norm("head.conv5a.1", F.conv2d(backbone, weight("head.conv5a.0.weight"), padding=1)).relu()
    rows = x.flatten(2).transpose(1, 2).detach().numpy()  # [B, N, D]

    def project(name: str) -> np.ndarray:
        return rows @ state[f"head.walk.{name}.weight"][:, :, 0, 0].T + state[f"head.walk.{name}.bias"]

    q, k, v = project("query_conv"), project("key_conv"), project("value_conv")
    # Cells are 8 pixels apart on this image.
    cells = mask[:, ::8, ::8].flatten(1).numpy()
    z = np.stack([walk_by_loops(rows[b], q[b], k[b], v[b], 0.7, cells[b]) for b in range(2)])
    assert np.abs(z - rows).max() > 0.01
    z = torch.from_numpy(z).transpose(1, 2).reshape(2, 16, 5, 6)
    y = norm("head.conv51.1", F.conv2d(z, weight("head.conv51.0.weight"), padding=1)).relu()
    logits = F.conv2d(y, weight("head.conv6.1.weight"), weight("head.conv6.1.bias"))
    # float64 throughout.
    close = dict(rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.q, torch.from_numpy(q), **close)
    torch.testing.assert_close(out.k, torch.from_numpy(k), **close)
    torch.testing.assert_close(out.features, z, **close)
    torch.testing.assert_close(out.logits, logits, **close)


def test_without_walk() -> None:
    with_walk, without = build().eval(), build(random_walk=False).eval()
    without.load_state_dict({k: v for k, v in with_walk.state_dict().items() if not k.startswith("head.walk.")})
    assert with_walk.has_walk
    assert not without.has_walk
    x = torch.randn(1, 3, 33, 33)
    out = without(x, torch.ones(1, 33, 33, dtype=torch.bool))
    assert out.q is None
    assert out.k is None
    # gamma is 0 at the start: the walk adds nothing.
    torch.testing.assert_close(out.logits, with_walk(x).logits)


def test_shrink() -> None:
    model = build(tiny(shrink=2)).eval()
    out = model(torch.randn(1, 3, 65, 49))
    assert out.logits.shape == (1, 3, 9, 7)
    assert out.features.shape == (1, 16, 9, 7)
    assert out.grid == (5, 4)
    assert out.q.shape == out.k.shape == (1, 20, 4)


@pytest.mark.parametrize("size", [(33, 33), (40, 37), (1, 9), (8, 23)])
def test_any_size(size: tuple[int, int]) -> None:
    model = build().eval()
    mask = torch.ones(1, *size, dtype=torch.bool)
    out = model(torch.randn(1, 3, *size), mask)
    h, w = (size[0] - 1) // 8 + 1, (size[1] - 1) // 8 + 1
    assert out.logits.shape == (1, 3, h, w)
    assert out.grid == (h, w)
    assert out.q.shape == (1, h * w, 4)


def test_cell_mask() -> None:
    rng = np.random.default_rng(0)
    for height, width in [(33, 41), (40, 37), (1, 3), (16, 9)]:
        mask = torch.from_numpy(rng.random((2, height, width)) < 0.5)
        h, w = (height - 1) // 8 + 1, (width - 1) // 8 + 1
        got = cell_mask(mask, h, w)
        for i in range(h):
            for j in range(w):
                row = int(np.floor(i * (height - 1) / max(h - 1, 1) + 0.5))
                column = int(np.floor(j * (width - 1) / max(w - 1, 1) + 0.5))
                assert torch.equal(got[:, i, j], mask[:, row, column])


def test_mask_errors() -> None:
    model = build().eval()
    x = torch.randn(1, 3, 17, 17)
    with pytest.raises(TypeError, match=r"mask: got torch\.float32, expected torch\.bool"):
        model(x, torch.ones(1, 17, 17))
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 3, 3\), expected \(1, 17, 17\)"):
        model(x, torch.ones(1, 3, 3, dtype=torch.bool))


def test_masked_cells_do_not_reach_others() -> None:
    """The walk of the valid cells does not see what stands on masked ones."""
    model = build().eval()
    with torch.no_grad():
        model.head.walk.gamma.fill_(1.0)
    walk = model.head.walk
    x = torch.randn(1, 16, 4, 4)
    cells = torch.ones(1, 4, 4, dtype=torch.bool)
    cells[:, :, 3] = False
    other = x.clone()
    other[..., 3] = 100.0
    torch.testing.assert_close(walk(x, mask=cells)[..., :3], walk(other, mask=cells)[..., :3])


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
@pytest.mark.parametrize("head", ["cc4s", "aspp"])
def test_training_step(norm: str, head: str) -> None:
    """Every parameter has a finite gradient, also with one image (the image's mean has a single cell)."""
    model = build(tiny(norm=norm, head=head), in_channels=1).train()
    out = model(torch.randn(1, 1, 33, 33))
    assert out.logits.shape == (1, 3, 5, 5)
    loss = out.logits.square().mean()
    if out.q is not None:
        loss = loss + out.q.square().mean() + out.k.square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    buffers = {name for name, _ in model.named_buffers()}
    assert ("backbone.bn1.running_mean" in buffers) == (norm != "group")
    assert ("backbone.bn1.weight" in buffers) == (norm == "frozen")


def test_initial_values() -> None:
    """Kaiming: deviations of sqrt(2 / fan out), logits of about unit size."""
    model = build(tiny(width=32, head_channels=64, key_channels=8), num_classes=60)
    for key, fan in [("backbone.layer4.1.conv2.weight", 256 * 9), ("head.conv51.0.weight", 64 * 9)]:
        # 36864 and more draws: the deviation is known to half a percent.
        torch.testing.assert_close(model.state_dict()[key].std(), torch.tensor((2 / fan) ** 0.5), rtol=0.03, atol=0)
    logits = model(torch.randn(2, 3, 65, 65)).logits
    assert 0.1 < logits.std() < 3


def test_aspp_by_hand() -> None:
    torch.manual_seed(0)
    head = randomize(ASPPHead(6, 3, channels=8)).double().eval()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    state = head.state_dict()

    def unit(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        parts = [state[f"{name}.1.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, state[f"{name}.0.weight"], **options), *parts, False, 0.0, 1e-5).relu()

    parts = [unit("branches.0", x)]
    for i, rate in enumerate((6, 12, 18), 1):
        parts.append(unit(f"branches.{i}", x, padding=rate, dilation=rate))
    mean = torch.einsum("bchw,oc->bo", x, state["pool.0.weight"][:, :, 0, 0]) / 63 + state["pool.0.bias"]
    parts.append(mean.relu()[:, :, None, None].repeat(1, 1, 7, 9))
    z = unit("project", torch.cat(parts, 1))
    logits = F.conv2d(z, state["conv6.1.weight"], state["conv6.1.bias"])
    out = head(x)
    torch.testing.assert_close(out.features, z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.logits, logits, rtol=1e-10, atol=1e-12)
    assert out.q is None
    assert not build(tiny(head="aspp")).has_walk


def test_channels_last() -> None:
    model = randomize(build()).eval()
    with torch.no_grad():
        model.head.walk.gamma.fill_(0.5)
    x = torch.randn(2, 3, 49, 33)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(got[:4], expected[:4], strict=True):
        # float32 convolutions in another order over some twenty layers.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast() -> None:
    model = build().train()
    x = torch.randn(2, 3, 49, 33)
    torch.manual_seed(4)
    expected = model(x).logits.detach()
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.logits.float().sum().backward()
    assert out.logits.dtype == torch.bfloat16
    # 8 bits of mantissa over some twenty normalised layers: a few percent of the spread.
    assert (out.logits.float() - expected).norm() < 0.15 * expected.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [False, True])
def test_compiled(training: bool) -> None:
    torch._dynamo.reset()
    model = build(tiny(shrink=2)).train(training)
    with torch.no_grad():
        model.head.walk.gamma.fill_(0.5)
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(graph, inputs)

        def run(*args: object) -> object:
            runs.append(1)
            return compiled(*args)

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    mask = torch.ones(2, 49, 33, dtype=torch.bool)
    mask[1, 30:] = False
    x = torch.randn(2, 3, 49, 33)
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    def run(network: nn.Module) -> tuple[tuple, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        model.zero_grad()
        torch.manual_seed(3)
        out = network(x, mask)
        out.logits.square().sum().backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        return out, grads, {k: v.clone() for k, v in model.named_buffers()}

    expected, grads, after = run(model)
    got, compiled_grads, compiled_after = run(compiled)
    assert runs == [1]
    assert got.grid == expected.grid == (4, 3)
    for a, b in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert grads.keys() == compiled_grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for key, grad in grads.items():
        # Twenty layers in float32; the gradient of a bias before a softmax is 0 but for rounding.
        torch.testing.assert_close(compiled_grads[key], grad, rtol=1e-3, atol=1e-5 * largest, msg=key)
    for key, value in after.items():
        torch.testing.assert_close(compiled_after[key], value, rtol=1e-4, atol=1e-5)


def save_torchvision_file(path: Path, name: str = "resnet18", channels: int = 3, width: int = 8) -> dict:
    torch.manual_seed(9)
    state = randomize(ResNet(name, channels, width=width)).state_dict()
    file = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    file |= {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    torch.save(file, path)
    return state


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_backbone_weights(tmp_path: Path, norm: str) -> None:
    path = tmp_path / "resnet18.pth"
    state = save_torchvision_file(path)
    model = build(tiny(backbone_weights=str(path), norm=norm))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    # A bare backbone, and a file with the weights one level down.
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    backbone = ResNet("resnet18", width=8)
    load_backbone_weights(backbone, path)
    assert torch.equal(backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_backbone_weights_for_grey_images(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    save_torchvision_file(path)
    rgb = build(tiny(backbone_weights=str(path))).backbone.eval()
    grey = build(tiny(backbone_weights=str(path)), in_channels=1).backbone.eval()
    x = torch.randn(1, 1, 33, 33)
    torch.testing.assert_close(grey(x), rgb(x.expand(1, 3, 33, 33)), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"conv1.weight is for 3 channels, data.channels is 4; expected 3, 1"):
        build(tiny(backbone_weights=str(path)), in_channels=4)
    save_torchvision_file(path, channels=4)
    build(tiny(backbone_weights=str(path)), in_channels=4)
    with pytest.raises(UserError, match=r"conv1.weight is for 4 channels, data.channels is 3; expected 4, or no"):
        build(tiny(backbone_weights=str(path)))


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, (part, message)


def test_backbone_weights_errors(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fails(*parts: str) -> None:
        with pytest.raises(UserError) as error:
            load_backbone_weights(model, path)
        one_line(error, str(path), *parts)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    fails("no such file")
    path.mkdir()
    fails("no such file")
    path.rmdir()
    save_torchvision_file(path, "resnet34")
    fails("not the weights of model.backbone=resnet18", "unknown keys layer1.2.conv1.weight", "more")
    save_torchvision_file(path, width=16)
    fails("conv1.weight has shape (16, 3, 7, 7), expected (8, 3, 7, 7)")
    state = save_torchvision_file(path)
    del state["layer3.1.bn1.running_var"]
    torch.save(state, path)
    fails("missing keys layer3.1.bn1.running_var")
    path.write_bytes(path.read_bytes()[:5000])
    fails("cannot be read")
    path.write_bytes(b"")
    fails("cannot be read")
    path.write_text("weights")
    fails("cannot be read")
    for content in ([1, 2], {}, torch.zeros(3), {"a": 1}, {1: torch.zeros(3)}):
        torch.save(content, path)
        fails("expected a state dict")
    save_torchvision_file(path)
    model = build(tiny(norm="group"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fails("expected model.norm=batch or frozen")


class Trap:
    """Unpickling this calls `open`, which would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return builtins.open, (str(self.path), "w")


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    for legacy in (False, True):
        path, proof = tmp_path / "weights.pth", tmp_path / "executed"
        torch.save({"conv1.weight": Trap(proof)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError) as error:
            load_backbone_weights(build(), path)
        one_line(error, str(path), "holds pickled code (", "open", "never executed")
        assert not proof.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(backbone="resnet19"), "model.backbone: got 'resnet19', expected one of resnet18, resnet34"),
        (dict(backbone="keras/resnet50"), "or timm/<name>, torchvision/<name>, smp/<name>"),
        (dict(backbone="timm/"), "model.backbone: got 'timm/'"),
        (dict(width=0), "model.width: got 0, expected at least 1"),
        (dict(head="fcn"), "model.head: got 'fcn', expected one of cc4s, aspp"),
        (dict(head_channels=0), "model.head_channels: got 0"),
        (dict(key_channels=-1), "model.key_channels: got -1"),
        (dict(shrink=0), "model.shrink: got 0"),
        (dict(dropout=1.0), "model.dropout: got 1.0"),
        (dict(dropout=-0.1), "model.dropout: got -0.1"),
        (dict(norm="instance"), "model.norm: got 'instance', expected one of batch, group, frozen"),
        (dict(backbone="timm/x", norm="group"), "model.norm: group is for own ResNets"),
        (dict(backbone="timm/x"), "model.width: got 8"),
    ],
)
def test_configuration_errors(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(tiny(**changes))
    one_line(error, message)


PACKAGES = [
    ("timm/some_net", "timm", "timm"),
    ("torchvision/resnet50", "torchvision", "torchvision"),
    ("smp/resnet34", "segmentation_models_pytorch", "segmentation-models-pytorch"),
]


@pytest.mark.parametrize(("name", "package", "install"), PACKAGES)
def test_package_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, package: str, install: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        build(tiny(backbone=name, width=64))
    one_line(error, f"{name} needs {package}, which is not installed: pip install {install}")


class Pyramid(nn.Module):
    """Features at strides 2, 4 and `last`, as the packages return them."""

    def __init__(self, channels: int, last: int = 8) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.convs = nn.ModuleList()
        for step, outputs in [(2, 4), (2, 8), (last // 4, 12)]:
            self.convs.append(nn.Conv2d(channels, outputs, 3, step, padding=1))
            channels = outputs
        self.bn = nn.BatchNorm2d(12)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for conv in self.convs:
            x = conv(x)
            features.append(x)
        features[-1] = self.bn(x)
        return features


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, norm: str) -> None:
    calls = []

    def create_model(name: str, **options: object) -> nn.Module:
        calls.append((name, options))
        return Pyramid(options["in_chans"])

    fake_package(monkeypatch, "timm", create_model=create_model)
    config = tiny(backbone="timm/some_net", width=64, norm=norm)
    model = build(config, in_channels=2)
    assert calls == [("some_net", dict(pretrained=False, features_only=True, output_stride=8, in_chans=2))]
    assert model.backbone.out_channels == 12
    assert model.backbone.training
    model.train()
    out = model(torch.randn(2, 2, 33, 33))
    assert out.logits.shape == (2, 3, 5, 5)
    bn = model.backbone.network.bn
    frozen = norm == "frozen"
    assert bn.num_batches_tracked == (0 if frozen else 1)
    assert bn.weight.requires_grad != frozen
    assert not model.backbone.network.unused.weight.requires_grad
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # A file in the package's own names, with a classifier.
    path = tmp_path / "weights.pth"
    state = {k: torch.ones_like(v) for k, v in model.backbone.network.state_dict().items()}
    torch.save(state | {"head.fc.weight": torch.zeros(10, 12)}, path)
    model = build(dataclasses.replace(config, backbone_weights=str(path)), in_channels=2)
    assert torch.equal(model.backbone.network.convs[0].weight, torch.ones(4, 2, 3, 3))


def test_package_without_stride_8(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(backbone="timm/some_net", width=64)
    fake_package(monkeypatch, "timm", create_model=lambda name, **options: Pyramid(3, last=32))
    with pytest.raises(UserError) as error:
        build(config)
    one_line(error, "timm/some_net gives features of shape (1, 12, 3, 3) for a 65 x 65 image")

    def refuse(name: str, **options: object) -> nn.Module:
        raise RuntimeError(f"Unknown model ({name})\nlist them")

    fake_package(monkeypatch, "timm", create_model=refuse)
    with pytest.raises(UserError) as error:
        build(config)
    one_line(error, "timm/some_net cannot be built with output stride 8: Unknown model (some_net)")


def test_patches_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that cuts patches of 8 pixels gets the grid of the others."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 8, 8)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.conv(x)]

    fake_package(monkeypatch, "timm", create_model=lambda name, **options: Patches())
    backbone = build_backbone("timm/patches")
    x = torch.randn(1, 3, 33, 48)
    full = torch.zeros(1, 3, 40, 48)
    full[:, :, :33] = x
    torch.testing.assert_close(backbone(x), backbone.network.conv(full))
    for side in range(1, 20):
        assert backbone(torch.randn(1, 3, side, 465)).shape[2:] == ((side - 1) // 8 + 1, 59)


@pytest.mark.parametrize("channels", [3, 5])
def test_torchvision(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    calls = []

    def get_model(name: str, **options: object) -> nn.Module:
        calls.append((name, options))
        if name != "resnet50":
            return nn.Identity()
        network = ResNet("resnet50", width=4, norm=norm_layer("batch"))
        network.fc = nn.Linear(4, 2)
        return network

    fake_package(monkeypatch, "torchvision")
    fake_package(monkeypatch, "torchvision.models", get_model=get_model)
    model = build(tiny(backbone="torchvision/resnet50", width=64), in_channels=channels)
    assert calls == [("resnet50", dict(weights=None, replace_stride_with_dilation=[False, True, True]))]
    assert model.backbone.out_channels == 128
    assert model(torch.randn(2, channels, 33, 33)).logits.shape == (2, 3, 5, 5)
    assert not any("fc" in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match="only torchvision's ResNets"):
        build(tiny(backbone="torchvision/vgg16", width=64))


def test_smp(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Encoder(Pyramid):
        def make_dilated(self, output_stride: int) -> None:
            calls.append(output_stride)

    def get_encoder(name: str, **options: object) -> nn.Module:
        calls.append((name, options))
        return Encoder(options["in_channels"])

    fake_package(monkeypatch, "segmentation_models_pytorch")
    fake_package(monkeypatch, "segmentation_models_pytorch.encoders", get_encoder=get_encoder)
    backbone = build_backbone("smp/resnet34", 4)
    assert calls == [("resnet34", dict(in_channels=4, depth=5, weights=None)), 8]
    assert backbone.out_channels == 12
    assert backbone(torch.randn(1, 4, 33, 33)).shape == (1, 12, 5, 5)
