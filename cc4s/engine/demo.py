"""The demonstration: partial cross-entropy, the whole method and full supervision on the synthetic set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cc4s.config import load_config
from cc4s.engine.pipeline import Run
from cc4s.files import atomic_write, atomic_write_json
from cc4s.report import contact_sheet, figure_png

TITLES = {
    "pce": "partial cross-entropy alone",
    "ur": "UR: random walk, entropy",
    "ss": "SS: + eigenspace consistency",
    "pseudo_labels": "pseudo-labels (of training images)",
    "ur2": "UR2: pseudo-labels, entropy, colour",
    "ss2": "SS2: all four losses",
    "full": "full supervision",
}


def run_demo(out: Path, overrides: list[str] | None = None, **fixed: Any) -> dict[str, dict[str, Any]]:
    """Runs pce, full and cc4s with one network and one budget; writes demo.json, report.html and pictures.png.

    Each method is a run of its own (folder `out`/<method>) and continues where it was interrupted.

    Args:
        out: the demo's folder. overrides, fixed: as in `load_config`.

    Returns:
        Metrics by the names of `TITLES`; {} on other processes than the main one.

    Raises:
        UserError: bad configuration, or `out` holds another run.
    """
    methods = ("pce", "full", "cc4s")
    configs = {method: load_config("synthetic", overrides, method=method, **fixed) for method in methods}
    runs = {method: Run(config, out / method) for method, config in configs.items()}
    metrics = {method: run.execute() for method, run in runs.items()}
    main = runs["cc4s"]
    if not main.runtime.is_main:
        return {}
    found = {name: metrics[name]["final"] for name in ("pce", "full")} | metrics["cc4s"]["stages"]
    found["pseudo_labels"] = metrics["cc4s"]["pseudo_labels"]
    rows = {name: found[name] for name in TITLES if name in found}
    atomic_write_json(out / "demo.json", rows)
    others = {TITLES[name]: rows[name] for name in ("pce", "full")}
    assert main.dataset is not None
    images = main.pictures()
    main.write_report(metrics["cc4s"], images, out / "report.html", others)
    # The first eigenvector is constant up to the density of the graph.
    sheet = contact_sheet(images[:3], main.dataset.classes, main.dataset.palette, eigenvectors=3, skip_eigenvectors=1)
    atomic_write(out / "pictures.png", figure_png(sheet))
    return rows
