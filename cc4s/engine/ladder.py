"""The ablation ladder: the method rung by rung, over seeds and scribbles, at one budget (METHOD 9)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cc4s.config import Config, load_config, to_dict
from cc4s.data import drop_folder, open_dataset, shrink_folder
from cc4s.data.dataset import GENERATE
from cc4s.engine.pipeline import Run
from cc4s.engine.runfolder import first_difference
from cc4s.engine.runtime import Runtime
from cc4s.engine.stagecache import StageCache
from cc4s.errors import OutOfTime, UserError
from cc4s.files import atomic_write_json, check_output_file
from cc4s.report.ladder import write_ladder

# What makes each rung, over the recipe. Beside the ladder: what the authors' code does; their baseline, which has
# another head; and the full method with one part taken out.
RUNGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("pce", "rw", "entropy", "consistency", "pseudo", "cc4s", "full")},
    "released": {"method": "cc4s", "preset": "released"},
    "aspp": {"method": "pce", "model__head": "aspp"},
    "without_entropy": {"method": "cc4s", "loss__entropy": 0.0},
    "without_kl": {"method": "cc4s", "loss__consistency__kl": 0.0},
    "without_trace": {"method": "cc4s", "loss__consistency__trace": 0.0},
}
LADDER = ("pce", "rw", "entropy", "consistency", "pseudo", "cc4s", "full", "released")

_OWN_KEYS = ("method", "preset", "seed", "model.head", "stages")


@dataclass(frozen=True)
class Scribbles:
    """How the scribbles of a run are made poorer: every stroke shrunk to a share of its length, or some dropped."""

    kind: str = ""
    ratio: float = 0.0

    @property
    def name(self) -> str:
        return f"-{self.kind}{self.ratio:g}" if self.kind else ""


def run_ladder(
    recipe: str,
    out: Path,
    *,
    seeds: Sequence[int],
    rungs: Sequence[str] | None = None,
    scribbles: Sequence[Scribbles] = (Scribbles(),),
    results: Path | None = None,
    deadline: float | None = None,
    overrides: Sequence[str] = (),
    **fixed: Any,
) -> dict[str, Any]:
    """Trains and evaluates every rung with every seed, and writes the results as JSON, a table and a plot.

    All runs are folders in `out`; stages that runs share are trained once (`out`/stages, see `StageCache`). A run that
    stands in `results` is not repeated, whether its folder is still there or not; the files are renewed after every
    run. Seeds are the outer loop: what is there early is the whole ladder with the first seed.

    Args:
        recipe: as in `load_config`. out: the ladder's folder. seeds: one run per rung and seed.
        rungs: names of `RUNGS`, in the order to run them; None runs those of `LADDER`.
        scribbles: one run more per rung and seed for each.
        results: the JSON file, with the table and the plot beside it; `out`/ladder.json if None.
        deadline: a moment of `time.monotonic` after which nothing goes on; None has none.
        overrides, fixed: as in `load_config`, for every rung.

    Returns:
        The content of the JSON file, and `complete`: whether everything asked for stands in it; {} on other processes
        than the main one.

    Raises:
        UserError: unknown rung, results of another configuration, or bad input of a run.
    """
    chosen = list(LADDER if rungs is None else rungs)
    for rung in chosen:
        if rung not in RUNGS:
            raise UserError(f"--rungs: got {rung!r}, expected names of {', '.join(RUNGS)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds: got {list(seeds)}, expected different numbers, at least one")
    for word in overrides:
        if word.split("=")[0] in _OWN_KEYS:
            raise UserError(f"command line: key {word.split('=')[0]} is set by the ladder itself")
    file = results or out / "ladder.json"
    check_output_file(file, "--results")
    base = load_config(recipe, list(overrides), **fixed)
    ladder = _open_results(file, recipe, base)
    todo = [
        (change, seed, rung)
        for seed in seeds
        for change in scribbles
        for rung in chosen
        if not any(_place(run) == (rung, seed, change) for run in ladder["runs"])
    ]
    configs = {
        (change, seed, rung): load_config(recipe, list(overrides), seed=seed, **_rung(rung, base), **fixed)
        for change, seed, rung in todo
    }
    cache = StageCache(out / "stages")
    complete = True
    is_main = True
    for (change, seed, rung), config in configs.items():
        runtime = Runtime(config, deadline)
        is_main = runtime.is_main
        if runtime.out_of_time():
            complete = False
            break
        if change.kind:
            config.data.scribbles = str(_poorer_scribbles(config, change, out / "scribbles", runtime))
        run = Run(config, out / f"{rung}-seed{seed}{change.name}", runtime, cache)
        try:
            result = run.execute()
        except OutOfTime:
            complete = False
            break
        if is_main:
            ladder["runs"].append(_record(rung, seed, change, result, run))
            ladder["metric"] = "dice" if "volume_dice" in result else "miou"
            ladder["protocol"] = _protocol(config, result, ladder["runs"])
            atomic_write_json(file, ladder)
            write_ladder(file, ladder)
    return {**ladder, "complete": complete} if is_main else {}


def _rung(rung: str, base: Config) -> dict[str, Any]:
    """What makes a rung.

    The released constant rate is the first rate of the other rungs: networks from scratch, or another optimiser, need
    another factor than the authors' 10.
    """
    made = dict(RUNGS[rung])
    if made.get("preset") == "released":
        made["train__lr_factor"] = base.train.lr_factor
    return made


def _open_results(file: Path, recipe: str, config: Config) -> dict[str, Any]:
    """The results so far.

    Raises:
        UserError: they come from another configuration.
    """
    values = _common(config)
    ladder: dict[str, Any] = {"dataset": recipe, "metric": "miou", "protocol": {}, "config": values, "runs": []}
    if not file.is_file():
        return ladder
    try:
        found = json.loads(file.read_text("utf-8"))
        difference = first_difference(found["config"], values)
        ladder |= found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not results of a ladder; choose another file") from error
    if difference is not None:
        key, old, new = difference
        raise UserError(
            f"{file}: holds results of another configuration ({key} was {old!r}, now {new!r}); choose another file or"
            " the same settings"
        )
    return ladder


def _common(config: Config) -> dict[str, Any]:
    """The configuration that all runs share: without what makes the rungs, and without paths."""
    values = to_dict(config)
    for key in ("method", "preset", "seed", "stages", "device", "kernels", "report"):
        del values[key]
    del values["data"]["root"], values["model"]["head"]
    return values


def _place(run: dict[str, Any]) -> tuple[str, int, Scribbles]:
    """Which run an entry of the results is."""
    kind = next((kind for kind in ("shrink", "drop") if kind in run), "")
    return run["rung"], run["seed"], Scribbles(kind, run[kind]) if kind else Scribbles()


def _poorer_scribbles(config: Config, change: Scribbles, out: Path, runtime: Runtime) -> Path:
    """The folder of the changed scribbles, made once per ladder (and seed, where scribbles are generated)."""
    seed = config.seed if config.data.scribbles == GENERATE or change.kind == "drop" else 0
    folder = out / f"{change.kind}{change.ratio:g}-seed{seed}"

    def make() -> None:
        dataset = open_dataset(config.data, seed=seed, work=out / f"all-seed{seed}", splits=("train",), progress=True)
        source = dataset.scribble_folder
        if change.kind == "shrink":
            shrink_folder(source, folder, change.ratio, classes=dataset.classes, progress=True)
        else:
            drop_folder(source, folder, change.ratio, seed, classes=dataset.classes, progress=True)

    runtime.on_main(make)
    return folder.resolve()


def _record(rung: str, seed: int, change: Scribbles, result: dict[str, Any], run: Run) -> dict[str, Any]:
    """What a run adds to the results: Dice per volume where the data has volumes, and mIoU; of every stage too."""
    volumes = "volume_dice" in result
    record: dict[str, Any] = {"rung": rung, "seed": seed}
    if change.kind:
        record[change.kind] = change.ratio
    if volumes:
        record["dice"] = result["volume_dice"]
    record["miou"] = result["miou"]
    record["per_class"] = result["per_class_volume_dice" if volumes else "per_class_iou"]
    record["stages"] = {name: stage["volume_dice" if volumes else "miou"] for name, stage in result["stages"].items()}
    if "pseudo_labels" in result:
        keys = ("coverage", "pixel_accuracy", "miou", "dice")
        record["pseudo_labels"] = {key: result["pseudo_labels"].get(key) for key in keys}
    record["seconds"] = run.folder.seconds()
    record["machine"] = _machine(run.runtime)
    return record


def _machine(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        where = torch.cuda.get_device_name(runtime.device)
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__.partition('+')[0]}"


def _protocol(config: Config, result: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The protocol in words a reader of the table needs; `config` has all of it."""
    model, train = config.model, config.train
    network = f"{model.backbone}, width {model.width}"
    if model.backbone != "unet":
        network += f", head of {model.head_channels} channels"
    rates = " and ".join(f"{stage.lr * train.lr_factor:g}" for stage in config.stages[:2])
    units = f"{train.iterations} iterations" if train.iterations else f"{train.epochs} epochs"
    return {
        "budget": config.budget,
        "evaluated on": f"{result['eval_split']}, {result['final']['images']} images at their own size",
        "network": network + (" from pretrained weights" if model.backbone_weights else " from random weights"),
        "training crop": f"{config.augment.crop} of a long side of {config.data.long_side or 'the image'}",
        "schedule": f"4 stages of {units} at batch size {train.batch_size} for every rung",
        "optimiser": f"{train.optimizer}, first rates {rates} in turn",
        "class balance": config.loss.class_balance,
        "seeds": sorted({run["seed"] for run in runs}),
    }


def minutes_from_now(minutes: float | None) -> float | None:
    """The moment of `time.monotonic` in so many minutes; None for None."""
    return None if minutes is None else time.monotonic() + 60 * minutes
