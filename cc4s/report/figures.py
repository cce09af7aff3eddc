"""Plots of a run: curves, eigenvectors, sheets of pictures.

Everything is drawn through matplotlib's object interface: no window and no global state.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from cc4s.report.overlays import (
    CAPTIONS,
    Picture,
    ReportImage,
    eigenvalue_caption,
    eigenvector_picture,
    hex_color,
    pictures,
    present_classes,
)

_Values = npt.NDArray[np.float64]

ACCENT = "#3b82c4"
STAGE_COLORS = ("#3b82c4", "#e08a1e", "#1a9e77", "#c9508f", "#8a6fd1", "#6b9e2f", "#b5532a", "#5f7d8c")
# Curves, in the order in which they are shown: key of the log, title.
CURVES = {
    "loss": "loss, weighted sum",
    "cross_entropy": "cross-entropy",
    "entropy": "entropy",
    "consistency_kl": "consistency: KL",
    "consistency_trace": "consistency: trace",
    "color": "colour constraint",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
# Above this many logged steps a stage's curve shows means of neighbouring steps, and their range as a band.
_CURVE_POINTS = 160


def legend(classes: Sequence[str], palette: Picture, indices: Sequence[int] | None = None) -> list[Patch]:
    """Legend handles: a patch in the colour of each class (of `indices`, by default of all)."""
    shown = range(len(classes)) if indices is None else indices
    return [
        Patch(
            facecolor=hex_color(palette[i % len(palette)]),
            edgecolor="#7f7f7f",
            linewidth=0.6,
            label=classes[i],
        )
        for i in shown
    ]


def eigenvector_panel(
    eigenvectors: npt.NDArray[np.floating[Any]],
    eigenvalues: npt.NDArray[Any] | Sequence[complex] | None,
    size: tuple[int, int],
) -> Figure:
    """The eigenvectors (num,h,w) side by side at the image's (height, width), under their eigenvalues."""
    columns = max(len(eigenvectors), 1)
    with plain_style():
        figure = Figure(figsize=(1.9 * columns, 1.9 * size[0] / size[1] + 0.3), layout="constrained")
        grid = figure.subplots(1, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for i, vector in enumerate(eigenvectors):
            grid[i].imshow(eigenvector_picture(vector, size))
            if eigenvalues is not None:
                grid[i].set_title(eigenvalue_caption(eigenvalues[i]), fontsize=8)
    return figure


@dataclass
class _Series:
    """One quantity over one stage: `x` counts optimiser steps from the start of the run."""

    x: _Values
    y: _Values


def stage_colors(stages: Sequence[str]) -> dict[str, str]:
    """A colour per stage, in order."""
    return {stage: STAGE_COLORS[i % len(STAGE_COLORS)] for i, stage in enumerate(stages)}


def logged_stages(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Stages that have logged steps, in order of appearance."""
    return list(dict.fromkeys(str(entry["stage"]) for entry in log if entry.get("event") == "step"))


def _read_log(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, _Series]]:
    """{quantity: {stage: series}}. A resumed run repeats steps: the last entry of a step counts."""
    steps: dict[str, dict[int, Mapping[str, Any]]] = {}
    for entry in log:
        if entry.get("event") == "step":
            steps.setdefault(str(entry["stage"]), {})[int(entry["step"])] = entry
    result: dict[str, dict[str, _Series]] = {}
    start = 0
    for stage, entries in steps.items():
        ordered = sorted(entries.items())
        for key in CURVES:
            points = [
                (start + step, float(entry[key]))
                for step, entry in ordered
                if entry.get(key) is not None and math.isfinite(entry[key])
            ]
            if points:
                x, y = np.array(points, np.float64).T
                result.setdefault(key, {})[stage] = _Series(x, y)
        start += ordered[-1][0]
    return {key: result[key] for key in CURVES if key in result}


def _draw_curve(axes: Axes, key: str, series: Mapping[str, _Series], colors: Mapping[str, str]) -> None:
    for stage, line in series.items():
        x, y, low, high = _thinned(line)
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=colors[stage], alpha=0.16, linewidth=0)
        # A single point makes no line.
        axes.plot(x, y, color=colors[stage], lw=1.5, marker="o" if len(x) == 1 else "", ms=4)
    values = np.concatenate([line.y for line in series.values()])
    if values.min() > 0 and values.max() > 60 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif key == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_title(CURVES[key], loc="left")
    axes.set_xlabel("step")
    axes.margins(x=0.02)


def _thinned(line: _Series) -> tuple[_Values, _Values, _Values | None, _Values | None]:
    """Steps, values, and the lowest and highest value behind each where several were averaged."""
    block = math.ceil(len(line.x) / _CURVE_POINTS)
    if block == 1:
        return line.x, line.y, None, None
    starts = np.arange(0, len(line.x), block)
    counts = np.diff([*starts, len(line.x)])
    x = np.add.reduceat(line.x, starts) / counts
    y = np.add.reduceat(line.y, starts) / counts
    return x, y, np.minimum.reduceat(line.y, starts), np.maximum.reduceat(line.y, starts)


def curve_figures(log: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A small figure per logged quantity, by its key in the log; stages follow each other."""
    colors = stage_colors(logged_stages(log))
    figures = {}
    with plain_style():
        for key, series in _read_log(log).items():
            figures[key] = Figure(figsize=(4.4, 2.5), layout="constrained")
            _draw_curve(figures[key].subplots(), key, series, colors)
    return figures


def curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """All logged quantities in one figure, with a legend of the stages.

    Args:
        log: entries of the run's log; those with `event` "step" count. `step` counts from the start of its
            stage; of two entries for a step the last counts. Terms that are absent or not finite are left
            out.
    """
    data = _read_log(log)
    colors = stage_colors(logged_stages(log))
    rows = max(1, math.ceil(len(data) / 2))
    with plain_style():
        figure = Figure(figsize=(9.0, 2.3 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, (key, series) in zip(grid, data.items(), strict=False):
            _draw_curve(axes, key, series, colors)
        for axes in grid[len(data) :]:
            axes.set_axis_off()
        if colors:
            _add_legend(figure, [Patch(color=color) for color in colors.values()], list(colors), len(colors))
    return figure


def contact_sheet(
    images: Sequence[ReportImage],
    classes: Sequence[str],
    palette: Picture,
    *,
    eigenvectors: int = 2,
    skip_eigenvectors: int = 0,
    cell: float = 1.7,
) -> Figure:
    """A row per image: image, scribble, pseudo-label, prediction, ground truth, eigenvectors of P.

    Below them a legend of the classes that occur. Columns that no image has are left out.

    Args:
        images: what to show.
        classes: class names, in index order.
        palette: (256,3) uint8.
        eigenvectors: most eigenvectors per image.
        skip_eigenvectors: leading ones left out (the first one of a row-stochastic P is constant).
        cell: width of a picture in inches.
    """
    rows = [_cells(image, palette, eigenvectors, skip_eigenvectors) for image in images]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    # Keep the order of the method even where the first image lacks a column.
    titles.sort(key=_column_rank)
    present = sorted({i for image in images for i in present_classes(image) if i < len(classes)})
    columns = max(1, len(titles))
    per_row = max(1, int(columns * cell / 1.15))
    legend_height = 0.1 + 0.22 * math.ceil(len(present) / per_row) if present else 0.0
    ratios = [image.image.shape[0] / image.image.shape[1] for image in images] or [1.0]
    gap, head = 0.04, 0.24
    width = columns * cell + (columns - 1) * gap
    height = head + sum(ratios) * cell + (len(ratios) - 1) * gap + legend_height
    with plain_style():
        figure = Figure(figsize=(width, height))
        top = height - head
        for row, ratio in zip(rows, ratios, strict=False):
            top -= ratio * cell
            for column, title in enumerate(titles):
                if title in row:
                    left = column * (cell + gap)
                    box = (left / width, top / height, cell / width, ratio * cell / height)
                    axes = figure.add_axes(box)
                    axes.imshow(row[title], interpolation="antialiased", aspect="auto")
                    axes.set_axis_off()
            top -= gap
        for column, title in enumerate(titles):
            x = (column * (cell + gap) + cell / 2) / width
            figure.text(x, 1 - 0.3 * head / height, title, ha="center", va="top", fontsize=8.5)
        if present:
            handles = legend(classes, palette, present)
            _add_legend(figure, handles, [classes[i] for i in present], per_row, loc="lower center")
    return figure


def _column_rank(title: str) -> tuple[int, str]:
    return (CAPTIONS.index(title), "") if title in CAPTIONS else (len(CAPTIONS), title)


def _cells(image: ReportImage, palette: Picture, eigenvectors: int, skip: int) -> dict[str, Picture]:
    cells = pictures(image, palette)
    if image.eigenvectors is not None:
        size = cells["image"].shape[0], cells["image"].shape[1]
        for i in range(skip, min(skip + eigenvectors, len(image.eigenvectors))):
            cells[f"eigenvector {i + 1}"] = eigenvector_picture(image.eigenvectors[i], size)
    return cells


@contextmanager
def plain_style() -> Iterator[None]:
    """The look of all plots; matplotlib's settings are put back afterwards."""
    style: dict[Any, Any] = {
        "axes.edgecolor": "#8a8f98",
        "axes.grid": True,
        "axes.linewidth": 0.7,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "axes.labelsize": 8.5,
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "grid.color": "#8a8f98",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "cc4s",
        "text.parse_math": False,
        "xtick.color": "#8a8f98",
        "xtick.labelcolor": "black",
        "xtick.labelsize": 8,
        "ytick.color": "#8a8f98",
        "ytick.labelcolor": "black",
        "ytick.labelsize": 8,
    }
    with matplotlib.rc_context(style):
        yield


def _add_legend(
    figure: Figure, handles: list[Patch], names: list[str], columns: int, loc: str = "outside lower center"
) -> None:
    options: dict[str, Any] = {
        "loc": loc,
        "ncols": columns,
        "frameon": False,
        "fontsize": 8.5,
        "handlelength": 1.1,
        "handleheight": 1.1,
        "columnspacing": 1.2,
        "borderaxespad": 0.1,
    }
    # Names go in afterwards: as labels matplotlib would drop those that start with "_".
    placed = figure.legend(handles, [f"entry {i}" for i in range(len(names))], **options)
    for text, name in zip(placed.get_texts(), names, strict=True):
        text.set_text(name)


def figure_png(figure: Figure, dpi: float = 150) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    with plain_style(), _quiet():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def figure_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element inside a page.

    The background is clear, text is text in the page's font and colour, and a figure drawn anew gives the
    same bytes.

    Args:
        figure: what is drawn.
        name: letters, digits and underscores that tell the ids of this element from those of others on the
            page.
    """
    buffer = io.StringIO()
    with plain_style(), _quiet():
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    return re.sub(r'(\bid="|="#|url\(#)', rf"\1{name}-", svg)


@contextmanager
def _quiet() -> Iterator[None]:
    # A class name in a script the font lacks shows as boxes; that is no reason to warn.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield
