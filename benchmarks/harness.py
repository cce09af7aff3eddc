"""Timing of providers side by side, with correctness, memory and roofline on every row.

A provider is one way to compute a case (an op, sizes, a dtype and a pass). All providers of a case run in turn, round
after round, so that whatever else the machine does falls on all of them; a row holds the median and the 20th and 80th
percentile over rounds. Before it is timed, every provider is compared with the case's definition.

On a GPU a call is timed between two events, and before each call `FLUSH_BYTES` are written: no input is in a cache, and
the host has that long (0.1 to 0.3 ms) to queue the call. Of what the host needs for a call, only the rest shows.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]

# What each length of a case becomes for a warm-up: positions, logits, pixels, superpixels.
SMALL = {"N": 256, "h": 16, "w": 16, "H": 64, "W": 64, "K": 16}
# Several times the last-level cache of any GPU.
FLUSH_BYTES = 1 << 29


@dataclass(frozen=True)
class Case:
    """What is computed.

    op, size, dtype ("float32", "bfloat16", ...), pass_ ("forward" or "forward+backward").
    flops: floating point operations of the definition. exps: exponentials. bytes: least traffic, inputs and outputs
    once. Each formula stands where the case is made.
    """

    op: str
    size: dict[str, int]
    dtype: str
    pass_: str
    flops: float
    exps: float
    bytes: float

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        size = " ".join(f"{key}={value}" for key, value in self.size.items())
        return f"{self.op} {size} {self.dtype} {self.pass_}"


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    make: case and device -> what runs it once and returns outputs and gradients.
    reference: name of the provider whose results it must equal; None is not compared (it is the definition).
    tolerance: largest relative L2 error of any returned tensor, with its reason where it is made.
    power: its time grows with N to this power; says beforehand how long a large case will take.
    """

    name: str
    make: Callable[[Case, torch.device], Run]
    reference: str | None = None
    tolerance: float = 1e-4
    note: str = ""
    power: int = 2


@dataclass
class Row:
    """One measured line; without times where the provider was left out, failed, or is wrong, as `note` says."""

    op: str
    size: dict[str, int]
    dtype: str
    pass_: str
    provider: str
    median: float | None
    low: float | None
    high: float | None
    rounds: int
    memory_mb: float | None
    error: float | None
    flop_rate: float | None
    roofline_share: float | None
    note: str = ""

    @property
    def broken(self) -> bool:
        """A wrong result, or a kernel of this package that failed. A baseline may run out of memory."""
        return self.note.startswith("wrong") or (self.note.startswith("failed") and self.provider.startswith("cc4s"))


