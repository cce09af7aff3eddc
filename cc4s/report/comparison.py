"""Methods side by side (`comparison.json`) as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from cc4s.report.figures import ACCENT, plain_style
from cc4s.report.tables import format_number, format_seconds, format_spread, markdown_table, mean_and_std

METRICS = {"miou": "mIoU", "dice": "Dice per volume"}
# Key of a run -> title; the score comes before them.
COSTS = {"images_per_second": "images/s", "peak_memory_mb": "peak memory (MB)", "seconds": "time per run"}


def _by_method(comparison: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    """Method -> values of its seeds, in the order of the runs."""
    found: dict[str, list[float]] = {}
    for run in comparison["runs"]:
        values = found.setdefault(run["method"], [])
        if run.get(key) is not None:
            values.append(run[key])
    return found


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page: protocol, and a row for each method."""
    metric = METRICS[comparison["metric"]]
    scores = _by_method(comparison, comparison["metric"])
    costs = {key: _by_method(comparison, key) for key in COSTS}

    def cost(key: str, method: str) -> str:
        mean, _ = mean_and_std(costs[key][method])
        if key == "seconds":
            return format_seconds(mean)
        return format_number(mean, digits=2 if key == "images_per_second" else 0)

    rows = [[key, ", ".join(map(str, v)) if isinstance(v, list) else v] for key, v in comparison["protocol"].items()]
    table = [
        [method, len(values), format_spread(*mean_and_std(values)), *(cost(key, method) for key in COSTS)]
        for method, values in scores.items()
    ]
    return "\n".join(
        [
            f"# Comparison of methods: {comparison['dataset']}\n",
            markdown_table(rows, ["protocol", ""]),
            f"{metric} in percent, mean ± sample standard deviation over seeds. Images per second and peak memory are "
            "those of training: of the whole process on a CPU, of tensors on a GPU.\n",
            markdown_table(table, ["method", "seeds", metric, *COSTS.values()]),
        ]
    )


def comparison_figure(comparison: Mapping[str, Any]) -> Figure:
    """Bars of the score, the speed and the memory of each method."""
    panels = {comparison["metric"]: f"{METRICS[comparison['metric']]} (%)", **COSTS}
    del panels["seconds"]
    with plain_style():
        methods = list(_by_method(comparison, comparison["metric"]))
        figure = Figure(figsize=(9.0, 0.9 + 0.32 * max(len(methods), 1)), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            scale = 100 if key in METRICS else 1
            for y, values in enumerate(_by_method(comparison, key).values()):
                mean, std = mean_and_std([scale * value for value in values])
                axes.barh(y, mean or 0.0, xerr=std, height=0.62, color=ACCENT, alpha=0.85)
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(title)
            axes.set_xlim(left=0)
        figure.axes[0].invert_yaxis()
        figure.axes[0].set_title(str(comparison["dataset"]), loc="left")
    return figure
