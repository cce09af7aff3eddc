"""Compiles the kernels of `_JIT.so` with NVRTC, without a GPU, and says what each kernel needs on its chip.

The part of tools/compile_check.py for kernels that are compiled at run time (cc4s_kernels/_jit.py): the same source and
options, for each kernel that a host part starts.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cc4s_kernels import _jit, _library
from tools.cuda_check import Kernel, kernels_of
from tools.host_part import kernel_names
from tools.occupancy import threads_of

# What CuPy adds.
OPTIONS = ("--device-as-default-execution-space", "-ftz=true")


def lacking() -> str | None:
    """Why nothing can be compiled here, or None."""
    if _library.extension_path("_JIT") is None:
        return "the extension _JIT is not built"
    return _jit.missing()


def symbols() -> dict[str, str]:
    """The kernels that the host parts in `_JIT.so` start: symbol -> name with its parameters."""
    names = kernel_names()
    path = str(_library.extension_path("_JIT"))
    listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    found = [line.split()[-1] for line in listed.splitlines()]
    plain = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return {
        symbol: name
        for symbol, name in zip(found, plain.splitlines(), strict=True)
        if re.sub(r"<.*", "", _jit.expression(name)) in names
    }


def units() -> Iterator[tuple[str, tuple[str, ...] | None, list[str]]]:
    """What is compiled together: the op, the instances to ask for, and the symbols that have to be there."""
    wanted: dict[tuple[str, tuple[str, ...] | None], list[str]] = {}
    for symbol, name in symbols().items():
        wanted.setdefault(_jit.request(name), []).append(symbol)
    for (op, instances), expected in sorted(wanted.items(), key=str):
        yield op, instances, expected


def compile_unit(op: str, instances: tuple[str, ...] | None, target: str) -> tuple[bytes, str]:
    """The CUBIN, and what ptxas says of its kernels.

    Raises:
        RuntimeError: it does not compile; with what NVRTC said.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(_jit.source(op), f"{op}.cu", (), ())
    options = (*_jit.OPTIONS, f"-I{_jit.sources()}", *OPTIONS, f"-arch={target}", "--ptxas-options=-v")
    try:
        for instance in instances or ():
            nvrtc.addNameExpression(program, instance)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{op} for {target}: {nvrtc.getProgramLog(program)}") from error
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def check(targets: Sequence[str], processes: int, ops: Sequence[str] | None = None) -> list[Kernel]:
    """Compiles every unit for `targets` ("sm_80", ...).

    Raises:
        RuntimeError: something does not compile, or a kernel that a host part starts is not in what was compiled.
    """
    jobs = [(unit, target) for unit in units() if ops is None or unit[0] in ops for target in targets]

    def run(job: tuple[tuple[str, tuple[str, ...] | None, list[str]], str]) -> list[Kernel]:
        (op, instances, expected), target = job
        binary, said = compile_unit(op, instances, target)
        absent = [symbol for symbol in expected if symbol.encode() + b"\0" not in binary]
        if absent:
            raise RuntimeError(f"{op} for {target}: not among the compiled kernels: {', '.join(absent)}")
        return kernels_of(op, said, threads_of(binary))

    with ThreadPoolExecutor(processes) as pool:
        rows = [row for found in pool.map(run, jobs) for row in found]
    # Plain kernels are compiled again with each instance of a template.
    return list(dict.fromkeys(rows))
