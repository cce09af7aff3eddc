"""`cc4s export --format onnx` in ONNX Runtime on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from cc4s.cli import main
from tests.cc4s.export_tools import CLASSES, SHAPES, expected, make_checkpoint


@pytest.mark.parametrize("words", [(), ("model.shrink=2",)], ids=["plain", "shrink"])
def test_onnx_equals_the_network(words: tuple[str, ...], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ss.pt", *words)
    out = tmp_path / "model.onnx"
    assert main(["export", "--checkpoint", str(source), "--format", "onnx", "--out", str(out)]) == 0
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    # Standard operators only.
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    for shape in SHAPES:
        image = torch.rand(shape)
        (found,) = session.run(["probabilities"], {"image": image.numpy()})
        # float32 convolutions of another library.
        torch.testing.assert_close(torch.from_numpy(found), expected(source, image), rtol=0, atol=1e-4)
