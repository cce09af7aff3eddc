"""A whole self-supervised training step holds no tensor of all pairs."""

from __future__ import annotations

import json

import pytest

import cc4s_kernels as ck
from tests.peak_memory import printed_by

# 1017 pixels give 128 x 128 = 16,384 positions: a float32 matrix of all pairs is 1 GiB.
STEP = """
import json, random
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from cc4s.config import load_config
from cc4s.losses import StageLoss
from cc4s.models import build_model
from cc4s.transforms import draw
from tests.peak_memory import grown_mb

class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out

crop = 1017
config = load_config("synthetic", [f"augment.crop={crop}", "model.width=4", "model.head_channels=16"])
network = build_model(config.model, num_classes=6, in_channels=3).train()
loss = StageLoss(config, config.stages[1], 6)
batch = {
    "image": torch.randn(1, 3, crop, crop),
    "rgb": torch.randint(0, 256, (1, 3, crop, crop), dtype=torch.uint8),
    "label": torch.randint(0, 6, (1, crop, crop), dtype=torch.uint8),
    "valid": torch.ones(1, crop, crop, dtype=torch.bool),
    "superpixels": torch.zeros(1, crop, crop, dtype=torch.int32),
}
transform = draw(config.loss.consistency, crop, 8, random.Random(1))
found = {}
def step():
    with Largest() as seen:
        terms = loss(network, batch, transform, loss.global_counts([batch], [transform]))
        terms["loss"].backward()
    found.update(elements=seen.elements, kl=float(terms["consistency_kl"]))
print(json.dumps({"mb": grown_mb(step), **found}))
"""


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in ck.backends.available("random_walk"), reason="the C++ extension is not built")
def test_a_training_step_at_16384_positions() -> None:
    found = json.loads(printed_by(STEP).splitlines()[-1])
    assert found["kl"] == found["kl"]
    # The largest tensor is the image, 3 x 1017^2; a matrix of all pairs has 268 million elements.
    assert found["elements"] == 3 * 1017**2
    # Activations of the network and libraries included, twice what was measured; one matrix would be 1024 MB.
    assert found["mb"] < 300
