"""A small checkpoint, and what `cc4s export` has to reproduce."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cc4s.config import load_config
from cc4s.data import normalize
from cc4s.engine import checkpoint
from cc4s.engine.checkpoint import load_trained
from cc4s.models import build_model

CLASSES = ["background", "Küche", "c"]
# Other batches and sizes than that of the export, odd and even.
SHAPES = ((1, 3, 33, 40), (3, 3, 97, 65))


def make_checkpoint(path: Path, *words: str) -> Path:
    """Random weights, statistics and gamma."""
    torch.manual_seed(0)
    config = load_config("folder", ["model.backbone=resnet18", "model.width=4", "model.head_channels=16", *words])
    network = build_model(config.model, num_classes=3, in_channels=3)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.2)
    walk = network.head.walk
    assert walk is not None
    nn.init.constant_(walk.gamma, 0.7)
    content = {"model": network.state_dict(), "config": asdict(config), "classes": CLASSES, "stage": "ss"}
    checkpoint.save(path, {**content, "random_walk": True})
    return path


def expected(path: Path, image: Tensor) -> Tensor:
    """Probabilities of the eager network."""
    trained = load_trained(path)
    with torch.no_grad():
        logits = trained.network(normalize(image, trained.config.data)).logits
    return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True).softmax(1)
