"""Torch ops and backends of `random_walker`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cc4s_kernels import _library, backends
from cc4s_kernels.ops.potts.grid import PixelGrid
from cc4s_kernels.ops.random_walker import reference

# ---- reference: its loops run outside torch, so torch.compile sees two operators. The gradient of a solution is
# another solution, which has a gradient in turn.
_library.LIBRARY.define("random_walker_reached(Tensor weight, Tensor seeded) -> Tensor")
_library.LIBRARY.define("random_walker_solve(Tensor weight, Tensor rhs, Tensor free) -> Tensor")


def _reached_fake(weight: Tensor, seeded: Tensor) -> Tensor:
    return torch.empty_like(seeded, memory_format=torch.contiguous_format)


def _solve_fake(weight: Tensor, rhs: Tensor, free: Tensor) -> Tensor:
    return torch.empty_like(rhs, memory_format=torch.contiguous_format)


def _reached(weight: Tensor, seeded: Tensor) -> Tensor:
    return reference.reached(weight, seeded).contiguous()


def _solve(weight: Tensor, rhs: Tensor, free: Tensor) -> Tensor:
    return reference.solve(weight, rhs, free).contiguous()


def _solve_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    weight, _, free = inputs
    ctx.save_for_backward(weight, free, output)


def _solve_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    weight, free, solution = ctx.saved_tensors
    # x = A^-1 b: the gradient of b is A^-1 g, that of w_ij is -(adjoint_i - adjoint_j) (x_i - x_j).
    adjoint = torch.ops.cc4s_kernels.random_walker_solve(weight, gradient, free)
    return weight_gradient(adjoint, solution), adjoint, None


def weight_gradient(adjoint: Tensor, x: Tensor) -> Tensor:
    """-(a_i - a_j) (x_i - x_j) summed over classes, for each pair: twice (B, C, H, W) -> (B, 2, H, W)."""
    right = (adjoint[..., 1:] - adjoint[..., :-1]) * (x[..., 1:] - x[..., :-1])
    down = (adjoint[..., 1:, :] - adjoint[..., :-1, :]) * (x[..., 1:, :] - x[..., :-1, :])
    pad = torch.nn.functional.pad
    return -torch.stack([pad(right.sum(1), (0, 1)), pad(down.sum(1), (0, 0, 0, 1))], 1)


_library.register("random_walker_reached", _reached, _reached_fake)
_library.register("random_walker_solve", _solve, _solve_fake, _solve_backward, _solve_setup)
backends.register("random_walker", "reference", reference.random_walker)

# ---- cpu: kernels in csrc/random_walker; weight (B, 2, H, W) float64, seeds (B, H, W) int64 with -1 = none.
_library.LIBRARY.define("random_walker(Tensor weight, Tensor seeds, int num_classes) -> Tensor prob")
_library.LIBRARY.define(
    "random_walker_backward(Tensor gradient, Tensor prob, Tensor weight, Tensor seeds) -> Tensor weight_gradient"
)


def _fake(weight: Tensor, seeds: Tensor, num_classes: int) -> Tensor:
    batch, height, width = seeds.shape
    return weight.new_empty((batch, num_classes, height, width))


def _fake_backward(gradient: Tensor, prob: Tensor, weight: Tensor, seeds: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, seeds, _ = inputs
    ctx.save_for_backward(output, weight, seeds)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.cc4s_kernels.random_walker_backward(gradient, *ctx.saved_tensors), None, None


torch.library.register_fake(f"{_library.NAMESPACE}::random_walker", _fake, lib=_library.LIBRARY)
torch.library.register_fake(f"{_library.NAMESPACE}::random_walker_backward", _fake_backward, lib=_library.LIBRARY)
torch.library.register_autograd(
    f"{_library.NAMESPACE}::random_walker", _backward, setup_context=_setup_context, lib=_library.LIBRARY
)
torch.library.register_autograd(
    f"{_library.NAMESPACE}::random_walker_backward", _library.no_second_derivative("cpu"), lib=_library.LIBRARY
)


def _cpu(
    image_or_grid: Tensor | PixelGrid,
    seeds: Tensor,
    num_classes: int,
    *,
    beta: float = 130.0,
    mask: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    weight = reference.weights_of(image_or_grid, beta, mask).expand(len(seeds), -1, -1, -1)
    classes = reference.seeds_of(seeds, num_classes, mask, ignore_index)
    prob: Tensor = torch.ops.cc4s_kernels.random_walker(weight.double(), classes, num_classes)
    return prob.to(weight.dtype)


def _cpu_refuses(image_or_grid: Tensor | PixelGrid, seeds: Tensor, *args: Any, **options: Any) -> str | None:
    return None if seeds.device.type == "cpu" else f"the seeds are on {seeds.device}"


backends.register("random_walker", "cpu", _cpu, _cpu_refuses)
