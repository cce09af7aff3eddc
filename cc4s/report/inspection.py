"""What `cc4s inspect` finds, as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cc4s.report.tables import format_number, markdown_table


def inspection_markdown(rows: Mapping[str, Mapping[str, Any]], picture: str) -> str:
    """Tables of the terms and of the walk of each run.

    Args:
        rows: run -> `values`, `gradient_norms`, `weights` by term; `gamma` and `walk_share` where there is a walk.
        picture: file name of the eigenvectors.
    """
    terms = list(dict.fromkeys(term for row in rows.values() for term in row["values"]))
    parts = [
        "# Inspection of the last stages\n",
        f"![Predictions and eigenvectors of every run]({picture})\n\nA row per run: {', '.join(rows)}.\n",
        "Gradient norm of each term at weight 1, in brackets its weight in the stage (0: not trained on).\n",
    ]

    def norm(row: Mapping[str, Any], term: str) -> str | None:
        if term not in row["gradient_norms"]:
            return None
        return f"{format_number(row['gradient_norms'][term], digits=4)} ({row['weights'][term]:g})"

    parts.append(
        markdown_table([[run, *(norm(row, term) for term in terms)] for run, row in rows.items()], ["run", *terms])
    )
    parts.append("Value of each term on the same training batches.\n")
    values = [[run, *(format_number(row["values"].get(term), digits=4) for term in terms)] for run, row in rows.items()]
    parts.append(markdown_table(values, ["run", *terms]))
    parts.append("The walk: its learned gamma, and the norm of what it adds over the norm of its input.\n")
    walks = [
        [run, *(format_number(row.get(key), digits=3) for key in ("gamma", "walk_share"))] for run, row in rows.items()
    ]
    parts.append(markdown_table(walks, ["run", "gamma", "added"]))
    return "\n".join(parts)
