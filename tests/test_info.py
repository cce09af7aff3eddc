"""`python -m cc4s_kernels.info`: what it says, and that its self-test can fail."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import cc4s_kernels as ck
from cc4s_kernels import backends, info


def test_report_names_every_op_and_version() -> None:
    text = info.report()
    lines = text.splitlines()
    for op in info.OPS:
        (row,) = [line for line in lines if line.startswith(op + " ")]
        # One cell for each backend; the definition always runs.
        assert row.rstrip().endswith("yes")
        assert row.count("yes") + row.count("no (") == len(backends.BACKENDS)
    assert torch.__version__ in text
    assert "extension" in text
    assert set(info.OPS) == set(backends.ops())


def test_report_gives_the_reason() -> None:
    status = info.availability("upsample_losses")
    assert status["reference"] == "available"
    assert (
        "kernel in this version" in status["triton"] or "CUDA" in status["triton"] or (status["triton"] == "available")
    )
    assert info.availability("no_such_op")["cpu"] == "the op is not registered"


def test_every_op_has_a_check() -> None:
    assert [check.op for check in info.CHECKS] == list(info.OPS)


@pytest.mark.parametrize("check", info.CHECKS, ids=lambda check: check.op)
def test_selftest_passes(check: info.Check) -> None:
    for backend in backends.available(check.op):
        row = info.run_check(check, backend)
        assert row.passed, str(row)
        assert str(row).startswith("ok")


@pytest.mark.parametrize("check", info.CHECKS, ids=lambda check: check.op)
def test_selftest_sees_a_wrong_value(check: info.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong first output of each op fails its row."""
    right = getattr(ck, check.op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        first = out if isinstance(out, torch.Tensor) else out[0]
        changed = ~first if first.dtype == torch.bool else first * 0 if check.op == "slic" else first + 1
        return changed if isinstance(out, torch.Tensor) else (changed, *out[1:])

    monkeypatch.setattr(ck, check.op, wrong)
    row = info.run_check(check, "reference")
    assert not row.passed
    assert str(row).startswith("FAIL")


def test_selftest_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ck.upsample_losses

    def wrong(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The same value with twice the gradient, in float32 only: the float64 reference stays right.
        twice = 2 * logits - logits.detach() if logits.dtype == torch.float32 else logits
        return right(twice, *args, **kwargs)

    monkeypatch.setattr(ck, "upsample_losses", wrong)
    (check,) = [check for check in info.CHECKS if check.op == "upsample_losses"]
    row = info.run_check(check, "reference")
    assert row.value is not None
    assert row.value <= check.tolerance
    assert not row.passed


def test_failure_ends_with_code_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ck, "potts", broken)
    monkeypatch.setattr(info, "CHECKS", tuple(c for c in info.CHECKS if c.op in ("potts", "upsample_losses")))
    assert info.main(["--selftest"]) == 1
    out = capsys.readouterr().out
    assert "FAIL potts" in out
    assert "RuntimeError: no such instruction" in out
    assert "ok   upsample_losses" in out
    assert "FAILED" in out.splitlines()[-1]


def test_command_line() -> None:
    """As a user runs it; only runtime dependencies may be imported."""
    code = (
        "import sys, runpy; sys.argv = ['info', '--selftest']\n"
        "try:\n    runpy.run_module('cc4s_kernels.info', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "extra = {'lightning', 'cv2', 'matplotlib', 'skimage', 'omegaconf', 'PIL', 'pytest', 'cc4s'}\n"
        "assert not extra & set(sys.modules), extra & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all rows ok" in done.stdout


@pytest.mark.parametrize("check", [c for c in info.CHECKS if c.dtypes], ids=lambda check: check.op)
def test_selftest_of_a_backend_without_float32(check: info.Check) -> None:
    """As the CUDA kernels of these ops are checked, on the reference."""
    row = info.run_check(check._replace(dtypes={"reference": torch.float16}), "reference")
    assert row.passed, str(row)
    # Rounded gradients, and not those of float32.
    assert row.gradient is not None
    assert row.gradient > 1e-6
