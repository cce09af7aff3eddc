"""The authors' checkpoints: their names, their network (docs/method.md section 9)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cc4s.errors import UserError
from cc4s.models.norm import BatchNorm2d
from cc4s.models.resnet import RESNETS, BasicBlock, ResNet
from cc4s.models.segmenter import RandomWalkHead, Segmenter
from cc4s.models.weights import load_state, read_torch_file, state_of

_PARTS = {
    "model_sed.": "backbone.",
    "conv5a.": "head.conv5a.",
    "PAM_Module.": "head.walk.",
    "conv51.": "head.conv51.",
    "conv6.": "head.conv6.",
}
"""The authors' prefix of each part, and ours."""

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# A second branch that their network builds and never runs.
# conv5b never runs; fc is ImageNet's classifier, which some files carry along.
_UNUSED = {"conv5b.0.weight"} | {f"conv5b.1.{name}" for name in _NORM}


def is_released_checkpoint(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a file, or what was read from it, is a checkpoint of the authors' network.

    Raises:
        UserError: `source` is a path, and the file cannot be read.
    """
    content = source if isinstance(source, Mapping) else read_torch_file(source)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return False
    names = [key.removeprefix("module.") for key in state if isinstance(key, str)]
    return all(any(name.startswith(part) for name in names) for part in ("model_sed.", "PAM_Module."))


def load_released_checkpoint(path: str | Path, *, num_classes: int | None = None, shrink: int = 1) -> Segmenter:
    """Builds the authors' network from one of their checkpoint files.

    Depth, width, channels and number of classes are read off the weights. The network has the details these
    weights were trained with (`ResNet` style "released"). Entries of the file besides the weights are
    ignored. Nothing pickled in the file is executed.

    Args:
        path: the file (`*.pth.tar`): keys `module.model_sed.*`, `module.conv5a.*`, `module.PAM_Module.*`,
            `module.conv51.*`, `module.conv6.*`, under `state_dict` or at the top, with or without `module.`.
        num_classes: expected number of classes; None takes the file's.
        shrink: shrink factor of the random walk, which the file does not tell. 1 is what the published
            training scripts pass; networks made with the authors' constructor and no argument have 2.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: a file that cannot be read, another network, unknown or missing keys, wrong shapes, or
            another number of classes.
    """
    state = state_of(read_torch_file(path), path)
    what = "the authors' network"
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        part = next((p for p in _PARTS if key.startswith(p)), None)
        if part is not None:
            ours[_PARTS[part] + key[len(part) :]] = value
        elif key not in _UNUSED and not key.startswith("model_sed.fc."):
            raise UserError(f"{path}: not the weights of {what}: unknown key {key}")

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in state:
            raise UserError(f"{path}: not the weights of {what}: missing key {key}")
        if state[key].dim() != dims:
            raise UserError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {dims} dimensions")
        return tuple(state[key].shape)

    width, channels = shape("model_sed.conv1.weight", 4)[:2]
    head_channels = shape("conv5a.0.weight", 4)[0]
    key_channels = shape("PAM_Module.query_conv.weight", 4)[0]
    classes = shape("conv6.1.weight", 4)[0]
    if num_classes is not None and num_classes != classes:
        raise UserError(f"{path}: conv6.1.weight is for {classes} classes, expected {num_classes}")
    norm = BatchNorm2d
    backbone = ResNet(_depth(state, path), channels, width=width, norm=norm, style="released")
    head = RandomWalkHead(
        backbone.out_channels,
        classes,
        channels=head_channels,
        key_channels=key_channels,
        shrink=shrink,
        norm=norm,
    )
    model = Segmenter(backbone, head)
    names = {}
    for key in list(model.state_dict()) + list(ours):
        part = next(p for p, own in _PARTS.items() if key.startswith(own))
        names[key] = part + key[len(_PARTS[part]) :]
    load_state(model, ours, path, f"{what} ({backbone.name}, {classes} classes)", names)
    return model.eval()


def _depth(state: Mapping[str, Tensor], path: str | Path) -> str:
    """The ResNet whose blocks are in `state`."""
    counts = []
    for stage in range(1, 5):
        prefix = f"model_sed.layer{stage}."
        blocks = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
        counts.append(len(blocks))
    basic = not any(".conv3." in key for key in state if key.startswith("model_sed."))
    for name, (block, expected) in RESNETS.items():
        if tuple(counts) == expected and (block is BasicBlock) == basic:
            return name
    kind = "basic blocks" if basic else "bottlenecks"
    found = ", ".join(map(str, counts))
    raise UserError(f"{path}: model_sed has {found} {kind} in its layers; expected one of {', '.join(RESNETS)}")
