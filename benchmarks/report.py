"""Tables and plots of benchmark rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]


def _title(row: Row) -> str:
    size = ", ".join(f"{key} = {value:,}" for key, value in row["size"].items())
    return f"{row['op']}, {size}, {row['dtype']}, {row['pass_']}"


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
            spread = f"{row['low'] * 1e3:.1f} to {row['high'] * 1e3:.1f}"
            parts.append(
                f"| {row['provider']} | {row['median'] * 1e3:.1f} | {spread} | {speedup} |"
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
            f"{machine['threads']} threads, load {machine['load']:.1f} at the end.",
            "",
            f"Measured in the same run: matrix product {gemm}; exp {rates['exp'] / 1e9:.2f} G/s; copy "
            f"{rates['copy'] / 1e9:.1f} GB/s. The roofline of a row is the slowest of its products, its exponentials "
            "and its least traffic at these rates. Providers run in turn; x faster is against the first one. Peak MB "
            "is what one call needs beyond its inputs.",
            "",
            markdown(content["rows"]),
        ]
    )


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
