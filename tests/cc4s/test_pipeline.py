"""Whole runs: what they leave, that a killed run ends as an unkilled one, that processes agree with one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path

import pytest
from torch import nn

from cc4s.cli import main
from tests.cc4s.run_tools import TINY, command, environment, loss_curve, read_log

STAGES = ("ur", "ss", "ur2", "ss2")


def words(out: Path) -> list[str]:
    return ["run", "synthetic", "--out", str(out), *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = command(*words(out))
    assert result.returncode == 0, result.stderr
    return out


def results(out: Path) -> dict[str, object]:
    """metrics.json without durations."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return value

    return strip(json.loads((out / "metrics.json").read_text()))  # type: ignore[return-value]


def test_a_run_leaves_everything(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert tuple(metrics["stages"]) == STAGES
    for record in (*metrics["stages"].values(), metrics["final"], metrics):
        assert 0 <= record["miou"] <= 1
        assert 0 <= record["pixel_accuracy"] <= 1
        assert set(record["per_class_iou"]) == set(metrics["classes"])
    assert metrics["miou"] == metrics["stages"]["ss2"]["miou"]
    assert 0 < metrics["pseudo_labels"]["coverage"] <= 1
    steps = {(e["stage"], e["step"]) for e in read_log(finished) if e["event"] == "step"}
    assert steps == {(stage, step) for stage in STAGES for step in (1, 2, 3, 4)}
    assert {path.stem for path in (finished / "checkpoints").iterdir()} == set(STAGES)
    assert len(list((finished / "pseudo_labels").glob("*.png"))) == 4
    report = (finished / "report.html").read_text()
    for word in (*metrics["classes"], *STAGES):
        assert word in report


def test_terms_of_each_stage(finished: Path) -> None:
    """The losses of the method's table, and no other, are trained."""
    expected = {
        "ur": {"entropy"},
        "ss": {"entropy", "consistency_kl", "consistency_trace"},
        "ur2": {"entropy", "color"},
        "ss2": {"entropy", "color", "consistency_kl", "consistency_trace"},
    }
    every = {"entropy", "color", "consistency_kl", "consistency_trace"}
    for entry in read_log(finished):
        if entry["event"] == "step":
            assert entry.keys() & every == expected[entry["stage"]]


def test_a_finished_run_is_not_repeated(finished: Path) -> None:
    before = len([e for e in read_log(finished) if e["event"] == "step"])
    assert command(*words(finished)).returncode == 0
    assert len([e for e in read_log(finished) if e["event"] == "step"]) == before


@pytest.mark.slow
def test_kill_and_continue_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """Killed again and again, at different moments, the run ends with the metrics of the uninterrupted one."""
    out = tmp_path / "killed"
    kills = 0
    # Each session is killed as soon as it has added this many lines to the log: in training, between stages, ...
    for lines in (1, 3, 2, 5, 4):
        if (out / "metrics.json").exists():
            break
        known = len(read_log(out)) if (out / "log.jsonl").exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "cc4s", *words(out)], env=environment(), stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().count(b"\n") >= known + lines:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    result = command(*words(out))
    assert result.returncode == 0, result.stderr
    assert kills >= 3
    assert results(out) == results(finished)
    # Same seed, same arithmetic: the losses are equal bit by bit.
    assert loss_curve(out) == loss_curve(finished)
    repeated = [e for e in read_log(out) if e["event"] == "step"]
    # train.checkpoint_every=2: a kill costs at most two steps.
    assert len(repeated) <= len(STAGES) * 4 + 2 * kills


