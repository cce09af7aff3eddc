"""Tables and plots of benchmark rows."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _title(row: Row) -> str:
    size = ", ".join(f"{key} = {value:,}" for key, value in row["size"].items())
    return f"{row['op']}, {size}, {row['dtype']}, {row['pass_']}"


def _ms(seconds: float) -> str:
    """Milliseconds with at least three digits."""
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"


def markdown(rows: Sequence[Row]) -> str:
    """One table per case; times in milliseconds, the speed-up against the first provider."""
    parts = []
    for title, group in groupby(rows, _title):
        lines = list(group)
        first = lines[0]["median"]
        parts += [
            f"### {title}",
            "",
            "| provider | median ms | 20-80 % | x faster | GFLOP/s | of the roofline | peak MB | error |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in lines:
            if row["median"] is None:
                parts.append(f"| {row['provider']} | {row['note']} | | | | | | |")
                continue
            speedup = f"{first / row['median']:.2f}" if first else ""
            share = "" if row["roofline_share"] is None else f"{row['roofline_share']:.0%}"
            # Ops on integers have none.
            rate = f"{row['flop_rate'] / 1e9:.0f}" if row["flop_rate"] else ""
            memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:,.0f}"
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            # A remark on a row with times is on the comparison of its result.
            error = error or row["note"]
            spread = f"{_ms(row['low'])} to {_ms(row['high'])}"
            parts.append(
                f"| {row['provider']} | {_ms(row['median'])} | {spread} | {speedup} |"
                f" {rate} | {share} | {memory} | {error} |"
            )
        parts.append("")
    return "\n".join(parts)


def page(content: dict[str, Any]) -> str:
    """The tables with what they belong to."""
    machine, rates = content["machine"], content["rates"]
    where = machine.get("gpu", machine["processor"])
    gemm = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates["gemm"].items())
    return "\n".join(
        [
            f"# Benchmarks on {where}",
            "",
            f"{machine['date']}, commit {machine['commit']}, torch {machine['torch']}, Python {machine['python']}, "
            f"{machine['threads']} threads, load {machine['load']:.1f} at the end.{_gpu_facts(machine)}",
            "",
            f"Measured in the same run: matrix product {gemm}; exp {rates['exp'] / 1e9:.2f} G/s; copy "
            f"{rates['copy'] / 1e9:.1f} GB/s. The roofline of a row is the slowest of its products, its exponentials "
            "and its least traffic at these rates. Providers run in turn; x faster is against the first one. Peak MB "
            "is what one call needs beyond its inputs.",
            "",
            markdown(content["rows"]),
        ]
    )


def _gpu_facts(machine: dict[str, Any]) -> str:
    if "gpu" not in machine:
        return ""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
    driver, sm, highest, memory = (machine.get(key, "unknown") for key in keys)
    return (
        f" Driver {driver}, CUDA {machine['cuda']}, SM clock {sm} after the last case (at most {highest}), memory clock"
        f" {memory}, float32 products in {machine['float32_matmul_precision']} precision. Times are between events on"
        " the GPU, with cold caches."
    )


def files(content: dict[str, Any]) -> dict[str, bytes]:
    """By suffix: the rows as CSV, the page, and the plot of what has times.

    Without matplotlib there is no plot, and the page says so.
    """
    rows, text = content["rows"], page(content)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    found = {".csv": table.getvalue().encode(), ".md": text.encode()}
    if importlib.util.find_spec("matplotlib") is None:
        return found | {".md": f"{text}\nNo plot: matplotlib is not installed.\n".encode()}
    return found | {".png": plot(rows)} if any(row["median"] is not None for row in rows) else found


def write(path: Path, content: dict[str, Any]) -> None:
    """`content` (machine, rates, rows) as JSON, and `files` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    for suffix, data in files(content).items():
        path.with_suffix(suffix).write_bytes(data)


def plot(rows: Sequence[Row]) -> bytes:
    """Bars of the medians, a panel per case, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["median"] is not None]
    groups = [(title, list(group)) for title, group in groupby(measured, _title)]
    figure = Figure(figsize=(9, sum(0.5 + 0.28 * len(lines) for _, lines in groups) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [0.5 + 0.28 * len(lines) for _, lines in groups]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, lines) in zip(axes, groups, strict=True):
        names = [row["provider"] for row in lines]
        medians = [row["median"] * 1e3 for row in lines]
        spread = [
            [(row["median"] - row["low"]) * 1e3 for row in lines],
            [(row["high"] - row["median"]) * 1e3 for row in lines],
        ]
        colors = ["#2b6cb0" if name.startswith("cc4s") else "#a0aec0" for name in names]
        axis.barh(names, medians, xerr=spread, color=colors, height=0.7, error_kw={"lw": 0.8})
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_xlabel("ms", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
