"""The torch operator namespace of the package and its compiled extension.

Schemas, fakes and autograd are registered in Python (`ops/<op>/library.py`); the extension only adds
implementations for a dispatch key. Loading never compiles and never fails: `EXTENSION_ERROR` says why the
extension is absent.
"""

from pathlib import Path

import torch

NAMESPACE = "cc4s_kernels"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _load_extension() -> str | None:
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "the C++ extension is not built (pip install --no-build-isolation -e .)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


# In csrc/common/value_range_cpu.cpp: see `_validation.value_range`.
LIBRARY.define("value_range(Tensor values, int? skip) -> Tensor")

EXTENSION_ERROR: str | None = _load_extension()