def torchrun(arguments: list[str], processes: int) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "cc4s", *arguments),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_processes_train_like_one(norm: str, tmp_path: Path) -> None:
    """Same global batch, same curve: data, dropout, batch statistics and loss normalisers do not see the processes."""
    options = [
        *TINY,
        f"model.norm={norm}",
        "train.batch_size=4",
        "model.dropout=0.5",
        "stages.0.losses=[entropy,color,consistency]",
    ]
    one = ["train", "synthetic", "--stage", "ur", "--out", str(tmp_path / "one"), *options]
    two = ["train", "synthetic", "--stage", "ur", "--out", str(tmp_path / "two"), *options]
    assert main(one) == 0
    torchrun(two, 2)
    expected, found = loss_curve(tmp_path / "one"), loss_curve(tmp_path / "two")
    assert expected.keys() == found.keys()
    # Sums over processes are in another order: float32 rounding, grown over four steps.
    for place, loss in expected.items():
        assert found[place] == pytest.approx(loss, rel=1e-4), place


def test_accumulation_trains_like_one_batch(tmp_path: Path) -> None:
    """Without batch statistics and dropout, two micro-batches are one batch: normalisers are of the whole step."""
    options = [*TINY, "model.norm=group", "train.batch_size=4", "model.dropout=0", "stages.0.losses=[entropy,color]"]
    for name, accumulate in (("one", 1), ("two", 2)):
        out = str(tmp_path / name)
        assert (
            main(["train", "synthetic", "--stage", "ur", "--out", out, *options, f"train.accumulate={accumulate}"]) == 0
        )
    expected, found = loss_curve(tmp_path / "one"), loss_curve(tmp_path / "two")
    for place, loss in expected.items():
        # The order of float32 sums.
        assert found[place] == pytest.approx(loss, rel=1e-4), place


@pytest.mark.parametrize(
    "option",
    [
        "train.precision=bf16-mixed",
        "train.compile=true",
        "train.ema=0.9",
        "train.optimizer=adamw",
        "kernels=cpu",
        "preset=released",
        "method=full",
        "method=pce",
        "model.head=aspp",
    ],
)
def test_options_run(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ["method=pce"] if option == "model.head=aspp" else []
    if option == "train.compile=true":
        # Inductor compiles for a minute; what is tested is that the compiled network trains and saves.
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    stage = "ur" if extra or option.startswith("method=") else "ss"
    out = tmp_path / "out"
    assert main(["train", "synthetic", "--stage", stage, "--out", str(out), *TINY, option, *extra]) == 0
    assert (out / "checkpoints" / f"{stage}.pt").is_file()


def test_demo_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), *TINY]) == 0
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert list(rows) == ["pce", "ur", "ss", "pseudo_labels", "ur2", "ss2", "full"]
    printed = capsys.readouterr().out
    assert "full supervision" in printed
    assert (tmp_path / "demo" / "report.html").is_file()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    """What is only found when networks and samplers are built is found before the run writes anything."""
    for words in (["train.batch_size=3", "train.accumulate=2"], ["kernels=cuda"], ["model.backbone_weights=none.pth"]):
        out = tmp_path / "out"
        assert main(["run", "synthetic", "--out", str(out), *TINY, *words]) == 2
        assert not (out / "config.yaml").exists()


@pytest.mark.slow
def test_pseudo_labels_are_complete_whatever_the_order_of_processes(finished: Path, tmp_path: Path) -> None:
    """Every process keeps to its share, also where some files are there already."""
    checkpoint = str(finished / "checkpoints" / "ss.pt")
    out = tmp_path / "pseudo"
    torchrun(["pseudo-label", "--checkpoint", checkpoint, "--out", str(out)], 2)
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == sorted(path.name for path in (finished / "pseudo_labels").glob("*.png"))
    for name in names:
        assert (out / name).read_bytes() == (finished / "pseudo_labels" / name).read_bytes()


def test_pseudo_labels_of_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    words = ["pseudo-label", "--checkpoint", str(finished / "checkpoints" / "ss.pt"), "--out", str(tmp_path / "p")]
    assert main(words) == 0
    assert main(words) == 0
    assert main([*words, "--threshold", "0.99"]) == 2
    other = [word.replace("ss.pt", "ur.pt") for word in words]
    assert main(other) == 2


@pytest.mark.slow
def test_demo_under_torchrun(tmp_path: Path) -> None:
    torchrun(["demo", "--out", str(tmp_path / "demo"), *TINY], 2)
    assert (tmp_path / "demo" / "report.html").is_file()
