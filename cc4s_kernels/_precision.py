"""The dtype rules that the ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, sums and losses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device where autocast is on; float64 stays."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which autocast does not touch the ops of `device`."""
    # "meta" has no autocast of its own; any device type is a no-op for it.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
