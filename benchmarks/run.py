"""Runs benchmarks: python -m benchmarks.run --op random_walk --device cpu --json FILE.

Writes FILE (every row, the machine and its measured rates), and beside it FILE.csv, FILE.md (tables) and FILE.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.harness import Case, Row, machine, measure_rates, own_peak_memory, run_case
from benchmarks.registry import BENCHMARKS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=sorted(BENCHMARKS), help="repeat for several; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", action="append", help="float32, bfloat16, float16; the op's own by default")
    parser.add_argument("--size", action="append", metavar="K=V,...", help="replaces sizes, e.g. N=1024")
    parser.add_argument("--pass", dest="passes", action="append", choices=("forward", "forward+backward"))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each case")
    parser.add_argument("--limit", type=float, default=300.0, help="leaves out a provider that needs more s for a call")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        job = json.loads(options.memory)
        print(own_peak_memory(job["op"], job["provider"], Case(**job["case"])))
        return 0

    device = torch.device(options.device)
    names = options.op or list(BENCHMARKS)
    # Small ones first: a run that is broken off has most of its rows.
    cases = sorted((case for name in names for case in _cases(name, options)), key=lambda case: case.size.get("N", 0))
    rates = measure_rates(device, sorted({case.dtype for case in cases}))
    rows: list[Row] = []
    progress = tqdm(cases, file=sys.stderr, disable=None)
    for case in progress:
        progress.set_description(case.title)
        rows += run_case(
            case,
            BENCHMARKS[case.op].providers(case, device),
            device,
            rates,
            seconds=options.seconds,
            memory=not options.no_memory,
            limit=options.limit,
        )
        if options.json:
            _write(options.json, rows, rates, device)
    print(report.markdown([asdict(row) for row in rows]))
    return 0


def _cases(name: str, options: argparse.Namespace) -> list[Case]:
    module: Any = BENCHMARKS[name]
    changes: dict[str, Any] = {}
    if options.dtype:
        changes["dtypes"] = options.dtype
    if options.size:
        given = [dict(pair.split("=") for pair in words.split(",")) for words in options.size]
        changes["sizes"] = [{**module.SIZES[0], **{key: int(value) for key, value in size.items()}} for size in given]
    cases: list[Case] = module.cases(**changes)
    return [case for case in cases if not options.passes or case.pass_ in options.passes]


def _write(path: Path, rows: list[Row], rates: Any, device: torch.device) -> None:
    """JSON, CSV, tables and plot; renewed after every case, so that a broken run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(content["rows"][0]))
    writer.writeheader()
    writer.writerows(content["rows"])
    path.with_suffix(".csv").write_text(text.getvalue())
    path.with_suffix(".md").write_text(report.page(content))
    path.with_suffix(".png").write_bytes(report.plot(content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
