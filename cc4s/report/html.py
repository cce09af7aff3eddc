"""`report.html`: one file with everything in it, readable on a phone, in light and in dark."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from cc4s.files import atomic_write
from cc4s.report.figures import CURVES, curve_figures, figure_svg, logged_stages, stage_colors
from cc4s.report.overlays import (
    Picture,
    ReportImage,
    eigenvalue_caption,
    eigenvector_picture,
    hex_color,
    pictures,
)
from cc4s.report.style import STYLE
from cc4s.report.tables import MISSING, format_percent, format_seconds

Metrics = Mapping[str, Any]

# Columns of the table of stages: key of the metrics, title.
_STAGE_COLUMNS = {
    "miou": "mIoU",
    "dice": "Dice",
    "volume_iou": "IoU per volume",
    "volume_dice": "Dice per volume",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
}
# Tables of classes: key of the metrics, key of the mean, title.
_CLASS_TABLES = (
    ("per_class_iou", "miou", "IoU"),
    ("per_class_dice", "dice", "Dice"),
    ("per_class_volume_iou", "volume_iou", "IoU per volume"),
    ("per_class_volume_dice", "volume_dice", "Dice per volume"),
)
# The page may load nothing, whatever ends up in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Metrics,
    log: Sequence[Mapping[str, Any]],
    images: Sequence[ReportImage],
    classes: Sequence[str],
    palette: Picture,
    table: Mapping[str, Metrics] | None = None,
) -> None:
    """Write the report of a run as one HTML file without outside resources, atomically.

    Args:
        path: the file; replaced when it exists.
        title: heading of the page.
        config: the resolved configuration, nested.
        metrics: the content of `metrics.json`: `stages` {name: metrics}, `final` (metrics), and what
            describes the run (`dataset`, `method`, `preset`, `budget`, `seed`, `eval_split`, `pseudo_labels`,
            `seconds` {stage: seconds}, by default those of the log). Metrics are as
            `SegmentationMetrics.compute` gives them; what is missing is left out.
        log: the entries of the run's log, in order.
        images: images with their masks and eigenvectors.
        classes: class names, in index order.
        palette: (256,3) uint8, the colour of each class.
        table: runs to compare with, as further rows: {name: metrics}.
    """
    page = _page(title, config, metrics, log, images, classes, palette, table or {})
    atomic_write(Path(path), page.encode("utf-8", errors="replace"))


def _page(
    title: str,
    config: Mapping[str, Any],
    metrics: Metrics,
    log: Sequence[Mapping[str, Any]],
    images: Sequence[ReportImage],
    classes: Sequence[str],
    palette: Picture,
    table: Mapping[str, Metrics],
) -> str:
    body = [
        _header(title, metrics),
        _summary(metrics, log),
        _stages(metrics, log, table),
        _classes(metrics, table, classes, palette),
        _curves(log),
        _images(images, classes, palette),
        _configuration(config),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(title: str, metrics: Metrics) -> str:
    facts = [
        f"{name} <b>{escape(str(metrics[key]))}</b>"
        for key, name in (
            ("dataset", "dataset"),
            ("method", "method"),
            ("preset", "preset"),
            ("budget", "budget"),
            ("seed", "seed"),
            ("eval_split", "evaluated on"),
        )
        if metrics.get(key) not in (None, "")
    ]
    return f'<header><h1>{escape(title)}</h1><p class="facts">{" · ".join(facts)}</p></header>'


def _summary(metrics: Metrics, log: Sequence[Mapping[str, Any]]) -> str:
    final = metrics.get("final") or metrics
    pseudo = metrics.get("pseudo_labels") or {}
    averaged = final.get("classes_in_mean")
    classes = f"mean of {len(averaged)} classes" if averaged else ""
    volumes = f"{final['volumes']} volumes" if final.get("volumes") else ""
    images = f"{final['images']} images" if final.get("images") else ""
    cards = [
        ("mIoU", final.get("miou"), classes),
        ("Dice", final.get("dice"), "pooled over images"),
        ("Dice per volume", final.get("volume_dice"), volumes),
        ("Pixel accuracy", final.get("pixel_accuracy"), images),
        ("Pseudo-labelled", pseudo.get("coverage"), "share of the training pixels"),
        ("Pseudo-label mIoU", pseudo.get("miou"), "on the training images"),
    ]
    parts = [
        _card(name, f"{format_percent(value)}<small> %</small>", note)
        for name, value, note in cards
        if value is not None
    ]
    seconds = _seconds(metrics, log)
    if seconds:
        total = seconds.get("total", sum(seconds.values()))
        time = re.sub(r" (s|min|h)", r"<small> \1</small>", format_seconds(total))
        parts.append(_card("Time", time, "all stages"))
    return f'<section class="cards">{"".join(parts)}</section>' if parts else ""


def _card(name: str, value: str, note: str) -> str:
    name, note = escape(name), escape(note)
    return f'<div class="card"><span>{name}</span><strong>{value}</strong><span>{note}</span></div>'


def _seconds(metrics: Metrics, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{stage: seconds} as the metrics say, or else as the log says."""
    seconds = metrics.get("seconds")
    if isinstance(seconds, Mapping):
        return {str(k): float(v) for k, v in seconds.items() if isinstance(v, int | float)}
    return _logged_seconds(log)


