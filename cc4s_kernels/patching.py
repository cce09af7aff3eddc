"""`patch`: runs the attention blocks of a model on `cc4s_kernels.random_walk`, and undoes it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cc4s_kernels.ops.random_walk import random_walk

__all__ = ["Left", "Patch", "Replaced", "patch"]


class Replaced(NamedTuple):
    """A block that runs on the walk. name: its path in the model. block: what was recognised."""

    name: str
    block: str


class Left(NamedTuple):
    """A block of attention that was left as it is. name: its path in the model. reason: why."""

    name: str
    reason: str


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C)."""
    return x.flatten(2).mT


def _position_attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = (_rows(conv(x)) for conv in (self.query_conv, self.key_conv, self.value_conv))
    return self.gamma * random_walk(q, k, v).mT.reshape(x.shape) + x


def _self_attention_block(self: Any, query_feats: Tensor, key_feats: Tensor) -> Tensor:
    q, k, v = (
        _rows(project(x))
        for project, x in (
            (self.query_project, query_feats),
            (self.key_project, key_feats),
            (self.value_project, key_feats),
        )
    )
    scale = self.channels**-0.5 if self.matmul_norm else 1.0
    y = random_walk(q, k, v, scale=scale).mT.unflatten(2, query_feats.shape[2:])
    return y if self.out_project is None else self.out_project(y)


def _mmseg_position_attention(self: Any, x: Tensor) -> Tensor:
    return self.gamma(_self_attention_block(self, x, x)) + x


def _non_local(self: Any, x: Tensor) -> Tensor:
    q, k, v = (_rows(layer(x)) for layer in (self.theta, self.phi, self.g))
    scale = q.shape[-1] ** -0.5 if self.use_scale else 1.0
    return x + self.conv_out(random_walk(q, k, v, scale=scale).mT.unflatten(2, x.shape[2:]))


class _Block(NamedTuple):
    """A kind of block.

    title: for the list. parts: attributes by which it is recognised. unsuited: why a block of this kind cannot run on
    the walk, or None. inputs: channels of its inputs. zeros: parameters that hide the walk at the start.
    """

    title: str
    parts: tuple[str, ...]
    unsuited: Callable[[Any], str | None]
    inputs: Callable[[Any], list[int]]
    zeros: Callable[[Any], list[nn.Parameter]]
    forward: Callable[..., Tensor]


def _downsampled(block: Any) -> str | None:
    if block.query_downsample is not None or block.key_downsample is not None:
        return "it downsamples queries or keys: the walk is between the positions of one map"
    return None


def _other_mode(block: Any) -> str | None:
    if block.mode != "embedded_gaussian":
        return f"mode {block.mode!r} is no softmax of embedded features"
    if getattr(block, "sub_sample", False):
        return "sub_sample=True: the walk is between the positions of one map"
    return None


_SELF_ATTENTION = (
    *("query_project", "key_project", "value_project", "out_project"),
    *("query_downsample", "key_downsample", "matmul_norm"),
)

BLOCKS = (
    _Block(
        "position attention (query_conv, key_conv, value_conv, gamma)",
        ("query_conv", "key_conv", "value_conv", "gamma"),
        lambda block: None,
        lambda block: [block.query_conv.in_channels],
        lambda block: [block.gamma],
        _position_attention,
    ),
    _Block(
        "position attention of mmsegmentation",
        (*_SELF_ATTENTION, "gamma"),
        _downsampled,
        lambda block: [block.query_in_channels],
        lambda block: list(block.gamma.parameters()),
        _mmseg_position_attention,
    ),
    _Block(
        "self-attention block of mmsegmentation",
        _SELF_ATTENTION,
        _downsampled,
        lambda block: [block.query_in_channels, block.key_in_channels],
        lambda block: [] if block.out_project is None else list(block.out_project.parameters()),
        _self_attention_block,
    ),
    _Block(
        "non-local block of mmcv",
        ("theta", "phi", "g", "conv_out", "use_scale", "mode"),
        _other_mode,
        lambda block: [block.in_channels],
        lambda block: list(block.conv_out.parameters()),
        _non_local,
    ),
)


class Patch:
    """What `patch` did.

    Attributes:
        replaced: the blocks that run on the walk. left: the blocks of attention that do not, with the reason.
    """

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._modules: list[nn.Module] = []

    def undo(self) -> None:
        """Gives every block its own forward pass back."""
        for module in self._modules:
            del module.forward
        self._modules.clear()
        self.replaced.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced {name or 'the model'}: {block}" for name, block in self.replaced]
        lines += [f"left {name or 'the model'}: {reason}" for name, reason in self.left]
        return "\n".join(lines) or "no block of attention found"


def patch(model: nn.Module) -> Patch:
    """Runs the attention blocks of a model that build an N x N matrix on `cc4s_kernels.random_walk`.

    Recognised are the position attention of DANet and its copies (`query_conv`, `key_conv`, `value_conv`,
    `gamma`), the self-attention block of mmsegmentation and the non-local block of mmcv. A block is replaced only after
    a copy of it, in eval mode and with its output scale set to 1, gave the same result as the walk on random features.

    Modules, parameters, hooks and state dict stay what they are: only `forward` of a block is another one, until
    `Patch.undo`. `torch.save` of whole patched modules is not supported; of state dicts it is.

    Args:
        model: any module; changed in place.

    Returns:
        `Patch`: what was replaced, and what was left and why. Also a context manager that undoes at the end.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    done = Patch()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            done.left.append(Left(name, "torch.nn.MultiheadAttention has its own fused attention"))
            continue
        kind = next((b for b in BLOCKS if all(hasattr(module, part) for part in b.parts)), None)
        if kind is None:
            continue
        reason = _why_not(module, kind)
        if reason is not None:
            done.left.append(Left(name, reason))
            continue
        module.forward = types.MethodType(kind.forward, module)
        done._modules.append(module)
        done.replaced.append(Replaced(name, kind.title))
    return done


def _why_not(module: Any, kind: _Block) -> str | None:
    """Why a block that looks like this kind is not replaced, or None."""
    if "forward" in vars(module):
        return "its forward is replaced already"
    reason = kind.unsuited(module)
    if reason is not None:
        return reason
    try:
        block = copy.deepcopy(module).eval().double().cpu()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in kind.zeros(block):
                nn.init.normal_(parameter)
            inputs = [torch.randn(2, channels, 5, 7, dtype=torch.float64) for channels in kind.inputs(block)]
            expected = block(*inputs)
            if not isinstance(expected, Tensor):
                return f"it returns {type(expected).__name__}, not one tensor: the walk has no matrix to return"
            found = kind.forward(block, *inputs)
    except Exception as error:  # a foreign block can fail in any way
        return f"it could not be compared with the walk: {type(error).__name__}: {error}"
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
        return "its result is not that of the walk"
    return None
