"""The colour term of retraining, on real crops: it pulls, and it costs little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

import cc4s_kernels as ck
from cc4s.config import Config, load_config
from cc4s.data import TrainingSet, open_dataset
from cc4s.losses import StageLoss
from cc4s.models import build_model

from .data_tools import shared

RECIPES = {"acdc": "smoke_acdc", "msrc21": "smoke_msrc21"}


def retraining(recipe: str, work: Path, *words: str, images: int = 4) -> tuple[Config, StageLoss, dict[str, Any]]:
    """The UR2 stage of a recipe, and a batch of it: the masks stand for pseudo-labels."""
    config = load_config(recipe, list(words), data__root=str(shared(RECIPES[recipe])))
    dataset = open_dataset(config.data, seed=0, work=work)
    stage = next(stage for stage in config.stages if stage.name == "ur2")
    loss = StageLoss(config, stage, len(dataset.classes))
    assert loss.needs_superpixels
    crops = TrainingSet(
        dataset.train,
        config.data,
        config.augment,
        seed=0,
        labels="masks",
        num_classes=len(dataset.classes),
        superpixels=config.loss.superpixels,
        compactness=config.loss.compactness,
    )
    return config, loss, default_collate([crops[0, index] for index in range(images)])


def maps(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {"superpixels": batch["superpixels"], "mask": batch["valid"]}


@pytest.mark.parametrize("budget", ["full", "short"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_beside_that_of_the_cross_entropy(recipe: str, budget: str, tmp_path: Path) -> None:
    """Within 0.01 and 10 times, for predictions that are neither flat nor sure, at the weight of the recipe."""
    config, loss, batch = retraining(recipe, tmp_path, f"budget={budget}")
    cells = (config.augment.crop - 1) // 8 + 1
    classes = 4 if recipe == "acdc" else 21
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, classes, cells, cells, generator=generator).requires_grad_()
    terms = loss.scribble.terms(logits, batch["label"], batch["rgb"], **maps(batch))
    norms = [
        float(torch.autograd.grad(weight * term, logits, retain_graph=True)[0].norm())
        for weight, term in ((config.loss.cross_entropy, terms.cross_entropy), (config.loss.color, terms.color))
    ]
    assert 0.01 <= norms[1] / norms[0] <= 10


class Clock:
    """Processor time of this process spent inside a function, over all its calls."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif("cpu" not in ck.backends.available("slic"), reason="the C++ extension is not built")
def test_color_takes_a_tenth_of_a_step_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Superpixels, edge weights and energy, beside the small network of `short`; a larger one makes them cheaper.

    On one thread, as in a loader process: waiting of threads for each other would be counted as work.
    """
    slic = Clock(ck.slic)
    monkeypatch.setattr(ck, "slic", slic)
    config, loss, batch = retraining("msrc21", tmp_path, "budget=short", images=8)
    network = build_model(config.model, num_classes=21, in_channels=3).train()
    regions = Clock(loss.scribble.regions.forward)
    monkeypatch.setattr(loss.scribble.regions, "forward", regions)
    counts = loss.global_counts([batch], [None])

    def step() -> float:
        start = time.process_time()
        loss(network, batch, None, counts)["loss"].backward()
        return time.process_time() - start

    step()
    regions.seconds = 0.0
    whole = slic.seconds + step()
    # The backward of the energy costs as much as its forward at most.
    assert slic.seconds + 2 * regions.seconds <= 0.1 * whole


def test_no_preprocessing_is_stored(tmp_path: Path) -> None:
    """The crop's own superpixels, computed after the augmentation: another epoch has others."""
    config, _, _ = retraining("msrc21", tmp_path, "budget=smoke", images=1)
    dataset = open_dataset(config.data, seed=0, work=tmp_path)
    crops = TrainingSet(
        dataset.train, config.data, config.augment, seed=0, labels="masks", num_classes=21, superpixels=100
    )
    before = sorted(tmp_path.rglob("*"))
    for epoch in (0, 1):
        sample = crops[epoch, 0]
        expected = ck.slic(sample["rgb"][None], 100, mask=sample["valid"][None])
        assert torch.equal(sample["superpixels"], expected[0])
    assert not torch.equal(crops[0, 0]["superpixels"], crops[1, 0]["superpixels"])
    assert sorted(tmp_path.rglob("*")) == before
