"""The ablation ladder and the robustness to poorer scribbles as tables and plots, from their JSON."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cc4s.files import atomic_write, atomic_write_text
from cc4s.report.figures import ACCENT, STAGE_COLORS, figure_png, plain_style
from cc4s.report.tables import (
    format_number,
    format_percent,
    format_seconds,
    format_spread,
    markdown_table,
    mean_and_std,
)

RUNGS = {
    "pce": "partial cross-entropy",
    "rw": "+ random walk",
    "entropy": "+ entropy",
    "consistency": "+ consistency",
    "pseudo": "+ pseudo-labels",
    "cc4s": "+ colour = CC4S",
    "full": "full supervision",
    "released": "released preset",
    "aspp": "partial cross-entropy, ASPP head",
    "without_entropy": "CC4S without entropy",
    "without_kl": "CC4S without KL consistency",
    "without_trace": "CC4S without trace consistency",
}
_CLIMB = ("pce", "rw", "entropy", "consistency", "pseudo", "cc4s", "full")
_METRICS = {"miou": "mIoU", "dice": "Dice", "volume_dice": "Dice per volume", "volume_iou": "IoU per volume"}


@dataclass
class Rung:
    """One row of the ladder; scores are shares in [0, 1]."""

    name: str
    label: str
    # seed -> score
    scores: dict[int, float] = field(default_factory=dict)
    mean: float | None = None
    # Sample standard deviation over seeds; None for one seed.
    std: float | None = None
    # Over the rung below: mean and spread of the difference per seed, over the seeds that both have.
    gain: float | None = None
    gain_std: float | None = None
    # Mean over the mean of full supervision.
    share_of_full: float | None = None
    # Part of the way from the first rung to full supervision.
    gap_closed: float | None = None
    # class -> mean over seeds
    per_class: dict[str, float] = field(default_factory=dict)
    # Mean over seeds.
    seconds: float | None = None
    # stage -> mean over seeds
    stages: dict[str, float] = field(default_factory=dict)
    # Coverage and accuracy of the pseudo-labels, mean over seeds.
    pseudo_labels: dict[str, float] = field(default_factory=dict)


def summarize_ladder(ladder: Mapping[str, Any]) -> list[Rung]:
    """The rows of the ladder from the runs.

    Args:
        ladder: the content of `ladder.json`: `metric` names the score of the runs, `runs` lists `rung`,
            `seed`, the score under the metric's name, and optionally `per_class` and `seconds`. Of two runs
            with one rung and seed the last counts.

    Returns:
        The rungs that have runs, from pce up to full supervision, then the released preset, then unknown
        ones. The gain is over the rung directly below, and missing where that has no runs.
    """
    metric = ladder["metric"]
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in ladder["runs"]:
        if run.get(metric) is not None:
            runs.setdefault(run["rung"], {})[run["seed"]] = run
    order = [name for name in RUNGS if name in runs] + [name for name in runs if name not in RUNGS]
    rungs = {name: _summarize(name, runs[name], metric) for name in order}
    for below, name in itertools.pairwise(_CLIMB):
        if below in rungs and name in rungs:
            rungs[name].gain, rungs[name].gain_std = _difference(rungs[name], rungs[below])
    full, first = rungs.get("full"), rungs.get("pce")
    for rung in rungs.values():
        if full is None or rung.mean is None or not full.mean:
            continue
        rung.share_of_full = rung.mean / full.mean
        if first is not None and first.mean is not None and full.mean != first.mean:
            rung.gap_closed = (rung.mean - first.mean) / (full.mean - first.mean)
    return list(rungs.values())


def _summarize(name: str, runs: Mapping[int, Mapping[str, Any]], metric: str) -> Rung:
    rung = Rung(name, RUNGS.get(name, name), {seed: float(run[metric]) for seed, run in sorted(runs.items())})
    rung.mean, rung.std = mean_and_std(list(rung.scores.values()))
    rung.per_class = _means(runs, "per_class")
    rung.stages = _means(runs, "stages")
    rung.pseudo_labels = _means(runs, "pseudo_labels")
    seconds = [run["seconds"] for run in runs.values() if run.get("seconds") is not None]
    rung.seconds, _ = mean_and_std(seconds)
    return rung


def _means(runs: Mapping[int, Mapping[str, Any]], key: str) -> dict[str, float]:
    """Mean over runs of each number in a part of them; numbers that are None do not count."""
    found: dict[str, list[float]] = {}
    for _, run in sorted(runs.items()):
        for name, value in (run.get(key) or {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _difference(rung: Rung, below: Rung) -> tuple[float | None, float | None]:
    if rung.mean is None or below.mean is None:
        return None, None
    shared = rung.scores.keys() & below.scores.keys()
    if shared:
        return mean_and_std([rung.scores[seed] - below.scores[seed] for seed in sorted(shared)])
    spread = None if rung.std is None or below.std is None else (rung.std**2 + below.std**2) ** 0.5
    return rung.mean - below.mean, spread


def ladder_markdown(ladder: Mapping[str, Any]) -> str:
    """The ladder as a Markdown page: protocol, the rungs with their gains, and scores per class."""
    rungs = summarize_ladder(ladder)
    metric = _METRICS.get(ladder["metric"], ladder["metric"])
    parts = [f"# Ablation ladder: {ladder['dataset']}\n"]
    parts += _protocol_table(ladder)
    parts.append(
        f"{metric} in percent, mean ± sample standard deviation over seeds. Gain: over the row above, with "
        "the spread of the difference per seed. Of full: share of full supervision. Gap closed: part of the "
        "way from partial cross-entropy to full supervision. Time: with the stages that it shares.\n"
    )
    parts.append(
        markdown_table(
            [
                [
                    rung.label,
                    len(rung.scores),
                    format_spread(rung.mean, rung.std),
                    format_spread(rung.gain, rung.gain_std, sign=True),
                    format_number(rung.share_of_full, digits=3),
                    format_percent(rung.gap_closed, digits=0) + (" %" if rung.gap_closed is not None else ""),
                    format_seconds(rung.seconds),
                ]
                for rung in rungs
            ],
            ["rung", "seeds", metric, "gain", "of full", "gap closed", "time per run"],
        )
    )
    classes = list(dict.fromkeys(cls for rung in rungs for cls in rung.per_class))
    if classes:
        parts.append(f"{metric} per class in percent, mean over seeds.\n")
        rows = [[cls, *(format_percent(rung.per_class.get(cls)) for rung in rungs)] for cls in classes]
        parts.append(markdown_table(rows, ["class", *(rung.label for rung in rungs)]))
    parts += _stage_tables(rungs, metric)
    return "\n".join(parts)


def _protocol_table(ladder: Mapping[str, Any]) -> list[str]:
    protocol = ladder.get("protocol") or {}
    rows = [[key, ", ".join(map(str, v)) if isinstance(v, list) else v] for key, v in protocol.items()]
    return [markdown_table(rows, ["protocol", ""])] if rows else []


def _stage_tables(rungs: list[Rung], metric: str) -> list[str]:
    """Scores on the way, and how good the pseudo-labels were."""
    parts = []
    stages = list(dict.fromkeys(stage for rung in rungs for stage in rung.stages))
    if stages:
        parts.append(f"{metric} after each stage in percent, mean over seeds; every row has the same schedule.\n")
        rows = [[rung.label, *(format_percent(rung.stages.get(stage)) for stage in stages)] for rung in rungs]
        parts.append(markdown_table(rows, ["rung", *stages]))
    made = [rung for rung in rungs if rung.pseudo_labels]
    if made:
        parts.append("Pseudo-labels against the training masks, in percent, mean over seeds.\n")
        columns = {"coverage": "pixels labelled", "pixel_accuracy": "of these right", "miou": "mIoU of these"}
        rows = [[rung.label, *(format_percent(rung.pseudo_labels.get(key)) for key in columns)] for rung in made]
        parts.append(markdown_table(rows, ["rung", *columns.values()]))
    return parts


def robustness_curves(ladder: Mapping[str, Any]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """The scores of runs with poorer scribbles: kind ("shrink", "drop") -> rung -> ratio -> one score per seed.

    Args:
        ladder: `runs` with `shrink` (the share of every stroke that is left) or `drop` (the probability of dropping a
            stroke); 1 and 0 are all scribbles.
    """
    curves: dict[str, dict[str, dict[float, list[float]]]] = {"shrink": {}, "drop": {}}
    for run in ladder["runs"]:
        for kind in curves:
            score = run.get(ladder["metric"])
            if kind in run and score is not None:
                curves[kind].setdefault(run["rung"], {}).setdefault(float(run[kind]), []).append(float(score))
    return curves


def robustness_markdown(ladder: Mapping[str, Any]) -> str:
    """Scores against the ratio of scribbles, a table for each kind."""
    metric = _METRICS.get(ladder["metric"], ladder["metric"])
    parts = [f"# Robustness to poorer scribbles: {ladder['dataset']}\n"]
    parts += _protocol_table(ladder)
    titles = {
        "shrink": "Strokes shrunk to this share of their length; 0 leaves a point of each",
        "drop": "Strokes dropped with this probability",
    }
    for kind, rungs in robustness_curves(ladder).items():
        ratios = sorted({ratio for scores in rungs.values() for ratio in scores}, reverse=kind == "shrink")
        if not ratios:
            continue
        parts.append(f"{titles[kind]}: {metric} in percent, mean ± sample standard deviation over seeds.\n")
        rows = [
            [RUNGS.get(rung, rung), *(format_spread(*mean_and_std(scores.get(ratio, []))) for ratio in ratios)]
            for rung, scores in rungs.items()
        ]
        parts.append(markdown_table(rows, ["rung", *(f"{ratio:g}" for ratio in ratios)]))
    return "\n".join(parts)


def robustness_figure(ladder: Mapping[str, Any]) -> Figure:
    """The curves of `robustness_curves`: mean over seeds, a dot per seed; poorer scribbles to the right."""
    metric = _METRICS.get(ladder["metric"], ladder["metric"])
    curves = robustness_curves(ladder)
    with plain_style():
        figure = Figure(figsize=(7.0, 2.8), layout="constrained")
        for axes, (kind, rungs) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
            for (rung, scores), color in zip(rungs.items(), itertools.cycle(STAGE_COLORS), strict=False):
                ratios = sorted(scores)
                means = [100 * statistics.fmean(scores[ratio]) for ratio in ratios]
                axes.plot(ratios, means, color=color, label=RUNGS.get(rung, rung))
                dots = [(ratio, 100 * score) for ratio in ratios for score in scores[ratio]]
                axes.plot(*zip(*dots, strict=True), "o", ms=3.5, mfc="white", mec=color, mew=0.9)
            axes.set_xlabel("share of each stroke left" if kind == "shrink" else "probability of dropping a stroke")
            if kind == "shrink":
                axes.set_ylabel(f"{metric} (%)")
                axes.invert_xaxis()
            if rungs:
                axes.legend(fontsize=8)
    return figure


def write_ladder(file: Path, ladder: Mapping[str, Any]) -> None:
    """Writes the page and the plot of a ladder's JSON beside it: FILE.md, FILE.png.

    Args:
        file: the JSON file. ladder: its content; runs with poorer scribbles make a page on robustness.
    """
    poorer = any("shrink" in run or "drop" in run for run in ladder["runs"])
    text = robustness_markdown(ladder) if poorer else ladder_markdown(ladder)
    figure = robustness_figure(ladder) if poorer else ladder_figure(ladder)
    picture = file.with_suffix(".png")
    atomic_write(picture, figure_png(figure))
    heading, _, rest = text.partition("\n")
    atomic_write_text(file.with_suffix(".md"), f"{heading}\n\n![{heading[2:]}]({picture.name})\n{rest}")


def ladder_figure(ladder: Mapping[str, Any]) -> Figure:
    """The ladder as bars: mean, standard deviation, a dot per seed, and a line at full supervision."""
    rungs = summarize_ladder(ladder)
    with plain_style():
        figure = Figure(figsize=(7.0, 0.9 + 0.42 * max(len(rungs), 1)), layout="constrained")
        axes = figure.subplots()
        for y, rung in enumerate(rungs):
            mean = 100 * (rung.mean or 0.0)
            axes.barh(y, mean, height=0.62, color=_color(rung.name), alpha=0.85)
            if rung.std is not None:
                axes.errorbar(mean, y, xerr=100 * rung.std, color="#333333", capsize=3, lw=1.2)
            scores = [100 * score for score in rung.scores.values()]
            axes.plot(scores, [y] * len(scores), "o", ms=3.5, mfc="white", mec="#333333", mew=0.9)
            right = max([mean + 100 * (rung.std or 0.0), *scores])
            text = format_spread(rung.mean, rung.std)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.annotate(text, (right, y), (7, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
        full = next((rung.mean for rung in rungs if rung.name == "full"), None)
        if full is not None:
            axes.axvline(100 * full, color="#888888", lw=0.9, ls=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(rungs)), [rung.label for rung in rungs])
        axes.invert_yaxis()
        axes.set_xlim(*_limits(rungs))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{_METRICS.get(ladder['metric'], ladder['metric'])} (%)")
        axes.set_title(str(ladder["dataset"]), loc="left")
    return figure


def _color(rung: str) -> str:
    return {"full": "#8a8f98", "released": "#c9a227"}.get(rung, ACCENT)


def _limits(rungs: list[Rung]) -> tuple[float, float]:
    """Bars start at 0; the room on the right is for the numbers."""
    scores = [100 * (score + (rung.std or 0.0)) for rung in rungs for score in rung.scores.values()]
    return 0.0, max([1.0, *scores]) * 1.22
