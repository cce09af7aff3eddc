"""A seeded search for the weights of the losses, on the validation split alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cc4s.config import Config, load_config, search_space, to_dict
from cc4s.engine.pipeline import Run
from cc4s.engine.runfolder import first_difference
from cc4s.engine.runtime import Runtime
from cc4s.engine.stagecache import StageCache
from cc4s.errors import OutOfTime, UserError
from cc4s.files import atomic_write_json, check_output_file
from cc4s.report.tuning import write_tuning

HALVING = 2
ROUNDS = 2


def draw_trial(space: dict[str, dict[str, Any]], seed: int, trial: int) -> dict[str, Any]:
    """The values of a trial, a function of the seed and its number; trial 0 is the recipe as it stands."""
    if trial == 0:
        return {}
    rng = np.random.default_rng((seed, trial))
    values: dict[str, Any] = {}
    for key, how in space.items():
        (kind, range_) = next(iter(how.items()))
        if kind == "choice":
            values[key] = range_[int(rng.integers(len(range_)))]
            continue
        low, high = range_
        share = float(rng.random())
        value = math.exp(math.log(low) + share * math.log(high / low)) if kind == "log" else low + share * (high - low)
        # Two digits: what will stand in a recipe.
        values[key] = float(f"{value:.2g}")
    return values


def run_tuning(
    recipe: str,
    out: Path,
    *,
    trials: int,
    seed: int,
    results: Path | None = None,
    deadline: float | None = None,
    overrides: Sequence[str] = (),
    **fixed: Any,
) -> dict[str, Any]:
    """Random search with successive halving over the space of recipes/tuning.yaml.

    All trials train the full method for half of the budget, and the better half of them for all of it; the
    recipe's own values come along to the end. The score is that of the last stage on
    `val`: volume Dice where there are volumes, else mIoU. The test split is never opened. Every finished training is
    recorded at once, and never repeated.

    Args:
        recipe, overrides, fixed: as in `load_config`. out: folder of the runs. trials: how many, with the recipe's own.
        seed: of the draws and of the training. results: the JSON file; `out`/tuning.json if None.
        deadline: as in `run_ladder`.

    Returns:
        The content of the JSON file, with `best` once the search is complete; {} on other processes.

    Raises:
        UserError: no trial, results of another search, or bad input of a run.
    """
    if trials < 2:
        raise UserError(f"--trials: got {trials}, expected at least 2")
    space = search_space()
    for word in overrides:
        key = word.split("=")[0]
        if key in ("method", "preset", "seed", "data.eval_list") or key in space:
            raise UserError(f"command line: key {key} is set by the search itself")
    file = results or out / "tuning.json"
    check_output_file(file, "--results")
    fixed |= {"seed": seed, "method": "cc4s", "data__eval_list": "val"}
    base = load_config(recipe, list(overrides), **fixed)
    search = _open_results(file, recipe, base, space, seed, trials)
    cache = StageCache(out / "stages")
    chosen = list(range(trials))
    for round_ in range(ROUNDS):
        share = HALVING ** (round_ - ROUNDS + 1)
        for trial in chosen:
            if _score(search, trial, share) is not None:
                continue
            values = draw_trial(space, seed, trial)
            config = load_config(recipe, _words(overrides, base, share, values), **fixed)
            runtime = Runtime(config, deadline)
            try:
                if runtime.out_of_time():
                    return search if runtime.is_main else {}
                result = Run(config, out / f"trial{trial}-{share:g}", runtime, cache).execute()
            except OutOfTime:
                return search if runtime.is_main else {}
            volumes = "volume_dice" in result
            search["metric"] = "dice" if volumes else "miou"
            search["runs"].append(
                {
                    "trial": trial,
                    "share": share,
                    "values": values,
                    search["metric"]: result["volume_dice" if volumes else "miou"],
                    "per_class": result["per_class_volume_dice" if volumes else "per_class_iou"],
                    "pseudo_labels": {key: result["pseudo_labels"].get(key) for key in ("coverage", "miou")},
                }
            )
            if runtime.is_main:
                atomic_write_json(file, search)
                write_tuning(file)
        ranked = sorted(chosen, key=lambda trial: -(_score(search, trial, share) or 0.0))
        # The recipe's own values are what a winner has to beat.
        chosen = sorted({0, *ranked[: max(1, len(chosen) // HALVING)]})
    search["best"] = ranked[0]
    atomic_write_json(file, search)
    write_tuning(file)
    return search


def _open_results(
    file: Path, recipe: str, base: Config, space: dict[str, Any], seed: int, trials: int
) -> dict[str, Any]:
    config = to_dict(base)
    del config["data"]["root"], config["device"], config["kernels"], config["report"]
    fresh = {"dataset": recipe, "metric": "miou", "split": "val", "seed": seed, "trials": trials, "space": space}
    fresh |= {"config": config, "runs": []}
    if not file.is_file():
        return fresh
    try:
        found = json.loads(file.read_text("utf-8"))
        same = first_difference(found["config"], config) is None
        same = same and all(found[key] == fresh[key] for key in ("seed", "trials", "space"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not results of a search; choose another file") from error
    if not same:
        raise UserError(f"{file}: holds another search; choose another file or the same settings")
    return found


def _words(overrides: Sequence[str], base: Config, share: float, values: dict[str, Any]) -> list[str]:
    """The command line's words, the length of this round, and the trial's values."""
    key = "iterations" if base.train.iterations else "epochs"
    length = max(1, round(share * getattr(base.train, key)))
    return [*overrides, f"train.{key}={length}", *(f"{name}={value}" for name, value in values.items())]


def _score(search: dict[str, Any], trial: int, share: float) -> float | None:
    for run in search["runs"]:
        if (run["trial"], run["share"]) == (trial, share):
            return run[search["metric"]] or 0.0
    return None
