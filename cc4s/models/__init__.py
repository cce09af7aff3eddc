"""Networks: dilated backbones, the random-walk head, and the authors' checkpoints."""

from __future__ import annotations

from cc4s.config import ModelConfig
from cc4s.errors import UserError
from cc4s.models.backbones import build_backbone
from cc4s.models.dropout import Dropout2d
from cc4s.models.norm import BatchNorm2d, FrozenBatchNorm2d, frozen_statistics, norm_layer, synchronize
from cc4s.models.released import is_released_checkpoint, load_released_checkpoint
from cc4s.models.resnet import ResNet
from cc4s.models.segmenter import ASPPHead, RandomWalkHead, Segmenter, SegmenterOutput
from cc4s.models.unet import UNet
from cc4s.models.weights import load_backbone_weights, read_torch_file

__all__ = [
    "ASPPHead",
    "BatchNorm2d",
    "Dropout2d",
    "FrozenBatchNorm2d",
    "RandomWalkHead",
    "ResNet",
    "Segmenter",
    "SegmenterOutput",
    "UNet",
    "build_backbone",
    "build_model",
    "frozen_statistics",
    "is_released_checkpoint",
    "load_backbone_weights",
    "load_released_checkpoint",
    "read_torch_file",
    "synchronize",
]

HEADS = ("cc4s", "aspp")


def _check(config: ModelConfig) -> None:
    for name, least in (("width", 1), ("head_channels", 1), ("key_channels", 0), ("shrink", 1)):
        value = getattr(config, name)
        if value < least:
            raise UserError(f"model.{name}: got {value}, expected at least {least}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout: got {config.dropout}, expected at least 0 and below 1")
    if config.head not in HEADS:
        raise UserError(f"model.head: got {config.head!r}, expected one of {', '.join(HEADS)}")
    if config.backbone == "unet":
        if config.head != "cc4s" or config.backbone_weights:
            key = "head" if config.head != "cc4s" else "backbone_weights"
            raise UserError(f"model.{key}: got {getattr(config, key)!r}; model.backbone=unet has none of its own")
        if not 1 <= config.walk_level <= 4:
            raise UserError(f"model.walk_level: got {config.walk_level}, expected 1 to 4")


def build_model(
    config: ModelConfig, *, num_classes: int, in_channels: int, random_walk: bool = True
) -> Segmenter | UNet:
    """Builds a network from its configuration: random weights, then `config.backbone_weights` if given.

    Args:
        config: the `model` section. `mask_padding` is not the network's: it says what to pass as `mask`.
        num_classes: C.
        in_channels: channels of the images.
        random_walk: False leaves the walk out of the head. The ASPP head never has one.

    Returns:
        The network, in training mode on the CPU. Random weights come from torch's generator.

    Raises:
        UserError: a value out of range, a backbone that is unknown or not installed, or weights that do not
            fit.
    """
    _check(config)
    norm = norm_layer(config.norm)
    if config.backbone == "unet":
        return UNet(
            in_channels,
            num_classes,
            width=config.width,
            walk_level=config.walk_level,
            key_channels=config.key_channels or None,
            shrink=config.shrink,
            dropout=config.dropout,
            norm=norm,
            random_walk=random_walk,
        )
    backbone = build_backbone(config.backbone, in_channels, width=config.width, norm=config.norm)
    head: RandomWalkHead | ASPPHead
    if config.head == "aspp":
        head = ASPPHead(
            backbone.out_channels,
            num_classes,
            channels=config.head_channels,
            dropout=config.dropout,
            norm=norm,
        )
    else:
        head = RandomWalkHead(
            backbone.out_channels,
            num_classes,
            channels=config.head_channels,
            key_channels=config.key_channels or max(1, config.head_channels // 8),
            shrink=config.shrink,
            dropout=config.dropout,
            norm=norm,
            random_walk=random_walk,
        )
    model = Segmenter(backbone, head)
    if config.backbone_weights:
        load_backbone_weights(model, config.backbone_weights)
    return model
