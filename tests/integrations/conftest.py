"""What lets the frameworks be imported beside a CPU-only torch; the library does none of it."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch

# A test module, and the packages it needs.
NEEDS = {
    "test_torchvision.py": ("torchvision",),
    "test_smp.py": ("segmentation_models_pytorch",),
    "test_transformers.py": ("transformers",),
    "test_mmseg.py": ("mmseg", "mmcv"),
    "test_onnx.py": ("onnx", "onnxruntime", "onnxscript"),
}
collect_ignore = [
    name for name, packages in NEEDS.items() if any(importlib.util.find_spec(package) is None for package in packages)
]

if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    # torchvision's import asks for ops that only its compiled half defines.
    _torchvision = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _NoOps(types.ModuleType):
    """Stands for mmcv.ops, which mmcv-lite has not compiled: mmsegmentation imports names from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


if importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec("mmcv._ext") is None:
    sys.modules["mmcv.ops"] = _NoOps("mmcv.ops")
