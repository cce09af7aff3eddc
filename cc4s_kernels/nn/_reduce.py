"""From sums per image to the loss of a batch, also of one spread over processes and micro-batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from cc4s_kernels._validation import check_choice, check_number, describe

REDUCTIONS = ("mean", "sum", "none")

Normalizer = float | Tensor | None
"""A count over the global batch; None = the count of the tensors at hand."""


def world_size() -> int:
    """Number of processes of the default group of torch.distributed, 1 where it is not initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def global_count(count: Tensor) -> Tensor:
    """Sum of `count` over all processes, without gradient: a `normalizer`.

    Call it once a step on the counts of all micro-batches of this process, before the first forward pass.

    Args:
        count: any shape (a 0-d count, or several stacked into one tensor), same shape on every process.

    Returns:
        A new tensor like `count`; in a single process a copy of it.
    """
    total = count.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total


def check_reduction(reduction: Any, normalizer: Any = None) -> None:
    """Checks the two options that every loss shares.

    Raises:
        TypeError: normalizer is no number. ValueError: unknown reduction, a normalizer that is negative, not
            a scalar, or given for another reduction than "mean".
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer: got one for reduction {reduction!r}, expected it only for 'mean'")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: got {describe(normalizer)}, expected a single count")
    else:
        check_number("normalizer", normalizer, low=0)


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 with gradient 0 where the count is 0."""
    some = count > 0
    return torch.where(some, total / count.where(some, 1), 0)


def reduce(sums: Tensor, counts: Tensor, reduction: str, normalizer: Normalizer = None) -> Tensor:
    """Reduces sums per image to a loss.

    - "mean": sum of `sums` / sum of `counts`; with a normalizer, world size * sum of `sums` / normalizer:
      then the average over the processes, which is what DistributedDataParallel makes of gradients, is the
      global mean, and so is the plain sum over micro-batches. 0 with gradient 0 where the divisor is 0.
    - "sum": sum of `sums`.
    - "none": `sums` as they are.

    Args:
        sums: (B,). counts: (B,), what they are divided by. reduction, normalizer: see above; both checked
            before.

    Returns:
        A scalar, or (B,) for "none".
    """
    if reduction == "none":
        return sums
    total = sums.sum()
    if reduction == "sum":
        return total
    if normalizer is None:
        return divide(total, counts.detach().sum())
    if isinstance(normalizer, Tensor):
        count = normalizer.detach().reshape(()).to(total.device, total.dtype)
    else:
        count = total.new_tensor(normalizer)
    return divide(world_size() * total, count)


class BatchLoss(nn.Module):
    """A loss with the options that all share: `reduction`, and the `normalizer` of a mean.

    Raises:
        TypeError, ValueError: as `check_reduction`.
    """

    def __init__(self, reduction: str, normalizer: Normalizer) -> None:
        super().__init__()
        check_reduction(reduction, normalizer)
        self.reduction = reduction
        self.normalizer = normalizer

    def _given_or_own(self, normalizer: Normalizer) -> Normalizer:
        """The checked normalizer of a call: the one given with it, else that of the constructor."""
        normalizer = self.normalizer if normalizer is None else normalizer
        check_reduction(self.reduction, normalizer)
        return normalizer
