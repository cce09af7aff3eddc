"""The ops of `cc4s_kernels` for CuPy arrays: every op under its own name, with its own arguments and results.

    from cc4s_kernels.contrib import cupy as ckc
    superpixels = ckc.slic(image, 800)

Arrays are handed over by DLPack, without a copy, and results are CuPy arrays in memory of PyTorch. The kernels run on
CuPy's current stream. There are no gradients: an array has none; use torch tensors where they are needed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from cc4s_kernels.contrib._require import require


@dataclass(frozen=True)
class Framework:
    """A framework of arrays. array: their type, of the name `name`. from_dlpack: makes one of a tensor. stream: a
    context in which torch works on its current stream."""

    name: str
    array: type
    from_dlpack: Callable[[Any], Any]
    stream: Callable[[], AbstractContextManager[Any]]


@functools.cache
def _cupy() -> Framework:
    cupy = require("cupy", "cupy-cuda13x")
    return Framework("cupy.ndarray", cupy.ndarray, cupy.from_dlpack, _current_stream)


def _current_stream() -> AbstractContextManager[Any]:
    """torch's current stream and device are those of CuPy."""
    cuda = require("cupy", "cupy-cuda13x").cuda
    device, pointer = cuda.Device().id, cuda.get_current_stream().ptr
    # The default stream has no handle to wrap.
    stream = torch.cuda.ExternalStream(pointer, device=device) if pointer else torch.cuda.default_stream(device)
    return torch.cuda.stream(stream)


def _map(function: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """`value` with `function` applied to it, or to the fields of a named tuple."""
    if hasattr(value, "_fields"):
        fields = zip(value._fields, value, strict=True)
        return type(value)(*(_map(function, f"{name}.{field}", item) for field, item in fields))
    return function(name, value)


def _to_tensor(framework: Framework, name: str, value: Any) -> Any:
    if isinstance(value, framework.array):
        # Not every version hands over bool.
        is_bool = value.dtype == bool  # type: ignore[attr-defined]
        tensor = torch.from_dlpack(value.view("uint8") if is_bool else value)  # type: ignore[attr-defined]
        return tensor.view(torch.bool) if is_bool else tensor
    if hasattr(value, "__dlpack__"):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name}: got a {kind}, expected a {framework.name}")
    # Options; the op says which of them should have been an array.
    return value


def _to_array(framework: Framework, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return framework.from_dlpack(value.view(torch.uint8)).view(bool)
    return framework.from_dlpack(value.resolve_conj())


def call(framework: Framework, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function` of tensors, called with arrays of a framework, with its results as such.

    Raises:
        TypeError: an argument is an array or tensor of another framework; with its name.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    with framework.stream(), torch.no_grad():
        to_tensor = functools.partial(_to_tensor, framework)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _map(to_tensor, name, value)
        out = function(*bound.args, **bound.kwargs)
        if type(out) is tuple:
            return tuple(_to_array(framework, "", item) for item in out)
        return _map(functools.partial(_to_array, framework), "", out)


def __dir__() -> list[str]:
    """The ops, and the functions that make grids for `potts`."""
    return [*backends.ops(), "gaussian_grid", "pixel_grid"]


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in __dir__():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(ck, name)

    @functools.wraps(function)
    def of_arrays(*args: Any, **kwargs: Any) -> Any:
        return call(_cupy(), function, *args, **kwargs)

    return of_arrays
