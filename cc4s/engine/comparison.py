"""Methods side by side: each trained on the same data at the same budget, with what it gives and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cc4s.config import METHODS, Config, load_config
from cc4s.engine.pipeline import Run
from cc4s.errors import UserError
from cc4s.files import atomic_write, atomic_write_json, atomic_write_text
from cc4s.report import figure_png
from cc4s.report.comparison import comparison_figure, comparison_markdown


def run_comparison(
    recipe: str,
    out: Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    **fixed: Any,
) -> dict[str, Any]:
    """Runs every method with every seed in folders of its own; writes comparison.json, comparison.md, comparison.png.

    Finished runs are not repeated, interrupted ones go on; the files are renewed after every run.

    Args:
        recipe: as in `load_config`. out: the folder. methods: names of `METHODS`. seeds: one run per method and seed.
        overrides, fixed: as in `load_config`, for every method.

    Returns:
        The content of comparison.json; {} on other processes than the main one.

    Raises:
        UserError: unknown method, or bad input of a run.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods: got {method!r}, expected names of {', '.join(METHODS)}")
    for option, values in (("--methods", methods), ("--seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise UserError(f"{option}: got {list(values)}, expected different ones, at least one")
    for word in overrides:
        if word.split("=")[0].split(".")[0] in ("method", "seed", "stages"):
            raise UserError(f"command line: key {word.split('=')[0]} is set by the comparison itself")
    configs = {
        (method, seed): load_config(recipe, list(overrides), method=method, seed=seed, **fixed)
        for seed in seeds
        for method in methods
    }
    comparison: dict[str, Any] = {}
    done: list[dict[str, Any]] = []
    for (method, seed), config in configs.items():
        run = Run(config, out / f"{method}-seed{seed}")
        result = run.execute()
        if not run.runtime.is_main:
            continue
        volumes = "volume_dice" in result
        done.append(
            {
                "method": method,
                "seed": seed,
                **({"dice": result["volume_dice"]} if volumes else {}),
                "miou": result["miou"],
                **training_cost(run.folder.read_log()),
                "seconds": run.folder.seconds(),
            }
        )
        comparison = {"dataset": recipe, "metric": "dice" if volumes else "miou", "runs": done}
        comparison["protocol"] = _protocol(config, run.runtime.device, seeds)
        atomic_write_json(out / "comparison.json", comparison)
        atomic_write_text(out / "comparison.md", comparison_markdown(comparison))
        atomic_write(out / "comparison.png", figure_png(comparison_figure(comparison)))
    return comparison


def training_cost(log: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Images per second and peak memory of training, over all stages and sessions in a run's log.

    The first step of a session, which warms up, is not timed.
    """
    parts = [entry for entry in log if entry["event"] == "trained"]
    images, seconds = (sum(part[key] for part in parts) for key in ("images", "seconds"))
    peaks = [part["peak_memory_mb"] for part in parts if part["peak_memory_mb"] is not None]
    return {
        "images_per_second": round(images / seconds, 3) if images > 0 else None,
        "peak_memory_mb": max(peaks, default=None),
    }


def _protocol(config: Config, device: torch.device, seeds: Sequence[int]) -> dict[str, Any]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    unit = f"{config.train.iterations} iterations" if config.train.iterations else f"{config.train.epochs} epochs"
    return {
        "budget": config.budget,
        "seeds": list(seeds),
        "backbone": config.model.backbone,
        "width": config.model.width,
        "crop": config.augment.crop,
        "batch size": config.train.batch_size,
        "schedule": f"4 units of {unit} for every method",
        "machine": f"{where}, torch {torch.__version__}",
    }