def _rows(metrics: Metrics, table: Mapping[str, Metrics]) -> list[tuple[str, Metrics, bool]]:
    """(name, metrics, is a run to compare with): the stages, or else the final metrics; then the others."""
    stages: Mapping[str, Metrics] = metrics.get("stages") or {}
    if not stages and metrics.get("final"):
        stages = {"final": metrics["final"]}
    own = [(str(name), values, False) for name, values in stages.items()]
    return own + [(str(name), values, True) for name, values in table.items()]


def _stages(metrics: Metrics, log: Sequence[Mapping[str, Any]], table: Mapping[str, Metrics]) -> str:
    rows = _rows(metrics, table)
    columns = {key: name for key, name in _STAGE_COLUMNS.items() if any(row.get(key) is not None for _, row, _ in rows)}
    if not columns:
        return ""
    seconds = _seconds(metrics, log)
    times = [None if other else seconds.get(name) for name, _, other in rows]
    head = ["stage", *columns.values(), *(["time"] if any(times) else [])]
    lines = []
    for (name, row, other), time in zip(rows, times, strict=True):
        cells = [_meter(row.get(key)) for key in columns]
        if any(times):
            cells.append(f"<td>{format_seconds(time)}</td>")
        lines.append(_line(escape(name), cells, ["other"] if other else []))
    note = "In percent. Means are over the classes that occur and are not excluded."
    if table:
        note += " Rows in italics are other runs of the same network and budget."
    return _section("Stages", f"<p>{note}</p>" + _table(head, lines))


