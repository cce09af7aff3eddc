"""Methods of peers: every term of the table, soft self-labelling, and the comparison."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import cc4s_kernels as ck
from cc4s.cli import main
from cc4s.config import METHODS, PEER_TERMS, SelfLabelConfig, load_config
from cc4s.engine.comparison import training_cost
from cc4s.engine.pipeline import Run
from cc4s.engine.training import StageTraining
from cc4s.losses import TERMS, StageLoss
from cc4s.report.comparison import comparison_figure, comparison_markdown
from cc4s.self_labels import label_energy, soft_self_labels
from tests.cc4s.run_tools import TINY, loss_curve, read_log

# Those that are no rung of the ladder.
PEERS = ("urss", *PEER_TERMS)


def test_every_term_has_a_module_and_a_method() -> None:
    assert set(TERMS) == set(PEER_TERMS)
    assert set(PEERS) <= set(METHODS)
    for name in PEER_TERMS:
        stages = load_config("synthetic", [f"method={name}"]).stages
        assert stages[-1].losses == [name]


def test_urss_is_the_rung_without_pseudo_labels() -> None:
    assert load_config("voc2012", ["method=urss"]).stages == load_config("voc2012", ["method=consistency"]).stages


def tiny_batch() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (2, 3, 33, 33), generator=random, dtype=torch.uint8)
    label = torch.full((2, 33, 33), 255, dtype=torch.uint8)
    label[:, 4, 3:20], label[:, 20, 5:30] = 0, 3
    valid = torch.ones(2, 33, 33, dtype=torch.bool)
    valid[1, :, 28:] = False
    return {"image": rgb.float(), "rgb": rgb, "label": label.where(valid, 255), "valid": valid}


class _Output(torch.nn.Module):
    """A network that returns its parameter."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(2, classes, 5, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, image: torch.Tensor, valid: torch.Tensor | None) -> Any:
        from cc4s.models.segmenter import SegmenterOutput

        features = torch.cat([self.logits, self.logits.square()], 1)
        return SegmenterOutput(self.logits, None, None, features, (5, 5))


@pytest.mark.parametrize("name", PEER_TERMS)
def test_terms(name: str) -> None:
    """Finite, with a gradient, a mean over what is counted: two halves with the count of both add up."""
    config = load_config("synthetic", [f"method={name}", "augment.crop=33", "loss.cross_entropy=0"])
    loss = StageLoss(config, config.stages[-1], 4)
    network, batch = _Output(4), tiny_batch()
    counts = loss.global_counts([batch], [None])
    terms = loss(network, batch, None, counts)
    (gradient,) = torch.autograd.grad(terms["loss"], network.logits)
    assert torch.isfinite(terms[name])
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    weight = getattr(config.loss, name).weight
    torch.testing.assert_close(terms["loss"].detach(), weight * terms[name])
    total = torch.zeros(())
    for b in range(2):
        half = {key: value[b : b + 1] for key, value in batch.items()}
        one = _Output(4)
        one.logits.data = network.logits.data[b : b + 1]
        total = total + loss(one, half, None, counts)[name]
    torch.testing.assert_close(total, terms[name], atol=1e-5, rtol=1e-5)


def test_soft_self_labels() -> None:
    """Scribbles are kept, the energy falls with the steps, and regions of one colour agree more than before."""
    batch = tiny_batch()
    batch["rgb"] = torch.full_like(batch["rgb"], 40)
    batch["rgb"][..., 16:, :] = 200
    prob = torch.randn(2, 4, 33, 33, generator=torch.Generator().manual_seed(2)).softmax(1)
    config = SelfLabelConfig()
    seeds = batch["label"].long()
    seeds = seeds.where(seeds != 255, -1)
    grid = ck.gaussian_grid(batch["rgb"], mask=batch["valid"])
    energies, potts = [], []
    for steps in (0, 2, 5, 10, 20):
        config.steps = steps
        y = soft_self_labels(prob, batch["label"], batch["rgb"], batch["valid"], config)
        torch.testing.assert_close(y.sum(1), torch.ones_like(y[:, 0]))
        known = seeds >= 0
        assert torch.equal(y.argmax(1)[known], seeds[known])
        assert (y.amax(1)[known] == 1).all()
        energies.append(label_energy(y, prob, seeds, batch["valid"], grid, config))
        potts.append(ck.potts(y, grid, relaxation=config.relaxation))
    for before, after in itertools.pairwise(energies):
        assert (after <= before).all()
    assert (energies[3] < 0.9 * energies[0]).all()
    assert (potts[-1] < potts[0]).all()


