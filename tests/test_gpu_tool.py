"""`make gpu` plans, runs and records; the commands are small stand-ins, as there need be no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cc4s_kernels as ck
from tests import without_hypothesis
from tools import gpu, nvcc

H100 = {"gpu": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "commit": "1dc02aa"}
STEM = f"nvidia-h100-80gb-hbm3-{time.strftime('%Y-%m-%d', time.gmtime())}"


def python(name: str, code: str, **fields: Any) -> gpu.Job:
    return gpu.Job(name, (sys.executable, "-S", "-c", code), **fields)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine with a GPU and with every tool; changes to it count."""
    found: dict[str, Any] = {"device": True, "machine": dict(H100), "backends": {"slic": {"cuda": "available"}}}
    for name in ("nvcc", "compute-sanitizer"):
        tool = tmp_path / "toolkit/bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text("#!/bin/sh\necho release 13.0\n")
        tool.chmod(0o755)
    monkeypatch.setattr(gpu, "_facts_of", lambda python: json.loads(json.dumps(found)))
    monkeypatch.setattr(nvcc, "find", lambda: tmp_path / "toolkit/bin/nvcc")
    return found


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[gpu.Job]]:
    """The jobs of each part; one that passes, unless replaced."""
    found = {part: [python(f"{part} job", f"print('from {part}')")] for part in gpu.SHARES}

    def of(part: str) -> Any:
        return lambda setting: iter(found[part])

    monkeypatch.setattr(gpu, "JOBS", {part: of(part) for part in gpu.SHARES})
    return found


def read(out: Path, stem: str = STEM) -> dict[str, Any]:
    return json.loads((out / f"{stem}.json").read_text())


def row(op: str, provider: str, median: float) -> dict[str, Any]:
    times = {"median": median, "low": median, "high": median, "rounds": 3, "memory_mb": 1.0, "error": None}
    case = {"op": op, "size": {"N": 7}, "dtype": "float32", "pass_": "forward", "provider": provider}
    return {**case, **times, "flop_rate": 1.0, "roofline_share": 0.5, "note": ""}


def bench_content(*rows: dict[str, Any]) -> str:
    facts = {
        "processor": "p",
        "date": "d",
        "torch": "2.11",
        "python": "3.12",
        "threads": 2,
        "load": 0.0,
        "cuda": "13.0",
    }
    gpu_facts = {**H100, "clocks.sm": "1980 MHz", "float32_matmul_precision": "highest"}
    rates = {"gemm": {"float32": 1e12}, "exp": 1e12, "copy": 1e12}
    return json.dumps({"machine": facts | gpu_facts, "rates": rates, "rows": rows})


def test_dry_run_prints_the_exact_commands(
    machine: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--ops", "random_walk"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# ")]
    setup = f"{sys.executable} setup.py build_ext --inplace"
    pytest_ = f"{sys.executable} -m pytest tests/ops/test_random_walk.py -m gpu -v -p no:cacheprovider"
    parts, sanitizer = tmp_path / "parts", tmp_path / "toolkit/bin/compute-sanitizer"
    reduced = "-k 'test_repeats_bitwise and not reference'"
    assert lines == [
        f"CC4S_KERNELS_CUDA=0 {setup}",
        f"CC4S_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a {setup}",
        f"{sys.executable} -m cc4s_kernels.info --selftest",
        f"CC4S_KERNELS_JIT=1 {sys.executable} -m cc4s_kernels.info --selftest",
        f"OMP_NUM_THREADS=2 {pytest_} --junitxml={parts}/random_walk.xml",
        f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 {sanitizer} --tool memcheck --error-exitcode 9 "
        f"--base-port 6300 {pytest_} --junitxml={parts}/memcheck-random_walk.xml {reduced}",
        f"OMP_NUM_THREADS=2 {sanitizer} --tool racecheck --error-exitcode 9 "
        f"--base-port 6320 {pytest_} --junitxml={parts}/racecheck-random_walk.xml {reduced}",
        f"{sys.executable} -m benchmarks.run --op random_walk --device cuda --seconds 1 --rates {parts}/rates.json "
        f"--json {parts}/bench-random_walk.json",
    ]
    assert not parts.exists()