def _logged_seconds(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Training time of each stage: `seconds` of a step counts from the last start of its stage."""
    total: dict[str, float] = {}
    latest: dict[str, float] = {}
    for entry in log:
        if entry.get("event") != "step" or entry.get("seconds") is None:
            continue
        stage, seconds = str(entry["stage"]), float(entry["seconds"])
        previous = latest.get(stage, 0.0)
        # A clock that went back was started anew: the stage was resumed.
        total[stage] = total.get(stage, 0.0) + (seconds - previous if seconds >= previous else seconds)
        latest[stage] = seconds
    return total


def _classes(metrics: Metrics, table: Mapping[str, Metrics], classes: Sequence[str], palette: Picture) -> str:
    rows = _rows(metrics, table)
    final = metrics.get("final") or metrics
    averaged = set(final.get("classes_in_mean", classes))
    parts = []
    for key, mean, title in _CLASS_TABLES:
        shown = [(name, row, other) for name, row, other in rows if row.get(key)]
        if not shown:
            continue
        head = ["class", *(name for name, _, _ in shown)]
        lines = [
            _line(
                _swatch(palette, index) + escape(cls),
                [_meter(row[key].get(cls)) for _, row, _ in shown],
                [] if cls in averaged else ["aside"],
            )
            for index, cls in enumerate(classes)
        ]
        lines.append(_line("mean", [_meter(row.get(mean)) for _, row, _ in shown], ["total"]))
        parts.append(f"<div><h3>{title}</h3>{_table(head, lines)}</div>")
    if not parts:
        return ""
    aside = "" if averaged >= set(classes) else " Classes in grey are not in the mean."
    return _section("Classes", f'<p>In percent.{aside}</p><div class="pair">{"".join(parts)}</div>')


def _meter(value: float | None) -> str:
    """A table cell with a number and, behind it, a bar of that share."""
    if value is None or not math.isfinite(value):
        return f"<td>{MISSING}</td>"
    share = 100 * min(max(value, 0.0), 1.0)
    return f'<td class="meter" style="--share:{share:.1f}%">{format_percent(value)}</td>'


def _line(head: str, cells: Sequence[str], classes: Sequence[str] = ()) -> str:
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f'<tr{attribute}><th scope="row">{head}</th>{"".join(cells)}</tr>'


def _table(head: Sequence[str], lines: Sequence[str]) -> str:
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    figures = curve_figures(log)
    if not figures:
        return ""
    stages = logged_stages(log)
    keys = [_key(color, stage) for stage, color in stage_colors(stages).items()]
    label = "stages " + ", ".join(stages)
    parts = [
        f'<figure class="curve" role="img" aria-label="{escape(f"{CURVES[key]} by step; {label}")}">'
        f"{figure_svg(figure, key)}</figure>"
        for key, figure in figures.items()
    ]
    legend = f'<p class="key">{"".join(keys)}</p>'
    return _section("Training", f'{legend}<div class="curves">{"".join(parts)}</div>')


def _key(color: str, name: str) -> str:
    return f'<span><i style="background:{color}"></i>{escape(name)}</span>'


def _swatch(palette: Picture, index: int) -> str:
    return f'<i style="background:{hex_color(palette[index % len(palette)])}"></i>'


def _images(images: Sequence[ReportImage], classes: Sequence[str], palette: Picture) -> str:
    if not images:
        return ""
    keys = [_key(hex_color(palette[i % len(palette)]), name) for i, name in enumerate(classes)]
    parts = [f'<p class="key">{"".join(keys)}</p>']
    if any(image.eigenvectors is not None for image in images):
        parts.append(
            "<p>Below each image: the leading eigenvectors of its transition matrix P, with their "
            "eigenvalues. A random walk tends to stay among pixels of one colour; blue is below zero, white "
            "is zero, red is above.</p>"
        )
    return _section("Images", "".join(parts) + "".join(_image(image, palette) for image in images))


def _image(image: ReportImage, palette: Picture) -> str:
    shown = pictures(image, palette)
    size = shown["image"].shape[0], shown["image"].shape[1]
    views = "".join(_figure(picture, escape(caption), f"{image.name}: {caption}") for caption, picture in shown.items())
    content = f'<div class="views">{views}</div>'
    if image.eigenvectors is not None and len(image.eigenvectors):
        vectors = []
        for i, vector in enumerate(image.eigenvectors):
            number = f"eigenvector {i + 1}"
            value = None if image.eigenvalues is None else eigenvalue_caption(image.eigenvalues[i])
            picture = eigenvector_picture(vector, size)
            vectors.append(_figure(picture, escape(value or number), f"{image.name}: {number}"))
        content += f'<div class="views small">{"".join(vectors)}</div>'
    return f"<article><h3>{escape(image.name)}</h3>{content}</article>"


def _figure(picture: Picture, caption: str, alt: str) -> str:
    height, width = picture.shape[:2]
    return (
        f'<figure><img src="{_data_uri(picture)}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_uri(picture: Picture) -> str:
    buffer = io.BytesIO()
    # Full chroma: class colours have sharp edges. Pillow's optimize= fails on noisy pictures.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    lines = "\n".join(f"<span>{escape(key)}</span>={escape(value)}" for key, value in _flat(config))
    return f"<section><details><summary>Configuration</summary><pre>{lines}</pre></details></section>"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The configuration as key=value words, nested keys with dots."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{index}]")
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        yield prefix, text
