"""The torch operator namespace of the package and its compiled extensions: `_C` for CPUs, `_CU` for NVIDIA GPUs, and
`_JIT` for NVIDIA GPUs with kernels that are compiled at run time.

Schemas, fakes and autograd are registered in Python (`ops/<op>/library.py`); an extension only adds
implementations for a dispatch key. Loading never compiles and never fails: `EXTENSION_ERROR` and
`CUDA_EXTENSION_ERROR` say why an extension is absent.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cc4s_kernels import _jit

NAMESPACE = "cc4s_kernels"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def extension_path(name: str) -> Path | None:
    """The file of the extension `_C`, `_CU` or `_JIT`, or None where it is not built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*so"))), None)


def _load_extension(name: str, title: str) -> str | None:
    path = extension_path(name)
    if path is None:
        return f"the {title} extension is not built (pip install --no-build-isolation -e .)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the {title} extension does not load: {error}"
    return None


def _load_cuda_extension() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if (wrong := _jit.unknown_setting()) is not None:
        return wrong
    if not CUDA_RUN_TIME:
        return _load_extension("_CU", "CUDA")
    if (error := _load_extension("_JIT", "run-time CUDA")) is not None:
        return error
    try:
        _jit.connect(extension_path("_JIT"), _jit.cuda_driver())
    except OSError as lacking:
        return f"the CUDA driver, for kernels {_jit.TITLE}, does not load: {lacking}"
    return None


# In csrc/common/value_range_cpu.cpp: see `_validation.value_range`.
LIBRARY.define("value_range(Tensor values, int? skip) -> Tensor")


def _value_range_fake(values: torch.Tensor, skip: int | None) -> torch.Tensor:
    return values.new_empty(2, dtype=torch.float64 if values.is_floating_point() else torch.int64)


torch.library.register_fake(f"{NAMESPACE}::value_range", _value_range_fake, lib=LIBRARY)

CUDA_RUN_TIME = torch.version.cuda is not None and _jit.chosen(compiled=extension_path("_CU") is not None)
"""Whether the CUDA kernels are compiled at run time."""

EXTENSION_ERROR: str | None = _load_extension("_C", "C++")
CUDA_EXTENSION_ERROR: str | None = _load_cuda_extension()


def register(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Gives the defined op `name` a Python implementation for every device, a fake and, if differentiable, autograd."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_second_derivative(backend: str) -> Callable[..., Any]:
    """The backward of a backward op."""

    def raises(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"the {backend} backend has no second derivatives: use cc4s_kernels.use_backend('reference')"
        )

    return raises