def test_make_calls_it() -> None:
    command = [
        "make",
        "-n",
        # Under `make test` it would say where it is.
        "--no-print-directory",
        "gpu",
        "OUT=o",
        "PARTS=build bench",
        "OPS=slic potts",
        "MINUTES=3",
        f"PYTHON={sys.executable}",
    ]
    result = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True)
    options = "--out o --parts build bench --ops slic potts --minutes 3"
    assert " ".join(result.stdout.replace("\\", " ").split()) == f"{sys.executable} -m tools.gpu {options}"


def test_every_op_is_planned() -> None:
    ops = gpu.all_ops()
    assert set(ops) == set(ck.backends.ops())
    files = {path.name for path in gpu.gpu_test_files(ops)}
    assert {f"test_{op}.py" for op in ops} | {"test_pairwise_triton.py"} <= files
    assert "test_config.py" not in files
    assert [path.name for path in gpu.gpu_test_files(["slic"])] == ["test_slic.py"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "8.0"), ((8, 6), "8.6"), ((9, 0), "9.0a"), ((10, 0), "10.0"), ((12, 0), "12.0")],
)
def test_the_present_gpu_is_what_is_compiled_for(capability: tuple[int, int], expected: str) -> None:
    assert gpu.architecture(capability) == expected
    assert nvcc.architecture_flags(expected)


def test_a_failing_part_loses_nothing_of_the_others(
    machine: dict[str, Any], jobs: dict[str, list[gpu.Job]], tmp_path: Path
) -> None:
    rows = tmp_path / "parts/bench-slic.json"
    content = bench_content(row("slic", "eager", 2.0), row("slic", "cc4s cuda", 1.0))
    jobs["build"] = [python("cpu", "print('compiled')"), python("cuda", "import sys; print('no sm_90'); sys.exit(3)")]
    jobs["test"] = [python("slic", "import os; os.abort()")]
    jobs["bench"] = [
        # Its rows count although it fails later.
        python("slic", f"open({str(rows)!r}, 'w').write({content!r}); raise MemoryError", rows=rows),
        python("potts", "print('fine')", rows=tmp_path / "parts/bench-potts.json"),
    ]
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = read(tmp_path)
    assert {part: content["outcome"] for part, content in found["parts"].items()} == {
        "build": "failed",
        "test": "failed",
        "sanitize": "passed",
        "bench": "failed",
    }
    build = found["parts"]["build"]["jobs"]
    assert [job["outcome"] for job in build] == ["passed", "failed"]
    assert build[1]["reason"] == "exit code 3; last line: no sm_90"
    assert found["parts"]["test"]["jobs"][0]["reason"].startswith("exit code -6")
    assert [job["outcome"] for job in found["parts"]["bench"]["jobs"]] == ["failed", "passed"]
    assert [one["provider"] for one in found["rows"]] == ["eager", "cc4s cuda"]
    assert "no sm_90" in (tmp_path / "build.log").read_text()
    assert "from sanitize" in (tmp_path / "sanitize.log").read_text()
    assert not (tmp_path / "parts").exists()


