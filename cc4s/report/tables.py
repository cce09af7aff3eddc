"""Tables as text: Markdown for files, aligned columns for terminals."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any

MISSING = "–"


def format_number(value: float | None, *, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """A number with a fixed number of digits, a dash where it is None or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value * scale:{'+' if sign else ''}.{digits}f}"
    # A tiny negative rounds to "-0.0".
    return text.replace("-", "+" if sign else "", 1) if float(text) == 0 and text.startswith("-") else text


def format_percent(value: float | None, *, digits: int = 1, sign: bool = False) -> str:
    """A share in [0, 1] as a percentage without its sign: 0.7134 is "71.3"."""
    return format_number(value, scale=100.0, digits=digits, sign=sign)


def format_seconds(seconds: float | None) -> str:
    """A duration in seconds for reading: "42 s", "5 min 03 s", "2 h 05 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where too few values are there."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def format_spread(
    mean: float | None, std: float | None, *, scale: float = 100.0, digits: int = 1, sign: bool = False
) -> str:
    """ "71.3 ± 0.8", or "71.3" without a spread."""
    text = format_number(mean, scale=scale, digits=digits, sign=sign)
    if text == MISSING or std is None:
        return text
    return f"{text} ± {format_number(std, scale=scale, digits=digits)}"


def markdown_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned.

    Args:
        rows: cells of any type; None is a dash. Bars and line breaks in them are escaped.
        headers: column titles, as many as each row has cells.
    """
    lines = [[_markdown_cell(cell) for cell in row] for row in _checked(rows, headers)]
    titles = [_markdown_cell(title) for title in headers]
    rule = [":--" if column == 0 else "--:" for column in range(len(titles))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, rule, *lines])


def text_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table for a terminal: columns as wide as their widest cell, the first to the left, others right."""
    cells = [[_text_cell(cell) for cell in row] for row in _checked(rows, headers)]
    titles = [_text_cell(title) for title in headers]
    widths = [max(_width(line[c]) for line in [titles, *cells]) for c in range(len(titles))]

    def join(line: Sequence[str]) -> str:
        padded = [
            cell + " " * (width - _width(cell)) if column == 0 else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(padded).rstrip() + "\n"

    return join(titles) + join(["─" * width for width in widths]) + "".join(join(line) for line in cells)


def _checked(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> Sequence[Sequence[Any]]:
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"rows: expected {len(headers)} cells, got {len(row)}: {row!r}")
    return rows


def _text_cell(cell: Any) -> str:
    return MISSING if cell is None else " ".join(str(cell).split())


def _markdown_cell(cell: Any) -> str:
    text = _text_cell(cell)
    for character in "\\|<>*_`[]":
        # "_" and "*" only mark up at word borders, where names like row_major do not have them.
        if character not in "*_" or text.startswith(character) or text.endswith(character):
            text = text.replace(character, "\\" + character)
    return text


def _width(text: str) -> int:
    """Terminal cells a text takes: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
