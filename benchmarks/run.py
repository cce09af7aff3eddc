"""Runs benchmarks: python -m benchmarks.run --op random_walk --device cpu --json FILE.

Writes FILE (every row, the machine and its measured rates), and beside it FILE.csv, FILE.md (tables) and FILE.png.
Ends with exit code 1 if a result is wrong or a kernel of this package failed; the row says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.harness import Case, Rates, Row, machine, measure_rates, own_peak_memory, run_case
from benchmarks.registry import BENCHMARKS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=sorted(BENCHMARKS), help="repeat for several; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", action="append", help="float32, bfloat16, float16; the op's own by default")
    parser.add_argument("--size", action="append", metavar="K=V,...", help="replaces sizes, e.g. N=1024")
    parser.add_argument("--pass", dest="passes", action="append", choices=("forward", "forward+backward"))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each case")
    parser.add_argument("--limit", type=float, help="leaves out a provider that needs more s for a call; 300 on a CPU")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="the machine's rates: read, or measured and written")
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
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device", file=sys.stderr)
            return 2
        # Float32 is float32 for every provider: no TF32.
        torch.set_float32_matmul_precision("highest")
    if options.limit is None:
        options.limit = 300.0 if device.type == "cpu" else float("inf")
    names = options.op or list(BENCHMARKS)
    # Small ones first: a run that is broken off has most of its rows.
    cases = sorted((case for name in names for case in _cases(name, options)), key=lambda case: case.size.get("N", 0))
    rates = _rates(options.rates, device, {case.dtype for case in cases})
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.title}", file=sys.stderr, flush=True)
        # What was compiled for another size would make torch compile for any size.
        torch.compiler.reset()
        providers = BENCHMARKS[case.op].providers(case, device)
        if device.type == "cuda":
            providers = [provider for provider in providers if not provider.name.startswith("cc4s cpu")]
        rows += run_case(
            case,
            providers,
            device,
            rates,
            seconds=options.seconds,
            memory=not options.no_memory,
            limit=options.limit,
        )
        if options.json:
            content = {"machine": machine(device), "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
            # After every case: a broken run keeps what it has.
            report.write(options.json, content)
    print(report.markdown([asdict(row) for row in rows]), flush=True)
    broken = [row for row in rows if row.broken]
    for row in broken:
        print(f"{row.op} {row.size} {row.dtype} {row.pass_}, {row.provider}: {row.note}", file=sys.stderr)
    return 1 if broken else 0


def _cases(name: str, options: argparse.Namespace) -> list[Case]:
    module: Any = BENCHMARKS[name]
    changes: dict[str, Any] = {}
    if options.device == "cuda":
        # Where a GPU is given more at once than a CPU, or other dtypes.
        given = {"sizes": "GPU_SIZES", "dtypes": "GPU_DTYPES"}
        changes = {name: getattr(module, key) for name, key in given.items() if hasattr(module, key)}
    if options.dtype:
        changes["dtypes"] = options.dtype
    if options.size:
        given = [dict(pair.split("=") for pair in words.split(",")) for words in options.size]
        changes["sizes"] = [{**module.SIZES[0], **{key: int(value) for key, value in size.items()}} for size in given]
    cases: list[Case] = module.cases(**changes)
    return [case for case in cases if not options.passes or case.pass_ in options.passes]


def _rates(path: Path | None, device: torch.device, dtypes: set[str]) -> Rates:
    """The rates of `path`, so that several runs have the same; what it lacks is measured and added."""
    rates = Rates(**json.loads(path.read_text())) if path and path.exists() else Rates()
    lacking = {dtype for dtype in dtypes if getattr(torch, dtype).is_floating_point} - set(rates.gemm)
    if not rates.exp or lacking:
        found = measure_rates(device, sorted(lacking))
        rates = Rates(rates.gemm | found.gemm, rates.exp or found.exp, rates.copy or found.copy)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(rates)))
    return rates


if __name__ == "__main__":
    sys.exit(main())
