"""`ck.patch`: what it replaces, what it leaves, and that it undoes all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cc4s_kernels as ck
from tests.ops.tester import assert_matches, randn


class PositionAttention(nn.Module):
    """Position attention as in DANet."""

    def __init__(self, channels: int, scaled: bool = False, returns_matrix: bool = False) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, 2, 1)
        self.key_conv = nn.Conv2d(channels, 2, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.scaled = scaled
        self.returns_matrix = returns_matrix

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        query = self.query_conv(x).flatten(2).transpose(1, 2)
        energy = query @ self.key_conv(x).flatten(2)
        matrix = (energy / 2 if self.scaled else energy).softmax(-1)
        out = self.value_conv(x).flatten(2) @ matrix.transpose(1, 2)
        out = self.gamma * out.reshape(x.shape) + x
        return (out, matrix) if self.returns_matrix else out


class NonLocal(nn.Module):
    """The non-local block of mmcv, of plain convolutions."""

    def __init__(self, channels: int, use_scale: bool = True, mode: str = "embedded_gaussian") -> None:
        super().__init__()
        self.in_channels = channels
        self.use_scale = use_scale
        self.mode = mode
        self.theta, self.phi, self.g = (nn.Conv2d(channels, 4, 1) for _ in range(3))
        self.conv_out = nn.Conv2d(4, channels, 1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        energy = theta.mT @ phi * (4**-0.5 if self.use_scale else 1.0)
        return x + self.conv_out((energy.softmax(-1) @ g.mT).mT.reshape(x.shape[0], 4, *x.shape[2:]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.attention = PositionAttention(8)
        self.blocks = nn.Sequential(NonLocal(8), NonLocal(8, use_scale=False), NonLocal(8, mode="dot_product"))
        self.scaled = PositionAttention(8, scaled=True)
        self.gan = PositionAttention(8, returns_matrix=True)
        self.heads = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.blocks(self.attention(self.first(x))))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_replaced_blocks_give_the_same_and_come_back() -> None:
    model = net()
    x = randn(2, 3, 9, 11, dtype=torch.float64, device="cpu", seed=1)
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    before = gradients(model, x)
    patch = ck.patch(model)
    assert {r.name for r in patch.replaced} == {"attention", "blocks.0", "blocks.1"}
    reasons = {left.name: left.reason for left in patch.left}
    assert set(reasons) == {"blocks.2", "scaled", "gan", "heads"}
    assert "dot_product" in reasons["blocks.2"]
    assert "not that of the walk" in reasons["scaled"]
    assert "tuple" in reasons["gan"]
    assert "fused" in reasons["heads"]
    assert "left heads" in str(patch)
    assert "replaced attention" in str(patch)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    # float64: the walk adds up in another order. A gradient of keys' biases is 0 but for the rounding of the others.
    largest = max(x.abs().max().item() for x in before)
    for index, (a, b) in enumerate(zip(gradients(model, x), before, strict=True)):
        assert_matches(f"patched {index}", a, b, atol=1e-13 * largest)
    assert "replaced already" in {left.name: left.reason for left in ck.patch(model).left}["attention"]
    patch.undo()
    assert patch.replaced == []
    assert not any("forward" in vars(module) for module in model.modules())
    for a, b in zip(gradients(model, x), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_walk_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from cc4s_kernels import patching

    calls = []
    run: Callable[..., Tensor] = patching.random_walk

    def counted(*args: Tensor, **kwargs: float) -> Tensor:
        calls.append(args)
        return run(*args, **kwargs)

    model = net()
    with ck.patch(model) as patch:
        monkeypatch.setattr(patching, "random_walk", counted)
        model(torch.zeros(1, 3, 9, 9, dtype=torch.float64))
        assert len(calls) == len(patch.replaced) == 3
    model(torch.zeros(1, 3, 9, 9, dtype=torch.float64))
    assert len(calls) == 3


def test_copies_of_a_patched_model_use_their_own_parameters() -> None:
    model = net()
    ck.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.attention.gamma.add_(1)
    x = randn(1, 3, 9, 9, dtype=torch.float64, device="cpu", seed=2)
    assert (twin(x) - model(x)).abs().max() > 1e-3


def test_random_state_and_model_are_untouched() -> None:
    model = net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with ck.patch(model):
        assert torch.equal(torch.rand(1), expected)
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_nothing_to_replace_and_bad_input() -> None:
    assert str(ck.patch(nn.Conv2d(1, 1, 1))) == "no block of attention found"
    block = PositionAttention(8)
    assert str(ck.patch(block)).startswith("replaced the model: position attention")
    with pytest.raises(TypeError, match=r"model: got str, expected a torch\.nn\.Module"):
        ck.patch("model")  # type: ignore[arg-type]
