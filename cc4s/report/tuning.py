"""The search for the weights of the losses, from its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cc4s.files import atomic_write_text
from cc4s.report.tables import format_percent, markdown_table

_METRICS = {"miou": "mIoU", "dice": "Dice per volume"}


def tuning_markdown(search: Mapping[str, Any]) -> str:
    """What was drawn from which space, every trial with its score, and the choice."""
    metric, space, runs = search["metric"], search["space"], search["runs"]
    train = search["config"]["train"]
    length = f"{train['iterations']} iterations" if train["iterations"] else f"{train['epochs']} epochs"
    spaces = [[key, kind, ", ".join(map(str, range_))] for key, how in space.items() for kind, range_ in how.items()]
    parts = [
        f"# Search: {search['dataset']}, budget {search['config']['budget']}\n",
        f"{search['trials']} trials of the full method, drawn with seed {search['seed']}; trial 0 is the recipe. "
        f"Scores on `{search['split']}`: {_METRICS[metric]} in percent. Budget: share of {length} a stage.\n",
        markdown_table(spaces, ["key", "drawn", "from"]),
    ]
    shares = sorted({run["share"] for run in runs})
    trials = {run["trial"]: run["values"] for run in runs}
    scores = {(run["trial"], run["share"]): run[metric] for run in runs}

    def rank(trial: int) -> tuple[float, float]:
        last = max(share for share in shares if (trial, share) in scores)
        return -last, -(scores[trial, last] or 0.0)

    rows = [
        [
            f"{trial}{' (recipe)' if trial == 0 else ''}",
            *(trials[trial].get(key, _value(search["config"], key)) for key in space),
            *(format_percent(scores.get((trial, share))) for share in shares),
        ]
        for trial in sorted(trials, key=rank)
    ]
    parts.append(markdown_table(rows, ["trial", *space, *(f"budget {share:g}" for share in shares)]))
    if "best" in search:
        parts.append(f"Chosen: trial {search['best']}.\n")
    return "\n".join(parts)


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def write_tuning(file: Path) -> None:
    """Writes tuning.md beside a search's JSON, with the searches of all `*tuning.json` of that folder."""
    pages = [tuning_markdown(json.loads(path.read_text("utf-8"))) for path in sorted(file.parent.glob("*tuning.json"))]
    atomic_write_text(file.parent / "tuning.md", "\n".join(pages))