@dataclass
class Rates:
    """What the machine reaches in this run, for the roofline: measured, not quoted.

    gemm: FLOP/s of a cubic matrix product (2048 on a CPU, 8192 on a GPU), by dtype. exp: exponentials per second, on a
    GPU of its instruction for them. copy: bytes per second read plus written.
    """

    gemm: dict[str, float] = field(default_factory=dict)
    exp: float = 0.0
    copy: float = 0.0

    def seconds(self, case: Case) -> float | None:
        """The least time of a case: the slowest of its products, exponentials and traffic."""
        gemm = self.gemm.get(case.dtype, 0.0)
        parts = ((case.flops, gemm), (case.exps, self.exp), (case.bytes, self.copy))
        if any(amount and not rate for amount, rate in parts):
            return None
        return max((amount / rate for amount, rate in parts if amount), default=None)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a baseline, compiled at its first call."""
    made: list[Callable[..., Any]] = []

    def run(*arguments: Any) -> Any:
        if not made:
            # Each size for itself: a graph of any size would be a weaker baseline.
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def timed(run: Run, device: torch.device) -> float:
    """Seconds of one call; the module says how on a GPU."""
    synchronize(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_buffer(device).zero_()
        begin.record()
        run()
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def measure_rates(device: torch.device, dtypes: Sequence[str]) -> Rates:
    """Medians of seven runs each, or of what fits into two seconds; on a GPU of as many as raise its clocks."""
    rates = Rates()
    gpu = device.type == "cuda"

    def best(run: Run) -> float:
        times = [timed(run, device)]
        # The first call on a GPU compiles or loads the kernel.
        if gpu or times[0] < 2:
            times = [timed(run, device)]
        while (sum(times) < 0.3) if gpu else (len(times) < 7 and sum(times) < 2):
            times.append(timed(run, device))
        return quantile(times, 0.5)

    n = 8192 if gpu else 2048
    for dtype in dtypes:
        if not getattr(torch, dtype).is_floating_point:
            continue
        a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
        rates.gemm[dtype] = 2 * n**3 / best(lambda a=a: (a @ a,))
    # Larger than the caches; outputs are preallocated, so that page faults do not count.
    x = torch.randn(1 << (28 if gpu else 25), device=device)
    out = torch.empty_like(x)
    rates.copy = 2 * x.numel() * 4 / best(lambda: (out.copy_(x),))
    # The rate of the instruction, not of memory: inside the cache, or a kernel that reads nothing.
    if gpu:
        from benchmarks import exp_rate

        rates.exp = exp_rate.COUNT / best(lambda: (exp_rate.run(device),))
        return rates
    small = torch.randn(1 << 16, device=device)
    small_out = torch.empty_like(small)
    rates.exp = small.numel() / best(lambda: (torch.exp(small, out=small_out),))
    return rates


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error over the tensors of a result, NaN if any is; infinite where integers differ."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not (b.is_floating_point() or b.is_complex()):
            worst = worst if torch.equal(a, b) else float("inf")
            continue
        norm = float(b.double().norm())
        error = float((a.double() - b.double()).norm()) / max(norm, 1e-30)
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def peak_memory(op: str, provider: str, case: Case, run: Run, device: torch.device) -> float:
    """MB that one call needs beyond its inputs: of the allocator (GPU, where `run` is warm), or of a process of its
    own (CPU)."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    words = ["--memory", json.dumps({"op": op, "provider": provider, "case": asdict(case)})]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *words], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{provider} on {case.title}: {result.stderr.strip().splitlines()[-1:]}")
    return float(result.stdout.strip().splitlines()[-1])


def own_peak_memory(op: str, provider: str, case: Case) -> float:
    """MB by which this process's high-water mark grows in one call; inputs and libraries are there before."""
    from benchmarks.registry import provider_of

    device = torch.device("cpu")
    made = provider_of(op, provider)
    # A tiny case first: code, thread pools and workspaces of the libraries are not the op's memory.
    size = {key: min(value, SMALL.get(key, value)) for key, value in case.size.items()}
    tiny = Case(case.op, size, case.dtype, case.pass_, 0, 0, 0)
    made.make(tiny, device)()
    run = made.make(case, device)
    if provider.startswith("compiled"):
        # Compiled for each size; the compiler's memory is not the baseline's.
        run()
    gc.collect()
    # The high-water mark is reset: a child process starts with that of its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mb()
    run()
    return _high_water_mb() - before


def _high_water_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def expected_seconds(case: Case, provider: Provider, device: torch.device) -> float:
    """What one call of a case with a large N will take, from a call at N = 1024; 0 for a small one."""
    n = case.size.get("N", 0)
    if n <= 4096:
        return 0.0
    small = Case(case.op, {**case.size, "N": 1024}, case.dtype, case.pass_, 0, 0, 0)
    run = provider.make(small, device)
    run()
    return timed(run, device) * (n / 1024) ** provider.power


