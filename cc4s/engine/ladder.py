"""The ablation ladder: the method rung by rung, over seeds, at one budget (METHOD 9)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cc4s.config import load_config
from cc4s.engine.pipeline import Run
from cc4s.errors import UserError
from cc4s.files import atomic_write, atomic_write_json, atomic_write_text
from cc4s.report import figure_png, ladder_figure, ladder_markdown

# What makes each rung, over the recipe. The last two stand beside the ladder: what the authors' code does, and their
# baseline, which has another head.
RUNGS: dict[str, dict[str, str]] = {
    **{method: {"method": method} for method in ("pce", "rw", "entropy", "consistency", "pseudo", "cc4s", "full")},
    "released": {"method": "cc4s", "preset": "released"},
    "aspp": {"method": "pce", "model__head": "aspp"},
}


def run_ladder(
    recipe: str,
    out: Path,
    *,
    seeds: Sequence[int],
    rungs: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    **fixed: Any,
) -> dict[str, Any]:
    """Runs every rung with every seed in folders of its own and writes ladder.json, ladder.md and ladder.png.

    Finished runs are not repeated; the files are renewed after every run.

    Args:
        recipe: as in `load_config`. out: the ladder's folder. seeds: one run per rung and seed.
        rungs: names of `RUNGS`; None runs all. overrides, fixed: as in `load_config`, for every rung.

    Returns:
        The content of ladder.json.

    Raises:
        UserError: unknown rung, or bad input of a run.
    """
    chosen = list(RUNGS if rungs is None else rungs)
    for rung in chosen:
        if rung not in RUNGS:
            raise UserError(f"--rungs: got {rung!r}, expected names of {', '.join(RUNGS)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds: got {list(seeds)}, expected different numbers, at least one")
    for word in overrides:
        if word.split("=")[0] in ("method", "preset", "seed", "model.head"):
            raise UserError(f"command line: key {word.split('=')[0]} is set by the ladder itself")
    configs = {
        (rung, seed): load_config(recipe, list(overrides), seed=seed, **RUNGS[rung], **fixed)
        for seed in seeds
        for rung in chosen
    }
    ladder: dict[str, Any] = {}
    done: list[dict[str, Any]] = []
    for (rung, seed), config in configs.items():
        run = Run(config, out / f"{rung}-seed{seed}")
        result = run.execute()
        if not run.runtime.is_main:
            continue
        done.append({"rung": rung, "seed": seed, **_numbers(result), "seconds": run.folder.seconds()})
        ladder = {"dataset": recipe, "metric": "dice" if "volume_dice" in result else "miou", "runs": done}
        ladder["protocol"] = {
            "budget": config.budget,
            "seeds": list(seeds),
            "backbone": config.model.backbone,
            "width": config.model.width,
            "crop": config.augment.crop,
            "batch_size": config.train.batch_size,
            "units": "every rung trains for 4 stage budgets",
            "iterations_per_unit": config.train.iterations or f"{config.train.epochs} epochs",
        }
        atomic_write_json(out / "ladder.json", ladder)
        atomic_write_text(out / "ladder.md", ladder_markdown(ladder))
        atomic_write(out / "ladder.png", figure_png(ladder_figure(ladder)))
    return ladder


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What a run adds to ladder.json: Dice per volume where the data has volumes, and mIoU."""
    if "volume_dice" not in result:
        return {"miou": result["miou"], "per_class": result["per_class_iou"]}
    return {"dice": result["volume_dice"], "per_class": result["per_class_volume_dice"], "miou": result["miou"]}
