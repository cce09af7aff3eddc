"""Recipes, methods and presets: what the paper's table says, and how layers override each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from cc4s.config import BUDGETS, DATASETS, METHODS, Config, from_dict, load_config, override, to_dict, to_yaml
from cc4s.errors import UserError


def test_voc2012_is_the_published_recipe() -> None:
    """Numbers of docs/method.md section 9."""
    config = load_config("voc2012")
    assert (config.train.batch_size, config.train.epochs, config.augment.crop) == (16, 50, 465)
    assert (config.train.momentum, config.train.weight_decay, config.train.poly_power) == (0.9, 5e-4, 0.9)
    assert (config.augment.scale_min, config.augment.scale_max) == (0.5, 2.0)
    assert (config.augment.rotation, config.augment.rotation_prob, config.augment.blur_prob) == (10.0, 0.5, 0.5)
    assert config.model.backbone == "resnet50"
    assert (config.model.head_channels, config.model.key_channels, config.model.dropout) == (512, 0, 0.1)
    assert config.inference.scales == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert (config.inference.long_side, config.inference.window) == (512, 465)
    assert config.inference.stride == pytest.approx(2 / 3)
    assert config.loss.superpixels == 800
    assert config.data.num_classes == 21
    assert [(s.name, s.init, s.labels, s.losses, s.lr) for s in config.stages] == [
        ("ur", "backbone", "scribbles", ["entropy"], 1e-3),
        ("ss", "ur", "scribbles", ["entropy", "consistency"], 1e-4),
        ("ur2", "backbone", "pseudo", ["entropy", "color"], 1e-3),
        ("ss2", "ur2", "pseudo", ["entropy", "color", "consistency"], 1e-4),
    ]


def test_clean_is_the_default_and_released_is_section_8() -> None:
    clean, released = load_config("voc2012"), load_config("voc2012", ["preset=released"])
    assert clean.loss.consistency.normalize == "row"
    assert not clean.loss.consistency.update_statistics
    consistency = released.loss.consistency
    assert (consistency.normalize, consistency.reduction, consistency.kl, consistency.trace) == (
        "column",
        "released",
        30.0,
        30.0,
    )
    assert consistency.update_statistics
    assert consistency.transforms == ["flip", "bands"]
    # A constant rate, ten times the written one.
    assert (released.train.lr_factor, released.train.poly_power) == (10.0, 0.0)


@pytest.mark.parametrize("recipe", DATASETS)
def test_every_recipe_budget_and_method_is_valid(recipe: str) -> None:
    for budget in BUDGETS:
        # Methods touch other keys than budgets and recipes do.
        for method in METHODS if (recipe, budget) == ("synthetic", "full") else ("cc4s", "pce"):
            config = load_config(recipe, [f"budget={budget}", f"method={method}"])
            # Methods compare at one number of iterations.
            assert sum(stage.share for stage in config.stages) == 4
            assert from_dict(to_dict(config), "itself") == config


def test_later_layers_win(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: folder\ntrain: {batch_size: 3, epochs: 7}\nbudgets: {short: {train: {epochs: 2}}}\n")
    assert load_config(str(recipe)).train.epochs == 7
    config = load_config(str(recipe), ["budget=short", "train.lr_factor=2e0", "stages.1.lr=1e-2"], data__root="x")
    assert (config.train.batch_size, config.train.epochs, config.train.lr_factor) == (3, 2, 2.0)
    assert (config.stages[1].lr, config.data.root) == (0.01, "x")
    recipe.write_text("dataset: folder\nstages: [{name: only, losses: []}]\n")
    assert [stage.name for stage in load_config(str(recipe)).stages] == ["only"]


def test_retraining_without_pretrained_weights_goes_on() -> None:
    fresh, on = load_config("synthetic", ["pseudo.fresh_start=true"]), load_config("synthetic")
    assert [stage.init for stage in fresh.stages] == ["backbone", "ur", "backbone", "ur2"]
    assert [stage.init for stage in on.stages] == ["backbone", "ur", "ss", "ur2"]


def test_override_leaves_the_original_alone() -> None:
    config = Config(stages=load_config("folder").stages)
    changed = override(config, ["inference.flip=true", "inference.scales=[0.5,1]"])
    assert (changed.inference.flip, changed.inference.scales) == (True, [0.5, 1.0])
    assert config.inference.flip is False
    assert "flip: true" in to_yaml(changed)


@pytest.mark.parametrize(
    "words",
    [
        ["stages.0.init=nothing"],
        ["stages.0.labels=pseudo"],
        ["stages.0.losses=[entropy,magic]"],
        ["stages.1.random_walk=false"],
        ["model.head=aspp"],
        ["stages.1.name=ur"],
        ["inference.scales=[]"],
        ["augment.scale_min=3"],
        ["data.std=[1,2]"],
    ],
)
def test_inconsistent_configurations_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0].split("=")[0].split(".")[0]):
        load_config("voc2012", words)