def test_layout_of_the_results(machine: dict[str, Any], jobs: dict[str, list[gpu.Job]], tmp_path: Path) -> None:
    rows = tmp_path / "parts/bench-slic.json"
    content = bench_content(row("slic", "eager", 2.0), row("slic", "cc4s cuda", 1.0))
    jobs["bench"] = [python("slic", f"open({str(rows)!r}, 'w').write({content!r})", rows=rows)]
    assert gpu.main(["--out", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert set(found) == {"machine", "backends", "missing", "parts", "rates", "rows"}
    assert found["machine"]["commit"] == "1dc02aa"
    # Of the benchmark: clocks under load.
    assert found["machine"]["clocks.sm"] == "1980 MHz"
    assert found["machine"]["versions"]["nvcc"] == "release 13.0"
    assert found["machine"]["versions"]["torch"]
    assert found["backends"] == {"slic": {"cuda": "available"}}
    assert found["rates"]["gemm"] == {"float32": 1e12}
    assert list(found["parts"]) == ["build", "test", "sanitize", "bench"]
    (job,) = found["parts"]["sanitize"]["jobs"]
    assert set(job) == {"name", "command", "outcome", "seconds", "reason", "tests"}
    page = (tmp_path / f"{STEM}.md").read_text()
    assert "| bench | slic | passed |" in page
    assert "| cc4s cuda | 1000.0 |" in page
    assert len((tmp_path / f"{STEM}.csv").read_text().splitlines()) == 3
    assert (tmp_path / f"{STEM}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_adds_to_the_first(
    machine: dict[str, Any], jobs: dict[str, list[gpu.Job]], tmp_path: Path
) -> None:
    rows, rates = tmp_path / "parts/bench.json", tmp_path / "parts/rates.json"

    def bench(*found: dict[str, Any]) -> None:
        jobs["bench"] = [python("op", f"open({str(rows)!r}, 'w').write({bench_content(*found)!r})", rows=rows)]

    bench(row("slic", "eager", 3.0), row("potts", "eager", 4.0))
    assert gpu.main(["--out", str(tmp_path), "--parts", "bench"]) == 0
    # The rows of one file refer to the same rates.
    bench(row("slic", "eager", 1.0), row("slic", "cc4s cuda", 0.5))
    jobs["bench"].insert(
        0, python("rates", f"import sys; sys.exit('1000000000000.0' not in open({str(rates)!r}).read())")
    )
    assert gpu.main(["--out", str(tmp_path), "--parts", "build", "bench"]) == 0
    found = read(tmp_path)
    assert list(found["parts"]) == ["bench", "build"]
    assert [(one["op"], one["median"]) for one in found["rows"]] == [("potts", 4.0), ("slic", 1.0), ("slic", 0.5)]
    # Another commit has a file of its own.
    machine["machine"]["commit"] = "2222222"
    assert gpu.main(["--out", str(tmp_path), "--parts", "test"]) == 0
    assert list(read(tmp_path, f"{STEM}-2222222")["parts"]) == ["test"]
    assert read(tmp_path) == found


def test_what_is_missing_is_named(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda compiler: None)
    has = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else has(name))
    assert gpu.main(["--out", str(tmp_path), "--parts", "sanitize", "--ops", "slic"]) == 0
    found = read(tmp_path)
    assert found["missing"]["nvcc"] == "the CUDA extension"
    assert found["missing"]["compute-sanitizer"] == "the part sanitize"
    assert found["missing"]["hypothesis"] == gpu.MODULES["hypothesis"]
    assert "missing  nvcc: left out the CUDA extension" in capsys.readouterr().out
    part = found["parts"]["sanitize"]
    assert part["outcome"] == "left out"
    reason = "compute-sanitizer is not found in PATH, CUDA_HOME or /usr/local/cuda"
    assert [job["reason"] for job in part["jobs"]] == [reason, reason]
    _, cuda = gpu.build_jobs(gpu.Setting(tmp_path, (), "9.0a", None, None, 1.0))
    assert cuda.lacking == "nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda"
    assert "Not installed: nvcc. Left out: the CUDA extension." in (tmp_path / f"{STEM}.md").read_text()


def test_without_a_device(
    machine: dict[str, Any],
    jobs: dict[str, list[gpu.Job]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine |= {"device": False, "machine": {"commit": "1dc02aa"}}
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device: ")
    assert not (tmp_path / "none").exists()
    # What needs none runs.
    assert gpu.main(["--out", str(tmp_path), "--parts", "build"]) == 0
    assert read(tmp_path, STEM.replace("nvidia-h100-80gb-hbm3", "no-gpu"))["parts"]["build"]["outcome"] == "passed"


def run(jobs: Sequence[gpu.Job], log: Path, parallel: int, seconds: float) -> dict[str, gpu.Result]:
    found: dict[str, gpu.Result] = {}
    gpu.run_jobs(jobs, log, parallel, seconds, lambda result: found.update({result.name: result}), grace=0.5)
    return found


DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def test_what_hangs_is_stopped_and_leaves_time_to_the_others(tmp_path: Path) -> None:
    hanging = python("hangs", DEAF)
    start = time.monotonic()
    # In turn, of four seconds a hanging job gets two, and the next half of the rest.
    found = run(
        [hanging, python("one", "pass"), python("two", "pass"), python("three", "pass")], tmp_path / "x.log", 1, 4
    )
    assert [found[name].outcome for name in ("hangs", "one", "two", "three")] == ["timed out", *3 * ["passed"]]
    assert found["hangs"].reason == "stopped after 2 s; last line: deaf"
    assert time.monotonic() - start < 30
    found = run([python("late", "pass")], tmp_path / "x.log", 1, -1)
    assert found["late"].outcome == "not run"
    assert gpu.part_outcome(list(found.values())) == "not run"


def test_an_interrupted_run_leaves_no_process(tmp_path: Path) -> None:
    seen: list[gpu.Result] = []

    def done(result: gpu.Result) -> None:
        seen.append(result)
        if result.name == "first":
            raise KeyboardInterrupt

    pid = tmp_path / "pid"
    write = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))"
    wait = f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.05)"
    with pytest.raises(KeyboardInterrupt):
        gpu.run_jobs([python("long", f"{write}; {DEAF}"), python("first", wait)], tmp_path / "x.log", 2, 60, done)
    assert [(result.name, result.outcome) for result in seen] == [("first", "passed"), ("long", "not run")]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


