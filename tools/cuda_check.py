"""Compiles the CUDA extension without a GPU, and says what each kernel needs on its chip.

The part of tools/compile_check.py for csrc/*/*_cuda.cu. What is compiled and linked is what setup.py builds; beside a
CPU-only torch an empty library stands in for libtorch_cuda.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools import nvcc, occupancy

# The chips of tools/compile_check.py as in TORCH_CUDA_ARCH_LIST; 9.0a also has the instructions of no other chip.
ARCHITECTURE = {"sm_80": "8.0", "sm_86": "8.6", "sm_90": "9.0a", "sm_100": "10.0"}


class Kernel(NamedTuple):
    """One kernel on one chip. Registers are per thread; stack: bytes of local memory that are no spill; shared: without
    what the launch adds; threads: the most of a block, 0 where the kernel does not say."""

    target: str
    op: str
    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    threads: int = 0

    @property
    def occupancy(self) -> float | None:
        """Of a multiprocessor, by blocks of `threads` threads."""
        if self.threads == 0:
            return None
        return occupancy.occupancy(self.target, self.threads, self.registers, self.shared_bytes)

    @property
    def passed(self) -> bool:
        return self.stack_bytes == 0 and self.spill_bytes == 0

    def row(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**self._asdict(), "occupancy": self.occupancy, "passed": self.passed}


def _demangled(names: Sequence[str]) -> list[str]:
    """Names of functions with their template arguments, without types of result and parameters."""
    command = ["c++filt", "--no-params"]
    result = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True)
    plain = result.stdout.replace("(anonymous namespace)::", "").splitlines()
    # A template's name starts with its result.
    return [name.removeprefix("void ") for name in plain]


def kernels_of(op: str, said: str, threads: Mapping[str, int]) -> list[Kernel]:
    """The kernels that `ptxas -v` speaks of; threads: of a block, by symbol.

    Raises:
        RuntimeError: products that should overlap wait for one another.
    """
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", said)[1:]
    names, targets, texts = parts[::3], parts[1::3], parts[2::3]

    serialized = re.findall(r"wgmma.*serialized.*", said)
    if serialized:
        raise RuntimeError(f"{op}: {serialized[0]}")

    def numbers(pattern: str, text: str) -> list[int]:
        return [int(found) for found in re.findall(pattern, text)]

    return [
        Kernel(
            target,
            op,
            name,
            threads=threads.get(symbol, 0),
            registers=max(numbers(r"Used (\d+) registers", text)),
            stack_bytes=max(numbers(r"(\d+) bytes stack frame", text)),
            spill_bytes=sum(numbers(r"(\d+) bytes spill", text)),
            shared_bytes=sum(numbers(r"(\d+) bytes smem", text)),
        )
        for symbol, name, target, text in zip(names, _demangled(names), targets, texts, strict=True)
    ]


def check(compiler: Path, targets: Sequence[str], processes: int) -> list[Kernel]:
    """Compiles and links every CUDA source for `targets` ("sm_80", ...).

    Raises:
        RuntimeError: something does not compile or link, or the library is too large.
    """
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        architectures = " ".join(ARCHITECTURE[target] for target in targets)
        compiled = nvcc.compile_objects(compiler, nvcc.sources(), folder, architectures, processes, keep=True)
        stub = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c", "/dev/null", "-o"]
        subprocess.run([*stub, str(folder / "libtorch_cuda.so")], check=True)
        objects = [found for found, _ in compiled.values()]
        nvcc.link(compiler, objects, folder / "_CU.so", [Path(torch.__file__).parent / "lib", folder])
        size = (folder / "_CU.so").stat().st_size
        if size >= nvcc.MOST_BYTES:
            raise RuntimeError(f"_CU.so has {size} bytes, expected less than {nvcc.MOST_BYTES}")
        kernels: list[Kernel] = []
        for file, (_, said) in compiled.items():
            threads: dict[str, int] = {}
            for cubin in (folder / file.stem).glob("*.cubin"):
                threads |= occupancy.threads_of(cubin.read_bytes())
            kernels += kernels_of(file.parent.name, said, threads)
        # Some files are compiled for their chip whatever is asked for.
        return [kernel for kernel in kernels if kernel.target.removesuffix("a") in targets]
