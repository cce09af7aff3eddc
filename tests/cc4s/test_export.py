"""`cc4s export`: a file that gives what the network gives. ONNX: tests/integrations/test_onnx.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cc4s.cli import main
from tests.cc4s.export_tools import CLASSES, SHAPES, expected, make_checkpoint
from tests.cc4s.test_cli import check_refused

# Reads a program and runs it where this package cannot be imported.
READER = """
import sys, torch
sys.modules["cc4s"] = sys.modules["cc4s_kernels"] = None
extra = {"classes": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2])
torch.save({"found": [program(x) for x in images], "classes": extra["classes"]}, sys.argv[3])
"""


def test_torch_export_equals_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "ss.pt")
    out = tmp_path / "model.pt2"
    assert main(["export", "--checkpoint", str(source), "--format", "torch-export", "--out", str(out)]) == 0
    assert "model.pt2" in capsys.readouterr().out
    images = [torch.rand(shape) for shape in SHAPES]
    torch.save(images, tmp_path / "images.pt")
    arguments = [str(out), str(tmp_path / "images.pt"), str(tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", READER, *arguments], check=True)
    result = torch.load(tmp_path / "found.pt")
    assert json.loads(result["classes"]) == CLASSES
    for image, found in zip(images, result["found"], strict=True):
        # float32: the reference of the walk against its kernel.
        torch.testing.assert_close(found, expected(source, image), rtol=0, atol=1e-5)


def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "ss.pt")
    common = ["export", "--checkpoint", str(source)]
    check_refused([*common, "--format", "tflite", "--out", "x.pt2"], capsys, "tflite", "onnx")
    check_refused([*common, "--format", "onnx", "--out", str(tmp_path / "x.pt2")], capsys, "x.pt2", ".onnx")
    check_refused([*common, "--format", "onnx", "--out", str(source / "x.onnx")], capsys, "ss.pt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    check_refused([*common, "--format", "onnx", "--out", str(tmp_path / "x.onnx")], capsys, "onnx", "cc4s[export]")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ss.pt"]
