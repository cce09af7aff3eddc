"""CUDA kernels that NVRTC compiles at run time, through CuPy, where no nvcc was at hand.

`_JIT.so` (`csrc/<op>/<op>_jit.cpp`, built by any C++ compiler) holds the host part of each op. When it starts a kernel
for the first time it asks for it by its symbol; `_function` compiles the `.cuh` of the op for the present GPU. CuPy
keeps what it compiled on disk. Importing compiles nothing and does not import CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

VARIABLE = "CC4S_KERNELS_JIT"
TITLE = "compiled at run time by NVRTC through CuPy"

OPTIONS = ("-std=c++17",)
"""Of NVRTC, beside the folder of the sources."""

# CUfunction find(symbol, name, device, message, bytes of message)
FIND = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char), ctypes.c_int
)


class Driver(ctypes.Structure):
    """`JitDriver` of csrc/common/jit_launch.h."""

    _fields_ = (
        ("find", FIND),
        ("current_stream", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
        ("set_attribute", ctypes.c_void_p),
        ("device_attribute", ctypes.c_void_p),
    )


def setting() -> str:
    """CC4S_KERNELS_JIT: "1" compiles at run time even where `_CU.so` is, "0" never, "" where there is no `_CU.so`."""
    return os.environ.get(VARIABLE, "")


def chosen(compiled: bool) -> bool:
    """Whether kernels are compiled at run time; `compiled`: whether `_CU.so` is there."""
    return setting() == "1" or (setting() == "" and not compiled and importlib.util.find_spec("cupy") is not None)


def unknown_setting() -> str | None:
    """What is wrong with CC4S_KERNELS_JIT, or None."""
    return None if setting() in ("", "0", "1") else f"{VARIABLE}: got {setting()!r}, expected 0, 1 or nothing"


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled at run time, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy, which compiles kernels at run time, is not installed (pip install cupy-cuda13x)"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"NVRTC, with which CuPy compiles kernels at run time, does not load: {line}"
    return None


def sources() -> Path:
    """The folder csrc: in an installed package its copy, else that of the repository."""
    installed = Path(__file__).with_name("csrc")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "csrc"


def expression(name: str) -> str:
    """`slic::prepare` of `slic::prepare(slic::Problem)`, `f::mark<int>` of `void f::mark<int>(int const*)`."""
    depth = 0
    for end, character in enumerate(name):
        depth += (character in "<") - (character in ">")
        if character == "(" and depth == 0:
            name = name[:end]
            break
    return name.removeprefix("void ")


@functools.cache
def source(op: str) -> str:
    """The translation unit with the kernels of an op.

    CuPy looks at this text alone to find what it has compiled before: it names the content of what it includes.
    """
    folder = sources()
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("common/*"), *folder.glob(f"{op}/*")]):
        if path.suffix in (".cuh", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return f'// {digest.hexdigest()}\n#include "{op}/{op}.cuh"\n'


def request(name: str) -> tuple[str, tuple[str, ...] | None]:
    """The op of a kernel, by its namespace, and the instances that have to be asked for: templates alone."""
    op = re.match(r"\w+", expression(name))
    assert op is not None, name
    return op[0], (expression(name),) if "<" in expression(name) else None


@functools.cache
def _module(op: str, instances: tuple[str, ...] | None) -> Any:
    import cupy

    return cupy.RawModule(
        code=source(op), options=(*OPTIONS, f"-I{sources()}"), name_expressions=instances, backend="nvrtc"
    )


# What `_JIT.so` points to, and functions that have to stay loaded.
_kept: list[Any] = []


def _function(symbol: str, name: str, device: int) -> int:
    """A CUfunction."""
    import cupy

    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    op, instances = request(name)
    with cupy.cuda.Device(device):
        # Plain kernels have no other names than their symbols.
        function = _module(op, instances).get_function(symbol if instances is None else instances[0]).kernel
    _kept.append(function)
    return function.ptr


@FIND
def _find(symbol: bytes, name: bytes, device: int, message: Any, size: int) -> int | None:
    try:
        return _function(symbol.decode(), name.decode(), device)
    except Exception as error:
        text = f"{expression(name.decode())} cannot be {TITLE}: {type(error).__name__}: {error}".encode()[:size]
        ctypes.memmove(message, text, len(text))
        return None


def connect(library: Path | None, driver: Driver) -> None:
    """Gives the loaded `_JIT.so` its driver."""
    ctypes.CDLL(str(library)).cc4s_kernels_set_driver(ctypes.byref(driver))
    _kept.append(driver)


@functools.cache
def has(library: Path | None, op: str) -> bool:
    """Whether `_JIT.so` has the host part of an op."""
    return hasattr(ctypes.CDLL(str(library)), f"cc4s_kernels_jit_{op}")


def cuda_driver() -> Driver:
    """That of the machine.

    Raises:
        OSError: libcuda or torch's CUDA library is not there.
    """
    import torch

    # Both are loaded already where torch has a device.
    torch_cuda = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cuda.so"))
    cuda = ctypes.CDLL("libcuda.so.1")
    functions = (
        torch_cuda.aoti_torch_get_current_cuda_stream,
        cuda.cuLaunchKernel,
        cuda.cuFuncSetAttribute,
        cuda.cuDeviceGetAttribute,
    )
    return Driver(_find, *(ctypes.cast(function, ctypes.c_void_p) for function in functions))