TESTS = """
import pytest
from tests.without_hypothesis import given, settings, strategies as st

def test_passes(): pass
def test_fails(): assert 1 == 2
@settings(max_examples=5)
@given(x=st.integers(0, 3) | st.none())
@pytest.mark.parametrize("y", [1, 2])
def test_property(x, y): assert False
"""


def test_what_became_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import no_such_package")
    junit = tmp_path / "x.xml"
    words = (str(tmp_path), "-c", os.devnull, "--rootdir", str(tmp_path), f"--junitxml={junit}")
    command = (sys.executable, "-m", "pytest", *words, "--continue-on-collection-errors", "-p", "no:cacheprovider")
    job = gpu.Job("some", command, {"PYTHONPATH": str(gpu.ROOT)}, junit=junit)
    found = run([job], tmp_path / "x.log", 1, 120)["some"]
    assert found.outcome == "failed"
    assert found.tests is not None
    assert (found.tests["passed"], found.tests["failed"]) == (1, 2)
    assert found.tests["skips"] == {without_hypothesis.REASON: 2}
    assert "assert 1 == 2" in found.tests["failures"]["test_some::test_fails"]
    assert gpu.junit_summary(tmp_path / "none.xml") is None


def test_what_only_skips_has_not_passed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    junit = tmp_path / "x.xml"
    words = (str(tmp_path), "-k", "property", "-c", os.devnull, "--rootdir", str(tmp_path), f"--junitxml={junit}")
    command = (sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider")
    found = run([gpu.Job("some", command, {"PYTHONPATH": str(gpu.ROOT)}, junit=junit)], tmp_path / "x.log", 1, 120)
    assert found["some"].outcome == "left out"
    assert found["some"].reason == f"every test was skipped: {without_hypothesis.REASON}"


def test_nothing_selected_is_left_out(tmp_path: Path) -> None:
    job = python("empty", "import sys; sys.exit(5)", nothing="it has no test for a GPU")
    assert run([job], tmp_path / "x.log", 1, 60)["empty"].reason == "it has no test for a GPU"


HIDDEN = (
    "cv2",
    "expecttest",
    "hypothesis",
    "lightning",
    "matplotlib",
    "omegaconf",
    "PIL",
    "skimage",
    "torchmetrics",
    "tqdm",
)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on which none of `HIDDEN` is installed."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))")
    # Plugins of pytest import what they belong to.
    changes = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(gpu.ROOT)])}
    return {**os.environ, **changes}


@pytest.mark.slow
def test_gpu_tests_are_collected_on_a_bare_machine(bare: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=gpu.ROOT, env=bare, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"LEFT OUT property tests are skipped: {without_hypothesis.REASON}" in result.stdout
    assert "LEFT OUT tests/cc4s, tests/test_docs.py, tests/test_release.py: cv2, lightning" in result.stdout
    for op in gpu.all_ops():
        assert f"tests/ops/test_{op}.py::" in result.stdout


@pytest.mark.slow
def test_benchmarks_run_on_a_bare_machine(bare: dict[str, str], tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"gemm": {"float32": 1e9}, "exp": 1e9, "copy": 1e9}))
    out = tmp_path / "x.json"
    words = ["--op", "neural_eigenspace", "--size", "N=20", "--seconds", "0", "--no-memory", "--rates", str(rates)]
    command = [sys.executable, "-m", "benchmarks.run", *words, "--json", str(out)]
    subprocess.run(command, cwd=gpu.ROOT, env=bare, capture_output=True, text=True, check=True)
    assert "No plot: matplotlib is not installed." in out.with_suffix(".md").read_text()
    assert [one["provider"] for one in json.loads(out.read_text())["rows"]] == ["dense eig", "cc4s"]