def run_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    rates: Rates,
    *,
    seconds: float,
    memory: bool,
    limit: float = float("inf"),
) -> list[Row]:
    """Rows of one case.

    Args:
        case, providers: what and how. device: where. rates: for the roofline.
        seconds: time to spend; at least three rounds are run. Of a provider that takes longer than this for one call
            the first call counts, and there is no other.
        memory: measure peak memory too.
        limit: a provider that would take longer than this for one call is left out, and its row says so.

    A provider that raises or whose result is wrong has a row without times that says so, and the others go on.
    """
    runs: dict[str, Run] = {}
    results: dict[str, list[Tensor]] = {}
    notes = {provider.name: provider.note for provider in providers}
    times: dict[str, list[float]] = {}
    for provider in providers:
        try:
            expected = expected_seconds(case, provider, device) if limit < float("inf") else 0.0
            if expected > limit:
                notes[provider.name] = f"left out: about {expected:.0f} s a call"
                continue
            run = provider.make(case, device)
            start = time.perf_counter()
            results[provider.name] = [tensor.detach().to(device) for tensor in run()]
            synchronize(device)
        except Exception as error:
            notes[provider.name] = _failure(error)
            continue
        runs[provider.name] = run
        first = time.perf_counter() - start
        # Warm-up does not show in a call of that length; compilation does.
        once = first > max(seconds, 10) and device.type == "cpu" and not provider.name.startswith("compiled")
        times[provider.name] = [first] if once else []
    errors: dict[str, float | None] = {}
    for provider in providers:
        errors[provider.name] = None
        if provider.reference is None or provider.name not in results:
            continue
        if provider.reference not in results:
            notes[provider.name] = f"not compared: no result of {provider.reference}"
            continue
        found = relative_error(results[provider.name], results[provider.reference])
        errors[provider.name] = found
        # NaN is wrong too.
        if not found <= provider.tolerance:
            notes[provider.name] = f"wrong: relative error {found:.2e}, allowed {provider.tolerance:.0e}"
            del runs[provider.name], times[provider.name]
    del results
    quick = [name for name in runs if not times[name]]
    start = time.perf_counter()
    rounds = 0
    while quick and (time.perf_counter() - start < seconds or rounds < 3):
        rounds += 1
        for name in list(quick):
            try:
                times[name].append(timed(runs[name], device))
            except Exception as error:
                notes[name] = _failure(error)
                quick.remove(name)
                del times[name]
    least = rates.seconds(case)
    rows = []
    for provider in providers:
        values = times.get(provider.name)
        row = Row(
            *(case.op, case.size, case.dtype, case.pass_, provider.name),
            *(None, None, None, 0, None, errors[provider.name], None, None, notes[provider.name]),
        )
        if values:
            row.median, row.low, row.high = (quantile(values, share) for share in (0.5, 0.2, 0.8))
            row.rounds = len(values)
            row.flop_rate = case.flops / row.median
            row.roofline_share = least / row.median if least else None
            if memory:
                try:
                    row.memory_mb = round(peak_memory(case.op, provider.name, case, runs[provider.name], device), 1)
                except Exception as error:
                    row.note = f"memory: {_failure(error)}"
        rows.append(row)
    return rows


def _failure(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"left out: {error.name} is not installed (make peers)"
    lines = str(error).strip().splitlines() or [""]
    # A backend that does not take the case, such as a dtype, says why.
    if "cannot run there: " in lines[0]:
        return f"left out: {lines[0].partition('cannot run there: ')[2]}"
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    import numpy

    facts: dict[str, Any] = {
        "device": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["capability"] = list(torch.cuda.get_device_capability(device))
        # TF32 is off.
        facts["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
        chip = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        found = _output(["nvidia-smi", "-i", chip, f"--query-gpu={','.join(query)}", "--format=csv,noheader"])
        values = found.split(", ")
        # Else there is no nvidia-smi, or it does not know the device.
        if len(values) == len(query):
            facts |= dict(zip(query, values, strict=True))
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    """GIT_COMMIT names it for a copy of the files without the history."""
    return os.environ.get("GIT_COMMIT") or _output(["git", "describe", "--always", "--dirty"]) or "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