def test_self_labelling_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("synthetic", [*TINY, "method=selflabel", "train.iterations=3", "train.checkpoint_every=1"])
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    Run(config, straight).execute(report=False)
    step = StageTraining._step

    def interrupted(self: StageTraining, *args: Any) -> Any:
        if self.stage.name == "ss" and args[-1] == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Run(config, stopped).execute(report=False)
    assert max(s for stage, s in loss_curve(stopped) if stage == "ss") == 2
    Run(config, stopped).execute(report=False)
    assert loss_curve(stopped) == loss_curve(straight)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A term of pixels, of regions and of features; each term by itself is tested above."""
    methods = ["selflabel", "kcl", "tel"]
    out = tmp_path / "compare"
    words = ["compare", "synthetic", "--out", str(out), "--methods", ",".join(methods), *TINY, "train.iterations=2"]
    assert main([*words, "report.images=0"]) == 0
    printed = capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())
    assert [run["method"] for run in comparison["runs"]] == methods
    for run in comparison["runs"]:
        assert 0 <= run["miou"] <= 1
        assert run["images_per_second"] > 0
        assert run["peak_memory_mb"] > 0
        assert run["seconds"] > 0
        assert f"| {run['method']} | 1 |" in printed
        steps = [entry for entry in read_log(out / f"{run['method']}-seed0") if entry["event"] == "step"]
        # Four stages of two iterations.
        assert len(steps) == 8
        assert all(entry["loss"] is not None and entry["grad_norm"] > 0 for entry in steps)
        for name in load_config("synthetic", [f"method={run['method']}"]).stages[-1].losses:
            key = "consistency_kl" if name == "consistency" else name
            assert math.isfinite(steps[-1][key])
    assert (out / "comparison.md").read_text() in printed
    assert (out / "comparison.png").stat().st_size > 1000
    # The same command again trains nothing.
    logs = {path: [e for e in read_log(path.parent) if e["event"] == "trained"] for path in out.glob("*/log.jsonl")}
    assert main([*words, "report.images=0"]) == 0
    for path, before in logs.items():
        assert [e for e in read_log(path.parent) if e["event"] == "trained"] == before


def test_costs_and_pages() -> None:
    log = [
        {"event": "trained", "images": 30, "seconds": 2.0, "peak_memory_mb": 100.0},
        {"event": "step", "seconds": 9.0},
        {"event": "trained", "images": 10, "seconds": 3.0, "peak_memory_mb": 150.0},
    ]
    assert training_cost(log) == {"images_per_second": 8.0, "peak_memory_mb": 150.0}
    assert training_cost([]) == {"images_per_second": None, "peak_memory_mb": None}
    runs = [
        {"method": "pce", "seed": 0, "miou": 0.5, **training_cost(log), "seconds": 65},
        {"method": "pce", "seed": 1, "miou": 0.6, **training_cost(log), "seconds": 67},
        {"method": "tel", "seed": 0, "miou": None, **training_cost([]), "seconds": None},
    ]
    comparison = {"dataset": "x", "metric": "miou", "protocol": {"seeds": [0, 1]}, "runs": runs}
    page = comparison_markdown(comparison)
    assert "| pce | 2 | 55.0 ± 7.1 | 8.00 | 150 | 1 min 06 s |" in page
    assert "| tel | 0 | – | – | – | – |" in page
    assert len(comparison_figure(comparison).axes) == 3


def test_bad_comparisons_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--methods", "pce,best"], "--methods: got 'best'"),
        (["--methods", "pce,pce"], "--methods: got ['pce', 'pce'], expected different ones"),
        (["--methods", "pce", "method=potts"], "key method is set by the comparison itself"),
        (["--methods", "pce", "loss.potts.relaxation=best"], "key loss.potts.relaxation"),
        (["--methods", "pce", "loss.selflabel.connectivity=6"], "loss.selflabel.connectivity"),
    ):
        assert main(["compare", "synthetic", "--out", str(tmp_path / "x"), *words]) == 2
        assert reason in capsys.readouterr().err
