"""The benchmark suite runs, compares every provider with the definition, and writes its files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.harness import Case, Provider, Rates, Row, quantile, run_case
from benchmarks.registry import BENCHMARKS
from benchmarks.run import main
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
    assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_a_wrong_provider_is_caught() -> None:
    case = tiny("random_walk", "forward")
    right, *_ = BENCHMARKS["random_walk"].providers(case, CPU)

    def make(case: Case, device: torch.device):
        run = right.make(case, device)
        return lambda: [x * 1.01 for x in run()]

    wrong = Provider("wrong", make, right.name, 1e-4)
    with pytest.raises(AssertionError, match="wrong on random_walk"):
        run_case(case, [right, wrong], CPU, Rates(), seconds=0, memory=False)


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
    assert main([*words, "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert set(content["rows"][0]) == set(Row.__dataclass_fields__)
    assert content["machine"]["torch"] == torch.__version__
    assert "eager" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 3


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
