"""Proves and measures everything on a machine with a GPU, and needs no network: `make gpu`, or

    python -m tools.gpu [--out DIR] [--parts build test sanitize bench] [--ops random_walk ...] [--minutes 9.5]
                        [--dry-run]

build: the C++ and the CUDA extension in place, for the GPU that is there. test: the self-test, also with CUDA kernels
compiled at run time, and the tests marked `gpu`, a process for each file. sanitize: compute-sanitizer (memcheck,
racecheck) on a forward and a backward of each op. bench: each op at its published sizes against its baselines.

Every part has its share of the time, and what it does not use is left to the next. Each command is a process of its
own: what fails, hangs or crashes loses nothing of the others. After each one DIR/<gpu>-<date>.json is renewed:

    machine    GPU, clocks, driver, versions, commit
    backends   for each op its backends on this machine, or why there is none
    missing    what is not installed, and what is left out without it
    parts      for each part its outcome (passed, failed, timed out, left out, not run) and its jobs: command, seconds,
               outcome, reason, and the counts, failures and skips of tests
    rates, rows   the benchmark rows as benchmarks/run.py writes them, and the rates of the machine that they refer to

Beside it stand the tables (.md, .csv), the plot (.png) and DIR/<part>.log. A second run on the same day at the same
commit adds its parts to the file. Exit code: 0 if nothing failed, 1 if something did, 2 without a CUDA device.

Uses the standard library only: what is not installed is a line in `missing` and not a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools import nvcc

ROOT = Path(__file__).resolve().parents[1]

# Part -> its share of the time.
SHARES = {"build": 0.15, "test": 0.25, "sanitize": 0.2, "bench": 0.4}

# What a process gets to write its results after it was asked to stop.
GRACE = 10.0

# From good to bad: a part is as good as its worst job.
OUTCOMES = ("passed", "left out", "not run", "timed out", "failed")

MODULES = {
    "scipy": "cc4s_kernels itself",
    "triton": "the Triton backend, and torch.compile as a baseline",
    "setuptools": "the build",
    "pytest": "the tests and compute-sanitizer, which runs some of them",
    "hypothesis": "property tests (none of them needs a GPU)",
    "expecttest": "tests with torch.library.opcheck",
    "skimage": "scikit-image as a baseline",
    "matplotlib": "plots",
    "cupy": "kernels compiled at run time, and tests of CuPy arrays",
    "flash_attn_interface": "FlashAttention-3 as a baseline",
}
"""Modules, and what is left out without them."""

PACKAGES = ("torch", "triton", "numpy", "scipy", "cupy-cuda13x", "pytest", "scikit-image", "ninja")


@dataclass(frozen=True)
class Job:
    """One command. lacking: why it cannot run. junit: where pytest writes what became of each test. rows: where
    benchmarks/run.py writes. nothing: what exit code 5 (pytest: no test was selected) means."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    lacking: str | None = None
    junit: Path | None = None
    rows: Path | None = None
    nothing: str | None = None

    @property
    def line(self) -> str:
        """The command for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


@dataclass
class Result:
    """What became of a job."""

    name: str
    command: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    tests: dict[str, Any] | None = None


@dataclass(frozen=True)
class Setting:
    """What the commands depend on. architectures: as in TORCH_CUDA_ARCH_LIST. work: where jobs write what is then
    collected. seconds: time for a benchmark case."""

    work: Path
    ops: tuple[str, ...]
    architectures: str
    compiler: Path | None
    sanitizer: Path | None
    seconds: float
    python: str = sys.executable


# ---- what is here


def facts() -> dict[str, Any]:
    """The machine and the backends of each op; imports torch, so it runs in a process of its own."""
    import torch

    from benchmarks import harness

    found: dict[str, Any] = {"device": torch.cuda.is_available()}
    found["machine"] = harness.machine(torch.device("cuda:0" if found["device"] else "cpu"))
    try:
        from cc4s_kernels import info

        found["backends"] = {op: info.availability(op) for op in info.OPS}
    except ImportError as error:
        found["backends"] = {"cc4s_kernels": str(error)}
    return found


def _facts_of(python: str) -> dict[str, Any]:
    """`facts`, or why there are none as `error`."""
    command = [python, "-m", "tools.gpu", "--facts"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment({}))
    if result.returncode != 0:
        return {"device": False, "machine": {}, "backends": {}, "error": _last_line(result.stderr)}
    return json.loads(result.stdout.splitlines()[-1])


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def find_sanitizer(compiler: Path | None) -> Path | None:
    """compute-sanitizer of PATH, of nvcc's toolkit, or of /usr/local/cuda."""
    toolkits = [compiler.resolve().parents[1]] if compiler else []
    places = [home / folder for home in (*toolkits, Path("/usr/local/cuda")) for folder in ("bin", "compute-sanitizer")]
    on_path = shutil.which("compute-sanitizer")
    candidates = [*([Path(on_path)] if on_path else []), *(place / "compute-sanitizer" for place in places)]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def missing(compiler: Path | None, sanitizer: Path | None) -> dict[str, str]:
    """What is not installed, and what is left out without it."""
    found = {name: lost for name, lost in MODULES.items() if importlib.util.find_spec(name) is None}
    tools = {
        "nvcc": (compiler, "the CUDA extension"),
        "compute-sanitizer": (sanitizer, "the part sanitize"),
        "ninja": (_which("ninja"), "the build"),
        "g++": (_which("g++"), "the build, and torch.compile as a baseline"),
        "nvidia-smi": (_which("nvidia-smi"), "driver and clocks in the results"),
    }
    return found | {name: lost for name, (path, lost) in tools.items() if path is None}


