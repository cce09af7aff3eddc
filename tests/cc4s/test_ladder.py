"""The ladder: what rungs share, what is never repeated, what stops and goes on, and poorer scribbles."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cc4s.cli import main
from cc4s.config import Config, load_config
from cc4s.data import open_dataset, read_index_png
from cc4s.engine.ladder import LADDER, RUNGS, Scribbles, run_ladder
from cc4s.engine.runfolder import RunFolder
from cc4s.engine.stagecache import StageCache, dataset_digest
from cc4s.errors import UserError
from tests.cc4s.data_tools import make_folder
from tests.cc4s.run_tools import TINY

SMALL = [*TINY, "train.iterations=2", "train.log_every=1", "report.images=0"]


def climb(out: Path, data: Path | None = None, **options: Any) -> dict[str, Any]:
    recipe = "synthetic" if data is None else "folder"
    fixed = {} if data is None else {"data__root": str(data)}
    return run_ladder(recipe, out, **{"seeds": [0], "overrides": SMALL, **fixed, **options})


def numbers(ladder: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in run.items() if key != "seconds"} for run in ladder["runs"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two rungs that share stages, and one seed."""
    out = tmp_path_factory.mktemp("ladder") / "whole"
    return out, climb(out, rungs=["pseudo", "cc4s"])


def test_rungs_share_stages(whole: tuple[Path, dict[str, Any]]) -> None:
    out, ladder = whole
    assert ladder["complete"]
    assert [(run["rung"], run["seed"]) for run in ladder["runs"]] == [("pseudo", 0), ("cc4s", 0)]
    # Eight stages, two of them twice.
    assert len(list((out / "stages").iterdir())) == 6
    first, second = (RunFolder(out / f"{rung}-seed0") for rung in ("pseudo", "cc4s"))
    for stage in ("ur", "ss", "ur2", "ss2"):
        assert first.checkpoint(stage).samefile(second.checkpoint(stage)) == (stage in ("ur", "ss"))
    scores = [run["stages"] for run in ladder["runs"]]
    assert [scores[0][stage] for stage in ("ur", "ss")] == [scores[1][stage] for stage in ("ur", "ss")]
    # The curves and the time of a shared stage are in both runs.
    steps = [[e["step"] for e in run.read_log() if e["event"] == "step"] for run in (first, second)]
    assert steps[0] == steps[1] == [1, 2] * 4
    assert second.seconds() > sum(
        e["seconds"] for e in first.read_log() if e.get("stage") == "ur" and e["event"] == "evaluate"
    )


