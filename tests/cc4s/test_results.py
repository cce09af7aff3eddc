"""The search, the inspection, and the pages of docs/results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cc4s.config import load_config, search_space
from cc4s.data import StepSampler, TrainingSet, open_dataset
from cc4s.engine import checkpoint, tuning
from cc4s.engine.inspection import inspect_runs
from cc4s.engine.runtime import Runtime, derive_seed
from cc4s.errors import UserError
from cc4s.report import robustness_curves, tuning_markdown
from tests.cc4s.data_tools import make_folder
from tests.cc4s.run_tools import TINY
from tests.cc4s.test_ladder import SMALL, climb
from tools import results

# What the fake training is best at.
BEST = {"loss.entropy": 0.1, "loss.color": 1.0, "loss.consistency.kl": 0.1, "pseudo.threshold": 0.7}


class FakeRun:
    """A training whose score falls with the distance from the best weights."""

    calls: list[tuple[Any, float]]

    def __init__(self, config: Any, out: Path, runtime: Runtime, cache: Any) -> None:
        self.config, self.runtime = config, runtime
        assert config.data.eval_list == "val"
        assert config.method == "cc4s"

    def execute(self) -> dict[str, Any]:
        config = self.config
        FakeRun.calls.append((config, config.train.iterations))
        loss = config.loss
        found = [loss.entropy, loss.color, loss.consistency.kl, config.pseudo.threshold]
        distance = sum(abs(np.log(a / b)) for a, b in zip(found, BEST.values(), strict=True))
        score = float(np.exp(-distance))
        return {"miou": score, "per_class_iou": {"a": score}, "pseudo_labels": {"coverage": 0.5, "miou": 0.5}}


def search(out: Path, **options: Any) -> dict[str, Any]:
    words = [*TINY, "train.iterations=100"]
    return tuning.run_tuning("synthetic", out, **{"trials": 4, "seed": 3, "overrides": words, **options})


def test_search_halves_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Run", FakeRun)
    FakeRun.calls = []
    found = search(tmp_path / "out")
    # All four at half the budget; the better half, and the recipe, at all of it.
    lengths = [length for _, length in FakeRun.calls]
    assert lengths[:4] == [50] * 4
    first = {run["trial"]: run["miou"] for run in found["runs"] if run["share"] == 0.5}
    better = sorted(first, key=lambda trial: -first[trial])[:2]
    assert lengths[4:] == [100] * len({0, *better})
    assert {run["trial"] for run in found["runs"] if run["share"] == 1} == {0, *better}
    assert found["best"] == better[0]
    assert found["runs"][0]["values"] == {}
    for run in found["runs"][1:4]:
        assert run["values"].keys() == search_space().keys()
        assert 0.01 <= run["values"]["loss.entropy"] <= 1
        assert run["values"]["loss.consistency.normalize"] in ("row", "column")
    # Once more: nothing is trained, the same is said.
    count = len(FakeRun.calls)
    assert search(tmp_path / "out") == found
    assert len(FakeRun.calls) == count
    page = (tmp_path / "out" / "tuning.md").read_text()
    assert page == tuning_markdown(found)
    assert f"Chosen: trial {found['best']}." in page
    with pytest.raises(UserError, match="another search"):
        search(tmp_path / "out", seed=4)
    with pytest.raises(UserError, match=r"loss\.color is set by the search"):
        search(tmp_path / "out", overrides=["loss.color=1"])
    with pytest.raises(UserError, match=r"data\.eval_list"):
        search(tmp_path / "out", overrides=["data.eval_list=test"])


def test_draws_are_a_function_of_seed_and_number() -> None:
    space = search_space()
    assert tuning.draw_trial(space, 1, 0) == {}
    assert tuning.draw_trial(space, 1, 2) == tuning.draw_trial(space, 1, 2)
    assert tuning.draw_trial(space, 1, 2) != tuning.draw_trial(space, 2, 2)
    drawn = [tuning.draw_trial(space, 0, trial)["loss.color"] for trial in range(1, 400)]
    # Uniform in the logarithm over [0.1, 10]: a half below 1; 3 standard deviations of 399 draws are 0.075.
    assert abs(np.mean(np.array(drawn) < 1.0) - 0.5) < 0.075
    assert 0.1 <= min(drawn) <= max(drawn) <= 10


def test_inspection(tmp_path: Path) -> None:
    """Gradient norms against autograd on the same crops; terms without a walk are left out for pce."""
    data = make_folder(tmp_path / "data")
    words = [*SMALL, "model.dropout=0", "model.norm=group", "train.iterations=1"]
    climb(tmp_path / "out", data, rungs=["pce", "consistency"], overrides=words)
    page = inspect_runs([tmp_path / "out"], tmp_path / "found")
    rows = json.loads((tmp_path / "found.json").read_text())
    assert set(rows) == {"pce-seed0", "consistency-seed0"}
    assert set(rows["pce-seed0"]["values"]) == {"cross_entropy", "entropy", "color"}
    row = rows["consistency-seed0"]
    assert row["weights"] == {
        "cross_entropy": 1.0,
        "entropy": 1.0,
        "color": 0.0,
        "consistency_kl": 1.0,
        "consistency_trace": 1.0,
    }
    assert row["gradient_norms"]["consistency_kl"] > 0
    assert row["walk_share"] >= 0
    assert "consistency-seed0" in page
    assert (tmp_path / "found.png").is_file()

    # The crops of the stage, cross-entropy on the upsampled logits.
    trained = checkpoint.load_trained(tmp_path / "out" / "pce-seed0" / "checkpoints" / "ss2.pt")
    network, config = trained.network.train(), trained.config
    dataset = open_dataset(config.data, seed=0, work=None)
    norms, values = [], []
    seed = derive_seed(0, "ss2", "data")
    samples = TrainingSet(dataset.train, config.data, config.augment, seed=seed, labels="scribbles", num_classes=3)
    # As many steps as the stage has.
    for batch in StepSampler(len(samples), config.train.batch_size, seed=seed, total_steps=1):
        crops = [samples[place] for place in batch]
        image, label, valid = (torch.stack([crop[key] for crop in crops]) for key in ("image", "label", "valid"))
        logits = network(image, valid).logits
        logits = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=True)
        loss = F.cross_entropy(logits, label.long(), ignore_index=255)
        gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
        values.append(float(loss.detach()))
    # float32 sums in another order.
    assert rows["pce-seed0"]["values"]["cross_entropy"] == pytest.approx(np.mean(values), rel=1e-4)
    assert rows["pce-seed0"]["gradient_norms"]["cross_entropy"] == pytest.approx(np.mean(norms), rel=1e-3)
    with pytest.raises(UserError, match="no finished run"):
        inspect_runs([data], tmp_path / "found")


def ladder(dataset: str, metric: str) -> dict[str, Any]:
    scores = {"pce": (0.5, 0.6), "cc4s": (0.8, 0.8), "full": (0.9, 0.9)}
    runs = [{"rung": r, "seed": s, metric: v} for r, values in scores.items() for s, v in enumerate(values)]
    return {"dataset": dataset, "metric": metric, "protocol": {}, "runs": runs}


def test_readme_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ladder"):
        results.readme_block(tmp_path)
    (tmp_path / "acdc_ladder.json").write_text(json.dumps(ladder("acdc", "dice")))
    (tmp_path / "msrc21_ladder.json").write_text(json.dumps({**ladder("msrc21", "miou"), "runs": []}))
    block = results.readme_block(tmp_path)
    # (0.8 - 0.55) / (0.9 - 0.55)
    assert "| ACDC, human scribbles (Dice per volume) | 55.0 ± 7.1 | 80.0 ± 0.0 | 90.0 ± 0.0 | 71 % |" in block
    assert "MSRC" not in block
    readme = (results.ROOT / "README.md").read_text()
    new = results.with_block(readme, block)
    assert block in new
    assert "make demo`: image" not in new
    # Renewed in place.
    other = block.replace("71 %", "72 %")
    assert results.with_block(new, other) == new.replace(block, other)


def test_readme_has_the_numbers_of_the_results() -> None:
    text = (results.ROOT / "README.md").read_text()
    if results.START in text:
        assert results.with_block(text, results.readme_block()) == text
    else:
        assert "docs/results/demo.png" in text


def test_pages_are_those_of_the_committed_json(tmp_path: Path) -> None:
    """Also with a made-up ladder, so that there is always one."""
    (tmp_path / "made_ladder.json").write_text(json.dumps(ladder("acdc", "dice")))
    for file in results.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    results.write_pages(tmp_path)
    assert "| full supervision | 2 | 90.0 ± 0.0 |" in (tmp_path / "made_ladder.md").read_text()
    for page in tmp_path.glob("*.md"):
        if page.stem != "made_ladder":
            assert page.read_text() == (results.RESULTS / page.name).read_text(), page.name


def test_robustness_curves() -> None:
    runs = [
        {"rung": "pce", "seed": seed, "dice": 0.5 + seed / 10, kind: ratio}
        for seed in (0, 1)
        for kind, ratio in (("shrink", 0.0), ("drop", 0.5))
    ]
    assert robustness_curves({"metric": "dice", "runs": [*runs, {"rung": "pce", "seed": 0, "dice": 0.9}]}) == {
        "shrink": {"pce": {0.0: [0.5, 0.6]}},
        "drop": {"pce": {0.5: [0.5, 0.6]}},
    }


@pytest.mark.parametrize("job", [*results.CPU, *results.GPU], ids=lambda job: f"{job.name}-{job.seeds}")
def test_jobs_are_valid(job: results.Job) -> None:
    """Every job's configuration loads, and jobs of one file have one configuration."""
    config = load_config(job.dataset, list(job.words))
    others = [other for other in (*results.CPU, *results.GPU) if other.name == job.name]
    assert {other.words for other in others} == {job.words}
    assert config.data.eval_list in ("", "test")
