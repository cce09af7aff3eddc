"""Weights from files: read without running anything, checked before anything is changed."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cc4s.errors import UserError


def _numpy_globals() -> list[Any]:
    """What numbers and numeric arrays of NumPy need to be read back, under the names of NumPy 1 and 2.

    Only constructors of data: arrays of Python objects are left out.
    """
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, np.ndarray]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    return allowed + [type(np.dtype(code)) for code in "?bhilqBHILQefd"]


def read_torch_file(path: str | Path) -> Any:
    """Reads a file of `torch.save` onto the CPU without executing anything pickled in it.

    Tensors, numbers, text, containers and numeric NumPy values are read; anything else is refused.

    Raises:
        UserError: no such file, not a file of `torch.save`, damaged, or holding pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint written by torch.save")
    try:
        # torch warns of pickles whose protocol it did not write; what it cannot read is an error anyway.
        with torch.serialization.safe_globals(_numpy_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error))
        if match is None:
            raise UserError(f"{path}: cannot be read; expected a checkpoint written by torch.save") from error
        raise UserError(
            f"{path}: holds pickled code ({match[1] or match[2]}), which is never executed; "
            "expected only tensors and numbers"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); expected a checkpoint written by torch.save") from error


def state_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file's content: the content itself or its entry `state_dict`, without `module.`.

    Raises:
        UserError: there is none, or it holds something else than tensors.
    """
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds no weights; expected a state dict or an entry state_dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: entry {key!r} is a {type(value).__name__}; expected a state dict of tensors, "
                "or one under the entry state_dict"
            )
    prefix = "module."
    if all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def _few(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    what: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Copies `state` into `module` if every key and shape fits; else changes nothing.

    Only `num_batches_tracked` may be missing (older files have none; it has no effect on the result).

    Args:
        state: tensors under the module's own names.
        path: the file, for the message.
        what: what was expected, for the message.
        names: the file's name of each of the module's keys, for the message; None where they are the same.

    Raises:
        UserError: unknown or missing keys, or wrong shapes.
    """
    names = names or {}
    own = module.state_dict()
    unknown = [key for key in state if key not in own]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [key for key in state if key in own and state[key].shape != own[key].shape]
    problems = []
    if unknown:
        problems.append(f"unknown keys {_few([names.get(k, k) for k in unknown])}")
    if missing:
        problems.append(f"missing keys {_few([names.get(k, k) for k in missing])}")
    if shapes:
        key = shapes[0]
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        got, expected = tuple(state[key].shape), tuple(own[key].shape)
        problems.append(f"{names.get(key, key)} has shape {got}, expected {expected}{more}")
    if problems:
        raise UserError(f"{path}: not the weights of {what}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def load_backbone_weights(model: nn.Module, path: str | Path) -> None:
    """Loads pretrained backbone weights from a local file of `torch.save`.

    Own ResNets take torchvision's names. The classifier's weights in the file (`fc.*`, `classifier.*`,
    `head.*`) are left out. Weights for three channels load into a network for one: they are summed, which is
    the three-channel network on an image of three equal channels. Other differences are errors, and then
    nothing is changed.

    Args:
        model: a segmenter, or a backbone alone.
        path: the file; nothing pickled in it is executed.

    Raises:
        UserError: a file that cannot be read, or weights of another architecture, number of channels or
            width.
    """
    backbone = getattr(model, "backbone", model)
    what = f"model.backbone={getattr(backbone, 'name', type(backbone).__name__)}"
    # Backbones of other packages are wrapped; files have the inner names.
    backbone = getattr(backbone, "network", backbone)
    own = backbone.state_dict()
    state = state_of(read_torch_file(path), path)
    classifier = ("fc.", "classifier.", "head.")
    state = {k: v for k, v in state.items() if k in own or not k.startswith(classifier)}
    if any(k.endswith(".running_mean") for k in state) and not any(k.endswith(".running_mean") for k in own):
        raise UserError(f"{path}: has batch-norm statistics; expected model.norm=batch or frozen with these weights")
    first = "conv1.weight"
    if first in state and first in own and state[first].dim() == 4:
        given, wanted = state[first].shape[1], own[first].shape[1]
        if given == 3 and wanted == 1:
            state[first] = state[first].sum(1, keepdim=True)
        elif given != wanted:
            raise UserError(
                f"{path}: {first} is for {given} channels, data.channels is {wanted}; expected {given}"
                + (", 1 (the weights are summed)" if given == 3 else "")
                + ", or no model.backbone_weights"
            )
    load_state(backbone, state, path, what)
