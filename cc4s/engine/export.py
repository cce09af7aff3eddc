"""A trained segmenter as one file that runs without this package: torch.export or ONNX."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cc4s_kernels as ck
from cc4s.data import normalize
from cc4s.engine.checkpoint import Trained
from cc4s.errors import UserError
from cc4s.files import atomic_write, check_output_file

FORMATS = {"torch-export": ".pt2", "onnx": ".onnx"}
"""Format, and the ending of its files."""

# Sides of an image that the exported program takes.
SMALLEST, LARGEST = 33, 8192


class Probabilities(nn.Module):
    """Class probabilities at the size of the image: one window of `cc4s predict` at scale 1, with the normalisation.

    Args:
        trained: network and configuration.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.network = trained.network
        self.data = trained.config.data

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, channels, H, W) float32 in [0, 1]. Returns (B, C, H, W), which sums to 1 over C."""
        logits = self.network(normalize(image, self.data)).logits
        return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True).softmax(1)


def export(trained: Trained, form: str, out: Path) -> None:
    """Writes a segmenter to `out`, with its class names.

    The program takes "image" (B, channels, H, W) float32 in [0, 1], any batch up to 1024 and sides of 33 to 8192
    pixels, and gives "probabilities" (B, C, H, W). The random walk is standard operators, with its N x N matrix: for
    large images cut windows, as `cc4s predict` does.

    Args:
        trained: network and configuration. out: the file.
        form: "torch-export", for `torch.export.load` (class names as JSON in the extra file "classes"), or
            "onnx" (class names as JSON in the metadata "classes").

    Raises:
        UserError: unknown format, a package that is not installed, or a name that is no file's or ends otherwise.
    """
    if form not in FORMATS:
        raise UserError(f"--format: got {form!r}, expected one of {', '.join(FORMATS)}")
    if out.suffix != FORMATS[form]:
        raise UserError(f"--out {out}: expected a name that ends with {FORMATS[form]} for --format {form}")
    check_output_file(out, "--out")
    classes = json.dumps(trained.classes, ensure_ascii=False)
    module = Probabilities(trained).eval()
    if form == "onnx":
        atomic_write(out, _onnx(module, classes))
        return
    buffer = io.BytesIO()
    torch.export.save(_program(module), buffer, extra_files={"classes": classes})
    atomic_write(out, buffer.getvalue())


def _example(module: Probabilities) -> Tensor:
    return torch.rand(2, module.data.channels, 65, 73)


def _dynamic() -> dict[str, dict[int, Any]]:
    height, width = (torch.export.Dim(name, min=SMALLEST, max=LARGEST) for name in ("height", "width"))
    return {"image": {0: torch.export.Dim("batch", min=1, max=1024), 2: height, 3: width}}


def _program(module: Probabilities) -> torch.export.ExportedProgram:
    # The reference of the walk is plain PyTorch: nobody who loads the file needs this package.
    with torch.no_grad(), ck.use_backend("reference"):
        return torch.export.export(module, (_example(module),), dynamic_shapes=_dynamic())


def _onnx(module: Probabilities, classes: str) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format onnx needs {error.name}, which is not installed: pip install 'cc4s[export]'"
        ) from error
    # The exporter tells about its own internals.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            _program(module), dynamo=True, verbose=False, input_names=["image"], output_names=["probabilities"]
        )
    assert exported is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        exported.save(path)
        model = onnx.load(path)
    model.metadata_props.add(key="classes", value=classes)
    return model.SerializeToString()
