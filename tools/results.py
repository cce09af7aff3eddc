"""The results of docs/results: which runs make them, in which order, and the pages from their JSON.

    python -m tools.results cpu --data DIR [--minutes M]     make results-cpu
    python -m tools.results gpu --data DIR [--minutes M]     make results-gpu
    python -m tools.results tune --data DIR [--minutes M]    make tune
    python -m tools.results docs [--readme]                  make results-docs

Every command goes on where it stopped. A run that stands in the JSON is not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
FOLDERS = {"acdc": "acdc_scribble", "msrc21": "msrc21"}
# What says most first; rungs that share stages follow each other.
ORDER = ("pce", "full", "cc4s", "pseudo", "consistency", "entropy", "rw", "released")
START, END = "<!-- results: from docs/results by `make results-docs` -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Job:
    """One call of the ladder."""

    dataset: str
    # The JSON file in docs/results.
    name: str
    seeds: tuple[int, ...] = (0,)
    rungs: tuple[str, ...] = ORDER
    # (kind, ratio) of poorer scribbles.
    scribbles: tuple[tuple[str, float], ...] = ()
    words: tuple[str, ...] = ()
    # The folder of the runs in runs/; "" is that of the name. Jobs in one folder share stages.
    folder: str = ""


# The first two are all scribbles: the ends of the curves, from the stages of the ladder.
POORER = (
    ("shrink", 1.0),
    ("drop", 0.0),
    ("shrink", 0.0),
    ("drop", 0.5),
    ("shrink", 0.2),
    ("drop", 0.3),
    ("shrink", 0.5),
    ("drop", 0.1),
)
CPU = (
    Job("acdc", "acdc_ladder", words=("budget=cpu",)),
    Job("msrc21", "msrc21_ladder", words=("budget=cpu",)),
    Job("acdc", "acdc_ladder", seeds=(1,), words=("budget=cpu",)),
    Job("acdc", "robustness", (0,), ("pce", "cc4s"), POORER, ("budget=cpu",), folder="acdc_ladder"),
    Job("acdc", "acdc_ladder", seeds=(2,), words=("budget=cpu",)),
)
SCRATCH = ("budget=full", "train.optimizer=adamw", "report.images=0")
RESNET50 = (*SCRATCH, "train.lr_factor=1", "model.backbone=resnet50", "model.width=64", "model.head_channels=512")
UNET = (*SCRATCH, "train.lr_factor=3", "model.backbone=unet", "model.width=16", "model.dropout=0")
GPU = (
    Job("acdc", "acdc_unet_full_ladder", words=UNET),
    Job("acdc", "acdc_resnet50_full_ladder", words=RESNET50),
    Job("msrc21", "msrc21_resnet50_full_ladder", words=RESNET50),
    Job("acdc", "acdc_unet_full_ladder", seeds=(1, 2), words=UNET),
    Job("acdc", "acdc_resnet50_full_ladder", seeds=(1, 2), words=RESNET50),
    Job("acdc", "robustness_unet_full", (0,), ("pce", "cc4s"), POORER, UNET, folder="acdc_unet_full_ladder"),
)


def run_jobs(jobs: Sequence[Job], data: Path, minutes: float | None, extra: Sequence[str] = ()) -> bool:
    """Runs the ladders one after another until time is over; whether everything is done."""
    from cc4s.engine.ladder import Scribbles, minutes_from_now, run_ladder

    deadline = minutes_from_now(minutes)
    for job in jobs:
        ladder = run_ladder(
            job.dataset,
            ROOT / "runs" / (job.folder or job.name),
            seeds=job.seeds,
            rungs=job.rungs,
            scribbles=tuple(Scribbles(*poorer) for poorer in job.scribbles) or (Scribbles(),),
            results=RESULTS / f"{job.name}.json",
            deadline=deadline,
            overrides=[*job.words, *extra],
            data__root=str(data / FOLDERS[job.dataset]),
        )
        if ladder and not ladder["complete"]:
            return False
    return True


def run_searches(datasets: Sequence[str], data: Path, minutes: float | None, extra: Sequence[str] = ()) -> bool:
    """The searches on the validation splits; whether they are complete."""
    from cc4s.engine.ladder import minutes_from_now
    from cc4s.engine.tuning import run_tuning

    deadline = minutes_from_now(minutes)
    for dataset in datasets:
        name = f"{dataset}_tuning"
        search = run_tuning(
            dataset,
            ROOT / "runs" / name,
            trials=8,
            seed=0,
            results=RESULTS / f"{name}.json",
            deadline=deadline,
            overrides=["budget=cpu", *extra],
            data__root=str(data / FOLDERS[dataset]),
        )
        if search and "best" not in search:
            return False
    return True


def write_pages(results: Path = RESULTS) -> list[Path]:
    """Pages and plots of all ladders and searches whose JSON is there; their JSON files."""
    from cc4s.report import write_ladder, write_tuning

    files = sorted(results.glob("*ladder.json")) + sorted(results.glob("robustness*.json"))
    for file in files:
        write_ladder(file, json.loads(file.read_text("utf-8")))
    searches = sorted(results.glob("*tuning.json"))
    for file in searches[:1]:
        write_tuning(file)
    return files + searches


def readme_block(results: Path = RESULTS) -> str:
    """The README's picture and headline numbers, from acdc_ladder.json and msrc21_ladder.json.

    Raises:
        ValueError: none of the two has partial cross-entropy, CC4S and full supervision.
    """
    from cc4s.report import format_percent, format_spread, summarize_ladder

    titles = {"acdc": "ACDC, human scribbles (Dice per volume)", "msrc21": "MSRC-21, generated scribbles (mIoU)"}
    rows, pictures = [], []
    for dataset, title in titles.items():
        file = results / f"{dataset}_ladder.json"
        if not file.is_file():
            continue
        rungs = {rung.name: rung for rung in summarize_ladder(json.loads(file.read_text("utf-8")))}
        if not {"pce", "cc4s", "full"} <= rungs.keys():
            continue
        scores = [format_spread(rungs[name].mean, rungs[name].std) for name in ("pce", "cc4s", "full")]
        closed = format_percent(rungs["cc4s"].gap_closed, digits=0)
        rows.append(f"| {title} | {' | '.join(scores)} | {closed} % |")
        pictures.append(f"![Ablation ladder on {dataset}](docs/results/{dataset}_ladder.png)")
    if not rows:
        raise ValueError(f"{results}: no ladder with the rungs pce, cc4s and full")
    lines = [
        pictures[0],
        "",
        "*What each part of the method gives, all at one network and one budget; scores in percent on the test split,",
        "mean ± standard deviation over seeds. [All numbers and the protocol](docs/results/README.md).*",
        "",
        "| | scribbles alone | CC4S | full supervision | gap closed |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    return "\n".join([START, *lines, END])


def with_block(readme: str, block: str) -> str:
    """The README with the block in place of the old one, or of the picture of the demonstration."""
    if START in readme:
        return readme[: readme.index(START)] + block + readme[readme.index(END) + len(END) :]
    picture = re.search(r"!\[[^]]*\]\(docs/results/demo\.png\)\n\n\*From `make demo`.*?\*\n", readme, re.DOTALL)
    if picture is None:
        raise ValueError("README.md: neither the block of results nor the picture of the demonstration")
    return readme[: picture.start()] + block + "\n" + readme[picture.end() :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=str(__doc__).splitlines()[0])
    parser.add_argument("command", choices=("cpu", "gpu", "tune", "docs"))
    parser.add_argument("words", nargs="*", metavar="key=value", help="configuration over that of all runs")
    parser.add_argument("--data", type=Path, help=f"the folder of {', '.join(FOLDERS.values())}")
    parser.add_argument("--dataset", choices=tuple(FOLDERS), help="only this one: two commands may run side by side")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--readme", action="store_true", help="docs: also put picture and numbers into README.md")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.command == "docs":
        for file in write_pages():
            print(file.relative_to(ROOT))
        readme = ROOT / "README.md"
        text = readme.read_text("utf-8")
        if parsed.readme or START in text:
            readme.write_text(with_block(text, readme_block()), "utf-8")
        return 0
    from cc4s.errors import UserError

    if parsed.data is None:
        parser.error(f"--data: not given, expected the folder of {', '.join(FOLDERS.values())}")
    datasets = [parsed.dataset] if parsed.dataset else list(FOLDERS)
    began = time.monotonic()
    try:
        if parsed.command == "tune":
            done = run_searches(datasets, parsed.data, parsed.minutes, parsed.words)
        else:
            jobs = [job for job in (CPU if parsed.command == "cpu" else GPU) if job.dataset in datasets]
            done = run_jobs(jobs, parsed.data, parsed.minutes, parsed.words)
    except UserError as error:
        print(f"results: error: {error}", file=sys.stderr)
        return 2
    state = "everything is done" if done else "time is over; the same command goes on"
    print(f"{state} ({(time.monotonic() - began) / 60:.1f} minutes); pages and plots in {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cc4s").setLevel(logging.INFO)
    sys.exit(main())