def _which(name: str) -> str | None:
    return shutil.which(name, path=_environment({})["PATH"])


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job: console scripts of this Python and the repository are found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **changes}


def architecture(capability: Sequence[int] | None) -> str:
    """For TORCH_CUDA_ARCH_LIST: that of the device; without one what the environment says, or all."""
    if capability is None:
        return os.environ.get("TORCH_CUDA_ARCH_LIST") or nvcc.ARCHITECTURES
    number = ".".join(map(str, capability))
    # The instructions of Hopper that no other chip has.
    return "9.0a" if number == "9.0" else number


# ---- the jobs of each part


def all_ops() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in (ROOT / "cc4s_kernels/ops").glob("*/__init__.py")))


def build_jobs(setting: Setting) -> Iterator[Job]:
    lacking = _lacking("setuptools") or (None if _which("ninja") else "ninja is not found")
    command = (setting.python, "setup.py", "build_ext", "--inplace")
    # One after the other: a CUDA kernel that does not compile leaves the C++ extension.
    yield Job("cpu", command, {"CC4S_KERNELS_CUDA": "0"}, lacking)
    lacking = lacking or (None if setting.compiler else "nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda")
    yield Job("cuda", command, {"CC4S_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": setting.architectures}, lacking)


def gpu_test_files(ops: Sequence[str]) -> list[Path]:
    """Test files with tests for a GPU; where only some ops are asked for, the file of each."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name != "test_gpu_tool.py"]
    files = [path for path in files if re.search(r"mark\.gpu|OpTester\)", path.read_text())]
    names = {f"test_{op}.py" for op in ops}
    return files if set(ops) == set(all_ops()) else [path for path in files if path.name in names]


def test_jobs(setting: Setting) -> Iterator[Job]:
    selftest = (setting.python, "-m", "cc4s_kernels.info", "--selftest")
    yield Job("selftest", selftest)
    yield Job("selftest of run-time kernels", selftest, {"CC4S_KERNELS_JIT": "1"}, _lacking("cupy"))
    for path in gpu_test_files(setting.ops):
        yield _pytest(setting, path.stem.removeprefix("test_"), path, [], {})


def sanitize_jobs(setting: Setting) -> Iterator[Job]:
    lacking = None if setting.sanitizer else "compute-sanitizer is not found in PATH, CUDA_HOME or /usr/local/cuda"
    for number, (tool, op) in enumerate((tool, op) for tool in ("memcheck", "racecheck") for op in setting.ops):
        # A port of its own for each one, as several run at a time.
        sanitizer = [str(setting.sanitizer or "compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"]
        sanitizer += ["--base-port", str(6300 + 20 * number)]
        # Blocks of the allocator are no tensors: memcheck would not see where one ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        path = ROOT / f"tests/ops/test_{op}.py"
        yield _pytest(setting, f"{tool} {op}", path, sanitizer, environment, lacking)


def _pytest(
    setting: Setting,
    name: str,
    path: Path,
    sanitizer: Sequence[str],
    environment: Mapping[str, str],
    lacking: str | None = None,
) -> Job:
    junit = setting.work / f"{name.replace(' ', '-')}.xml"
    words = [setting.python, "-m", "pytest", str(path.relative_to(ROOT)), "-m", "gpu", "-v"]
    words += ["-p", "no:cacheprovider", f"--junitxml={junit}"]
    nothing = "it has no test for a GPU"
    if sanitizer:
        # A forward and a backward of an op run there, twice, and the reference has no kernels.
        words += ["-k", "test_repeats_bitwise and not reference"]
        nothing = "no Triton or CUDA kernel runs here"
    lacking = lacking or _lacking("pytest")
    return Job(name, (*sanitizer, *words), {**environment, "OMP_NUM_THREADS": "2"}, lacking, junit, nothing=nothing)


def bench_jobs(setting: Setting) -> Iterator[Job]:
    words = ("--device", "cuda", "--seconds", f"{setting.seconds:g}", "--rates", str(setting.work / "rates.json"))
    for op in setting.ops:
        rows = setting.work / f"bench-{op}.json"
        lacking = None if (ROOT / f"benchmarks/bench_{op}.py").exists() else f"there is no benchmarks/bench_{op}.py"
        command = (setting.python, "-m", "benchmarks.run", "--op", op, *words, "--json", str(rows))
        yield Job(op, command, {}, lacking, rows=rows)


def _lacking(module: str) -> str | None:
    return f"{module} is not installed" if importlib.util.find_spec(module) is None else None


JOBS: dict[str, Callable[[Setting], Iterator[Job]]] = {
    "build": build_jobs,
    "test": test_jobs,
    "sanitize": sanitize_jobs,
    "bench": bench_jobs,
}


def workers(part: str) -> int:
    """How many jobs of a part run at a time: builds use every core, and timings share the GPU with nobody."""
    return max(1, min(8, (os.cpu_count() or 1) // 2)) if part in ("test", "sanitize") else 1


# ---- running them


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    start: float
    limit: float
    asked: float | None = None

    def signal(self, number: int) -> None:
        # The whole group: compute-sanitizer and pytest have children.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_jobs(
    jobs: Sequence[Job], log: Path, parallel: int, seconds: float, done: Callable[[Result], None], grace: float = GRACE
) -> None:
    """Runs jobs, `parallel` at a time, and calls `done` with what became of each one, as soon as it is known.

    A job that is still running at the end of the time is interrupted (pytest then writes its results), and killed
    after `grace` seconds. Of jobs that run one at a time, one that hangs leaves half of the time to the others.
    Output is appended to `log`, job by job.
    """
    waiting = list(jobs)
    running: list[_Running] = []
    end = time.monotonic() + seconds
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                if job.lacking is not None:
                    done(Result(job.name, job.line, "left out", reason=job.lacking))
                elif now >= end:
                    done(Result(job.name, job.line, "not run", reason="no time was left"))
                else:
                    left = end - now
                    limit = left / 2 if waiting and parallel == 1 else left
                    running.append(_start(job, log, now, limit))
            for one in list(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    done(_finish(one, log))
                elif one.asked is None and now > one.start + one.limit:
                    one.asked = now
                    one.signal(signal.SIGINT)
                elif one.asked is not None and now > one.asked + grace:
                    one.signal(signal.SIGKILL)
            time.sleep(0.05)
    finally:
        for one in running:
            one.signal(signal.SIGKILL)
            one.process.wait()
            done(_finish(one, log, "not run", "interrupted"))


def _start(job: Job, log: Path, now: float, limit: float) -> _Running:
    own = log.with_name(f"{log.stem}-{job.name.replace(' ', '-')}.log")
    for path in (job.junit, job.rows):
        if path is not None:
            path.unlink(missing_ok=True)
    with own.open("wb") as file:
        file.write(f"$ {job.line}\n".encode())
        file.flush()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(job.environment),
            start_new_session=True,
        )
    return _Running(job, process, own, now, limit)


def _finish(one: _Running, log: Path, outcome: str = "", reason: str = "") -> Result:
    text = one.log.read_text(errors="replace")
    with log.open("a") as file:
        file.write(f"{text.rstrip()}\n\n")
    one.log.unlink()
    code, seconds = one.process.returncode, round(time.monotonic() - one.start, 1)
    if not outcome:
        if one.asked is not None:
            outcome, reason = "timed out", f"stopped after {one.limit:.0f} s; last line: {_last_line(text)}"
        elif code == 0:
            outcome = "passed"
        elif code == 5 and one.job.nothing is not None:
            outcome, reason = "left out", one.job.nothing
        else:
            outcome, reason = "failed", f"exit code {code}; last line: {_last_line(text)}"
    tests = junit_summary(one.job.junit)
    if outcome == "passed" and tests is not None and tests["passed"] == 0:
        outcome, reason = "left out", f"every test was skipped: {'; '.join(tests['skips'])}"
    return Result(one.job.name, one.job.line, outcome, seconds, reason, tests)


def junit_summary(path: Path | None) -> dict[str, Any] | None:
    """Of a JUnit file the counts, the failures by name with their first line, and the skips by reason."""
    if path is None or not path.exists():
        return None
    try:
        root = ElementTree.parse(path)
    except ElementTree.ParseError:
        return None
    failures: dict[str, str] = {}
    skips: Counter[str] = Counter()
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                message = found.get("message") or found.text or ""
                failures[name] = (message.splitlines() or [""])[0][:300]
        if (found := case.find("skipped")) is not None:
            skips[found.get("message") or ""] += 1
    # Not the number of entries: a test that was interrupted has one too.
    passed = 0
    for suite in root.iter("testsuite"):
        total, *others = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
        passed += total - sum(others)
    return {"passed": passed, "failed": len(failures), "failures": failures, "skips": dict(skips)}


def part_outcome(jobs: Sequence[Result]) -> str:
    """That of the worst job; a part of which anything passed is not left out."""
    outcomes = {job.outcome for job in jobs}
    if outcomes <= {"passed", "left out"} and "passed" in outcomes:
        return "passed"
    return max(outcomes, key=OUTCOMES.index, default="left out")


# ---- the file of results


class Record:
    """The file of results, renewed by `write`."""

    def __init__(self, out: Path, machine: dict[str, Any]) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "no gpu").lower()).strip("-")
        self.path = out / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
        self.content: dict[str, Any] = {"machine": machine, "backends": {}, "missing": {}, "parts": {}}
        self.content |= {"rates": None, "rows": []}
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            if earlier["machine"].get("commit") == machine.get("commit"):
                self.content |= {key: earlier[key] for key in ("parts", "rates", "rows")}
            else:
                self.path = self.path.with_stem(f"{self.path.stem}-{machine.get('commit')}")

    def add_rows(self, path: Path) -> None:
        """Takes the rows of a benchmark run, in the place of earlier ones of the same cases."""
        if not path.exists():
            return
        found = json.loads(path.read_text())

        def case(row: dict[str, Any]) -> str:
            return json.dumps([row[key] for key in ("op", "size", "dtype", "pass_")])

        new = {case(row) for row in found["rows"]}
        self.content["rows"] = [row for row in self.content["rows"] if case(row) not in new] + found["rows"]
        self.content["rates"] = found["rates"]
        # Clocks under load.
        self.content["machine"] |= found["machine"]

    def write(self) -> None:
        # In one step: a reader, or a run that is killed, never sees half a file.
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)

    def write_tables(self) -> None:
        """Tables and plot beside the JSON file."""
        from benchmarks import report

        files = report.files(self.content) if self.content["rows"] else {}
        for suffix, data in files.items():
            self.path.with_suffix(suffix).write_bytes(data)
        page = files.get(".md", b"").decode()
        self.path.with_suffix(".md").write_text(f"{self.page()}\n{page}")

    def page(self) -> str:
        """What became of each part, as Markdown."""
        gpu = self.content["machine"].get("gpu", "No GPU")
        lines = [f"# {gpu}", "", "| part | job | outcome | s | |", "|---|---|---|---:|---|"]
        for part, content in self.content["parts"].items():
            for job in content["jobs"]:
                tests = job["tests"]
                remark = f"{tests['passed']} passed, {tests['failed']} failed" if tests else ""
                remark = "; ".join(filter(None, [remark, job["reason"].replace("|", "/")]))
                lines.append(f"| {part} | {job['name']} | {job['outcome']} | {job['seconds']:.0f} | {remark} |")
        lines += ["", *(f"Not installed: {name}. Left out: {lost}." for name, lost in self.content["missing"].items())]
        return "\n".join(lines) + "\n"


# ---- the command


def run_part(part: str, jobs: Sequence[Job], record: Record, seconds: float) -> str:
    """Runs the jobs of a part and records each; returns the outcome of the part."""
    log = record.path.parent / f"{part}.log"
    log.unlink(missing_ok=True)
    rows = {job.name: job.rows for job in jobs if job.rows is not None}
    results: list[Result] = []
    start = time.monotonic()

    def done(result: Result) -> None:
        results.append(result)
        if result.name in rows:
            record.add_rows(rows[result.name])
        record.content["parts"][part] = {
            "outcome": part_outcome(results),
            "seconds": round(time.monotonic() - start, 1),
            "jobs": [asdict(one) for one in results],
        }
        record.write()
        counts = f"  {result.tests['passed']} passed, {result.tests['failed']} failed" if result.tests else ""
        line = f"{part:<9}{result.name:<36}{result.outcome:<10}{result.seconds:6.0f} s{counts}  {result.reason}"
        print(line.rstrip(), flush=True)

    run_jobs(jobs, log, workers(part), seconds, done)
    return part_outcome(results)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--ops", nargs="+", choices=all_ops(), default=list(all_ops()))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each benchmark case, without compilation")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.facts:
        print(json.dumps(facts()))
        return 0

    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    parts = [part for part in SHARES if part in options.parts]
    found = _facts_of(sys.executable)
    machine = found["machine"]
    compiler = nvcc.find()
    sanitizer = find_sanitizer(compiler)
    setting = Setting(
        out / "parts",
        tuple(sorted(options.ops)),
        architecture(machine.get("capability")),
        compiler,
        sanitizer,
        options.seconds,
    )
    lost = missing(compiler, sanitizer)
    if options.dry_run:
        for part in parts:
            print(f"# {part}, {workers(part)} at a time, in {ROOT}")
            for job in JOBS[part](setting):
                print(job.line if job.lacking is None else f"# left out, {job.lacking}: {job.line}")
        return 0
    for name, what in lost.items():
        print(f"missing  {name}: left out {what}")
    if not found["device"] and parts != ["build"]:
        reason = f" ({found['error']})" if "error" in found else ""
        print(f"no CUDA device{reason}: only --parts build and --dry-run work without one", file=sys.stderr)
        return 2

    setting.work.mkdir(parents=True, exist_ok=True)
    machine["versions"] = _versions(compiler)
    record = Record(out, machine)
    record.content["missing"] = lost
    record.content["backends"] = found["backends"]
    rates = setting.work / "rates.json"
    rates.unlink(missing_ok=True)
    if record.content["rates"] is not None:
        rates.write_text(json.dumps(record.content["rates"]))
    # A time limit from outside ends the run in good order.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for index, part in enumerate(parts):
            left = max(0.0, deadline - time.monotonic() - GRACE)
            share = SHARES[part] / sum(SHARES[later] for later in parts[index:])
            run_part(part, list(JOBS[part](setting)), record, left * share)
            if part == "build":
                # What was built is there now.
                record.content["backends"] = _facts_of(sys.executable)["backends"]
    except KeyboardInterrupt:
        print("interrupted: what was finished is in the file", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        record.write()
        record.write_tables()
        print(record.path)
    shutil.rmtree(setting.work)
    outcomes = [record.content["parts"][part]["outcome"] for part in parts]
    return 0 if set(outcomes) <= {"passed", "left out"} else 1


def _versions(compiler: Path | None) -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    if compiler is not None:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        found["nvcc"] = _last_line(result.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
