"""The benchmark suite runs, compares every provider with the definition, and writes its files."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import cc4s_kernels as ck
from benchmarks import harness, page, report
from benchmarks.harness import Case, Provider, Rates, Row, quantile, run_case
from benchmarks.registry import BENCHMARKS
from benchmarks.run import _cases, main
from cc4s_kernels import backends

CPU = torch.device("cpu")


# What each length of a case becomes.
TINY = {"N": 49, "H": 41, "W": 33, "K": 12}


def tiny_cases(op: str) -> list[Case]:
    module = BENCHMARKS[op]
    size = {key: TINY.get(key, value) for key, value in module.SIZES[0].items()}
    cases = module.cases([size])
    return [case for case in cases if case.dtype == cases[0].dtype]


def tiny(op: str, pass_: str) -> Case:
    return next(case for case in tiny_cases(op) if case.pass_ == pass_)


def test_every_op_has_a_benchmark() -> None:
    assert set(BENCHMARKS) == set(backends.ops())


@pytest.mark.parametrize("case", [case for op in BENCHMARKS for case in tiny_cases(op)], ids=lambda case: case.title)
def test_providers_agree(case: Case) -> None:
    # Compilation takes a minute and is measured elsewhere.
    providers = [p for p in BENCHMARKS[case.op].providers(case, CPU) if not p.name.startswith("compiled")]
    rows = run_case(case, providers, CPU, Rates(), seconds=0, memory=False)
    assert [row.provider for row in rows] == [p.name for p in providers]
    for row in rows:
        # On a machine with a GPU its backends do not take tensors of the CPU.
        if not row.note.startswith("left out: "):
            assert row.median is not None, row.note
            assert 0 < row.low <= row.median <= row.high


def test_a_wrong_provider_is_caught() -> None:
    case = tiny("random_walk", "forward")
    right, *_ = BENCHMARKS["random_walk"].providers(case, CPU)

    def make(case: Case, device: torch.device):
        run = right.make(case, device)
        return lambda: [x * 1.01 for x in run()]

    wrong = Provider("wrong", make, right.name, 1e-4)
    first, second = run_case(case, [right, wrong], CPU, Rates(), seconds=0, memory=False)
    assert first.median is not None
    assert not first.broken
    assert second.median is None
    assert second.broken
    assert second.note == "wrong: relative error 1.00e-02, allowed 1e-04"


def test_not_a_number_is_wrong() -> None:
    case = Case("op", {}, "float32", "forward", 0, 0, 0)
    right = Provider("right", lambda case, device: lambda: (torch.ones(2), torch.ones(2)))
    nan = Provider("nan", lambda case, device: lambda: (torch.tensor([1.0, float("nan")]), torch.ones(2)), "right")
    rows = run_case(case, [right, nan], CPU, Rates(), seconds=0, memory=False)
    assert [row.broken for row in rows] == [False, True]


def test_a_provider_that_raises_loses_only_its_own_row() -> None:
    case = tiny("random_walk", "forward")
    right, *_ = BENCHMARKS["random_walk"].providers(case, CPU)

    def raises(case: Case, device: torch.device):
        raise torch.OutOfMemoryError("2 GiB wanted\nand a long story")

    baseline, ours = Provider("eager two", raises), Provider("cc4s cuda", raises)
    follower = Provider("follower", right.make, "eager two")
    rows = run_case(case, [baseline, ours, right, follower], CPU, Rates(), seconds=0, memory=False)
    assert [row.note for row in rows[:2]] == 2 * ["failed: OutOfMemoryError: 2 GiB wanted"]
    assert [row.median is None for row in rows] == [True, True, False, False]
    assert [row.broken for row in rows] == [False, True, False, False]
    assert rows[3].note == "not compared: no result of eager two"
    assert "not compared" in report.markdown([asdict(row) for row in rows])


def test_a_provider_over_the_limit_is_left_out_and_says_so() -> None:
    case = Case("random_walk", {"B": 1, "N": 5000, "d": 4, "D": 4}, "float32", "forward", 1, 1, 1)
    module = BENCHMARKS["random_walk"]
    fast = Provider("fast", lambda case, device: lambda: (torch.zeros(1),))
    slow = Provider("slow", module.run_of(module.eager), "fast", power=30)
    rows = run_case(case, [fast, slow], CPU, Rates(), seconds=0, memory=False, limit=100.0)
    assert rows[0].rounds == 3
    assert rows[1].median is None
    assert rows[1].note.startswith("left out: about ")
    table = report.markdown([asdict(row) for row in rows])
    assert rows[1].note in table


def test_roofline_is_the_slowest_part() -> None:
    rates = Rates(gemm={"float32": 100.0}, exp=10.0, copy=1000.0)
    assert rates.seconds(Case("op", {}, "float32", "forward", 500, 20, 1000)) == 5.0
    assert rates.seconds(Case("op", {}, "float32", "forward", 100, 20, 1000)) == 2.0
    assert rates.seconds(Case("op", {}, "float32", "forward", 100, 5, 9000)) == 9.0
    assert rates.seconds(Case("op", {}, "bfloat16", "forward", 100, 5, 9000)) is None


def test_flop_counts_of_the_published_size() -> None:
    """1152 N^2 forward and 2432 N^2 - recomputing the scores included - are DESIGN's counts for (64, 512)."""
    forward, both = (tiny("random_walk", pass_) for pass_ in ("forward", "forward+backward"))
    assert forward.flops == 1152 * 49**2
    assert both.flops - forward.flops == 2432 * 49**2


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = BENCHMARKS["random_walk"]
    monkeypatch.setattr(module, "providers", lambda case, device: [Provider("eager", module.run_of(module.eager))])
    out = tmp_path / "x.json"
    words = ["--op", "random_walk", "--size", "N=30", "--dtype", "float32", "--seconds", "0", "--no-memory"]
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(asdict(Rates({"float32": 1e9}, exp=1e8, copy=1e10))))
    assert main([*words, "--rates", str(rates), "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["rates"] == json.loads(rates.read_text()) == {"gemm": {"float32": 1e9}, "exp": 1e8, "copy": 1e10}
    assert set(content["rows"][0]) == set(Row.__dataclass_fields__)
    assert content["machine"]["torch"] == torch.__version__
    assert "eager" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 3


def test_a_backend_that_does_not_take_a_case_is_left_out() -> None:
    case = Case("slic", {"B": 1}, "uint8", "forward", 0, 0, 0)

    def run() -> list[torch.Tensor]:
        with ck.use_backend("cuda"):
            return [ck.slic(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4)]

    (row,) = run_case(case, [Provider("cc4s cuda", lambda case, device: run)], CPU, Rates(), seconds=0, memory=False)
    assert row.note.startswith("left out: ")
    assert not row.broken


def test_a_broken_row_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = BENCHMARKS["random_walk"]
    right = Provider("eager", module.run_of(module.eager))
    wrong = Provider("cc4s none", module.run_of(lambda q, k, v: 2 * module.eager(q, k, v)), "eager")
    monkeypatch.setattr(module, "providers", lambda case, device: [right, wrong])
    monkeypatch.setattr("benchmarks.run.measure_rates", lambda device, dtypes: Rates())
    words = ["--op", "random_walk", "--size", "N=9", "--dtype", "float32", "--pass", "forward", "--seconds", "0"]
    assert main([*words, "--no-memory"]) == 1
    assert "float32 forward, cc4s none: wrong: relative error 1.00e+00" in capsys.readouterr().err


def test_sizes_of_a_gpu_are_those_of_the_op() -> None:
    """In a GPU's batch, and in nothing else."""
    options = argparse.Namespace(device="cuda", dtype=None, size=None, passes=None)
    for op, module in BENCHMARKS.items():
        found = _cases(op, options)
        assert {case.size["B"] for case in found} == {size["B"] for size in getattr(module, "GPU_SIZES", module.SIZES)}
        assert [{**case.size, "B": 1} in [{**size, "B": 1} for size in module.SIZES] for case in found] == [True] * len(
            found
        )
    assert {case.dtype for case in _cases("upsample_losses", options)} == {"float32", "bfloat16"}


def test_a_call_on_a_gpu_is_timed_behind_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events and memory of a GPU that there need not be: what is called, in which order, in which unit."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    class Buffer:
        def zero_(self) -> None:
            calls.append("write")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(harness, "_flush_buffer", lambda device: Buffer())
    monkeypatch.setattr(harness, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 8 << 20)

    def run() -> list[torch.Tensor]:
        calls.append("call")
        return []

    device = torch.device("cuda")
    assert harness.timed(run, device) == 2.5e-3
    assert calls == ["wait", "write", "event", "call", "event", "wait"]
    calls.clear()
    assert harness.peak_memory("op", "cc4s", Case("op", {}, "float32", "forward", 0, 0, 0), run, device) == 5.0
    assert calls == ["wait", "reset", "call", "wait"]


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "no CUDA device\n"


def test_times_have_three_digits() -> None:
    assert [report._ms(s) for s in (0.0000123456, 0.00123456, 0.123456, 12.3456)] == [
        "0.0123",
        "1.23",
        "123.5",
        "12345.6",
    ]


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def test_the_page_is_that_of_the_committed_results() -> None:
    """`make bench-page` renews it."""
    assert page.PAGE.read_text() == page.page(page.committed())


def test_the_fastest_of_both_sides_are_compared() -> None:
    def row(provider: str, median: float | None) -> dict[str, object]:
        case = {"op": "slic", "size": {"N": 1000}, "dtype": "uint8", "pass_": "forward"}
        return {**case, "provider": provider, "median": median, "roofline_share": None, "memory_mb": None}

    rows = [row("eager", 4e-3), row("compiled eager", 3e-3), row("failed", None), row("reference", 1e-3)]
    assert page.results_of(rows) == []
    rows += [row("cc4s cpu", 2e-3), row("cc4s triton", 1.5e-3), row("cc4s cpu, variant", 1e-4)]
    (result,) = page.results_of(rows)
    assert (result.ours["provider"], result.other["provider"], result.speedup) == ("cc4s triton", "compiled eager", 2.0)
    assert page.table([result])[-1] == (
        "| slic, N = 1,000, uint8, forward | triton | 1.5 | compiled eager | 3 | 2.00 |  |  |  |"
    )


def test_a_peer_that_is_not_installed_is_left_out_and_says_so() -> None:
    def absent(case: Case, device: torch.device):
        importlib.import_module("no_such_peer")

    case = Case("slic", {"B": 1}, "uint8", "forward", 0, 0, 0)
    (row,) = run_case(case, [Provider("peer", absent)], CPU, Rates(), seconds=0, memory=False)
    assert row.note == "left out: no_such_peer is not installed (make peers)"


def test_the_regression_suite_runs() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "benchmarks/test_speed.py", "-k", "slic or potts"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