def test_a_shared_run_equals_one_of_its_own(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """cc4s alone, stopped before the first stage and within the third, ends with the numbers it has beside pseudo."""
    _, ladder = whole
    alone = climb(tmp_path / "alone", rungs=["cc4s"], deadline=0.0)
    calls = 0
    while not alone["complete"]:
        assert alone["runs"] == []
        alone = _slice(tmp_path / "alone")
        calls += 1
    assert calls == 2
    assert numbers(alone) == numbers({"runs": ladder["runs"][1:]})


def _slice(out: Path) -> dict[str, Any]:
    """A call whose time is over at the first look inside a stage."""
    import cc4s.engine.ladder as module

    class Impatient(module.Runtime):
        looks = 0

        def out_of_time(self) -> bool:
            # One look at the ladder, one before each stage, one after each step but the last.
            self.looks += 1
            return self.looks > 6

    original, module.Runtime = module.Runtime, Impatient  # type: ignore[misc]
    try:
        return climb(out, rungs=["cc4s"])
    finally:
        module.Runtime = original  # type: ignore[misc]


def test_what_stands_in_the_results_is_not_repeated(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Even where the folders of the runs are gone; other settings are refused."""
    out, ladder = whole
    results = tmp_path / "acdc_ladder.json"
    shutil.copy(out / "ladder.json", results)
    again = climb(tmp_path / "elsewhere", rungs=["cc4s", "pseudo"], results=results)
    assert again["runs"] == ladder["runs"]
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UserError, match=r"another configuration \(loss.color"):
        climb(tmp_path / "elsewhere", results=results, overrides=[*SMALL, "loss.color=0.125"])
    results.write_text("{}")
    with pytest.raises(UserError, match="not results of a ladder"):
        climb(tmp_path / "elsewhere", results=results)


def keys(config: Config, dataset: Any, tmp_path: Path) -> dict[str, str]:
    return StageCache(tmp_path).keys(config, dataset)


def test_the_hash_is_of_what_determines_a_stage(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")

    def config(*words: str) -> Config:
        return load_config("folder", [*SMALL, *words], data__root=str(data))

    dataset = open_dataset(config().data, seed=0, work=None)
    base = keys(config(), dataset, tmp_path)
    assert len(set(base.values())) == 4

    def changed(*words: str) -> set[str]:
        return {stage for stage, key in keys(config(*words), dataset, tmp_path).items() if key != base[stage]}

    every = {"ur", "ss", "ur2", "ss2"}
    assert changed("train.workers=3", "report.images=9", "train.log_every=7") == set()
    # A stage depends on its own weights, and on those of the stages before it.
    assert changed("loss.color=0.125") == {"ur2", "ss2"}
    assert changed("loss.consistency.kl=0.125") == every - {"ur"}
    assert changed("pseudo.threshold=0.125") == {"ur2", "ss2"}
    assert changed("stages.3.lr=0.5") == {"ss2"}
    for word in ("seed=1", "model.width=5", "loss.entropy=0.125"):
        assert changed(word) == every, word
    # The content of the files counts, not where they lie.
    before = dataset_digest(dataset)
    moved = data.rename(tmp_path / "moved")
    dataset = open_dataset(replace(config().data, root=str(moved)), seed=0, work=None)
    assert dataset_digest(dataset) == before
    dataset.train[0].scribble.write_bytes(dataset.train[1].scribble.read_bytes())
    assert dataset_digest(dataset) != before


def test_methods_differ_by_one_part() -> None:
    """All rungs have one schedule; each differs from the one below in what its name says."""
    stages = {rung: load_config("acdc", **RUNGS[rung]).stages for rung in LADDER}  # type: ignore[arg-type]
    for rung in LADDER:
        assert [(s.name, s.lr, s.share) for s in stages[rung]] == [(s.name, s.lr, s.share) for s in stages["cc4s"]]

    def part(rung: str, key: str) -> list[Any]:
        return [getattr(stage, key) for stage in stages[rung]]

    same = {
        ("pce", "rw"): ("labels", "losses"),
        ("rw", "entropy"): ("labels", "random_walk"),
        ("entropy", "consistency"): ("labels", "random_walk"),
        ("consistency", "pseudo"): ("losses", "random_walk"),
        ("pseudo", "cc4s"): ("labels", "random_walk"),
        ("rw", "full"): ("losses", "random_walk"),
    }
    for (below, above), shared in same.items():
        for key in ("labels", "losses", "random_walk"):
            assert (part(below, key) == part(above, key)) == (key in shared), (below, above, key)


def test_poorer_scribbles(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    scribbles = [Scribbles("shrink", 1.0), Scribbles("drop", 0.0), Scribbles("shrink", 0.0)]
    out = tmp_path / "poorer"
    ladder = climb(out, data, rungs=["pce"], scribbles=scribbles)
    assert [(run.get("shrink"), run.get("drop")) for run in ladder["runs"]] == [(1.0, None), (None, 0.0), (0.0, None)]
    # Strokes at their whole length, and none dropped: the same scribbles, the same stages.
    scores = [run["miou"] for run in ladder["runs"]]
    assert scores[0] == scores[1]
    assert len(list((out / "stages").iterdir())) == 2 * 4
    points = [read_index_png(path) for path in sorted((out / "scribbles" / "shrink0-seed0").iterdir())]
    strokes = [read_index_png(data / "scribbles" / path.name) for path in sorted((data / "scribbles").iterdir())]
    for few, many in zip(points, strokes, strict=True):
        assert 0 < (few != 255).sum() < (many != 255).sum()
        assert (few[few != 255] == many[few != 255]).all()
    page = (out / "ladder.md").read_text()
    assert "| rung | 1 | 0 |" in page
    assert (out / "ladder.png").is_file()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", "synthetic", "--out", str(tmp_path / "out"), "--rungs", "pce", *SMALL]
    assert main([*words, "--minutes", "0"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert main([*words, "--rungs", "none"]) == 2
    assert main([*words, "method=pce"]) == 2
    assert main([*words, "--results", str(tmp_path)]) == 2
    assert json.loads(json.dumps(LADDER)) == [
        *("pce", "rw", "entropy", "consistency", "pseudo", "cc4s", "full", "released"),
    ]
