"""Compiles CUDA device code for the CPU.

`<op>_on_cpu.cpp` in this folder includes `csrc/<op>/<op>.cuh` and its `<op>_launch.h`, and has `extern "C"` functions
that run them with `cuda_on_cpu::Launcher`; `library(op)` compiles and loads it.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).parent
_FOLDER = tempfile.TemporaryDirectory(prefix="cuda_on_cpu_")


@functools.cache
def library(op: str) -> ctypes.CDLL:
    """The functions of `<op>_on_cpu.cpp`.

    Raises:
        AssertionError: it does not compile without warnings.
    """
    out = Path(_FOLDER.name) / f"{op}.so"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{HERE.parent.parent / 'csrc'}", "-include", str(HERE / "cuda_on_cpu.h")]
    command = ["g++", *flags, *include, str(HERE / f"{op}_on_cpu.cpp"), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(out))


def memory(tensor: Tensor) -> ctypes.c_void_p:
    """Where the first value of a CPU tensor with any strides is."""
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The memory of a contiguous CPU tensor; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    return memory(tensor)
