"""Normalisation layers: batch statistics over all processes, frozen statistics, groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cc4s.errors import UserError
from cc4s.models.distributed import rank_and_world
from cc4s_kernels.distributed import sum_over_processes

NORMS = ("batch", "group", "frozen")


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the global batch, on any device.

    In one process it is `nn.BatchNorm2d`. With several processes mean and variance are taken over all their
    samples (shards may differ in size), in the forward and in the gradients, so that the processes together
    compute what one does with the concatenated batch. Every process must run the same layers, forward and
    backward. `synchronize` exchanges it for the faster `nn.SyncBatchNorm` on CUDA, which has no CPU
    implementation.

    Half-precision inputs are normalised in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w). Returns the same shape and dtype.

        Raises:
            ValueError: one value per channel in the whole global batch, in training.
        """
        if not self.training or rank_and_world()[1] == 1:
            return super().forward(x)
        return self._global_forward(x)

    # The all-reduces are not traced by torch.compile: the graph is cut here.
    @torch.compiler.disable
    def _global_forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        local = x.shape[0] * x.shape[2] * x.shape[3]
        sums = wide.sum((0, 2, 3), dtype=torch.float64)
        # The count travels with the sums; float64 holds it exactly. [C + 1]
        sums = sum_over_processes(torch.cat([sums, sums.new_full((1,), local)]))
        count = int(sums[-1].item())
        if count <= 1:
            raise ValueError(f"expected more than 1 value per channel in training, got {count} in the global batch")
        mean = sums[:-1] / count
        centred = wide - mean.to(wide.dtype)[:, None, None]
        squares = (centred * centred).sum((0, 2, 3), dtype=torch.float64)
        var = sum_over_processes(squares) / count
        if self.track_running_stats:
            self._update_buffers(mean, var, count)
        scale = torch.rsqrt(var + self.eps).to(wide.dtype)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale[:, None, None]
        if self.bias is not None:
            out = out + self.bias[:, None, None]
        return out.to(x.dtype)

    @torch.no_grad()
    def _update_buffers(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine map, in training as in evaluation.

    Nothing in it is trained; its state has the keys of `nn.BatchNorm2d`, so that either loads the other's.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w). Returns the same shape and dtype."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at most 32 groups of at least 4 channels: the most that divide `channels`."""
    most = min(32, max(1, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def norm_layer(kind: str) -> Callable[[int], nn.Module]:
    """The constructor (of the number of channels) of a kind of norm: "batch", "group" or "frozen".

    Raises:
        UserError: unknown kind.
    """
    layers: dict[str, Callable[[int], nn.Module]] = {
        "batch": BatchNorm2d,
        "group": group_norm,
        "frozen": FrozenBatchNorm2d,
    }
    if kind not in layers:
        raise UserError(f"model.norm: got {kind!r}, expected one of {', '.join(NORMS)}")
    return layers[kind]


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, batch norms in training mode use the batch's statistics and leave their buffers
    alone.

    Running mean, running variance and the count of batches stay what they were: the pass over the transformed
    image (docs/method.md section 5) is not one more observation. Layers in evaluation mode are not concerned.
    """
    # track_running_stats=False has just this meaning in training mode, for nn.BatchNorm2d and
    # nn.SyncBatchNorm alike.
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def synchronize(model: nn.Module) -> nn.Module:
    """Makes every batch norm of `model` take its training statistics over all processes.

    One process: nothing changes. On CUDA the layers become `nn.SyncBatchNorm`; elsewhere plain
    `nn.BatchNorm2d`s become `BatchNorm2d`, which sums over processes itself. Call it after moving the model
    to its device and before wrapping it. Parameters and buffers are kept, not copied.

    Returns:
        The model; use the returned one.

    Raises:
        UserError: a layer that cannot be synchronised.
    """
    if rank_and_world()[1] == 1:
        return model
    on_cuda = _on_cuda(model)
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in _PLAIN:
            if on_cuda and type(layer).__module__.startswith("timm."):
                from timm.layers import convert_sync_batchnorm

                return convert_sync_batchnorm(model)
            raise UserError(
                f"model.norm: {name} is a {type(layer).__name__}, whose statistics cannot be taken over "
                "processes on this device; expected model.norm=frozen, another backbone, or one process"
            )
    if on_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _replace_plain(model)


def _on_cuda(model: nn.Module) -> bool:
    return any(parameter.device.type == "cuda" for parameter in model.parameters())


_PLAIN: tuple[type, ...] = (nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm)


def _replace_plain(module: nn.Module) -> nn.Module:
    if type(module) is nn.BatchNorm2d:
        # Same fields, other forward: parameters, buffers and hooks stay the very same objects.
        module.__class__ = BatchNorm2d
    for child in module.children():
        _replace_plain(child)
    return module
