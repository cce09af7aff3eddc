"""Compiles `csrc/*/*_cuda.cu` with nvcc; for setup.py and tools/cuda_check.py.

nvcc is called directly: torch's CUDAExtension does not work beside a CPU-only torch, where the kernels are still to be
compiled and looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Stable ABI of torch 2.11: the library loads in that version and in every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"

ARCHITECTURES = "8.0+PTX 9.0a 10.0"
"""As in TORCH_CUDA_ARCH_LIST. Chips between and after these run the code of 8.0, or its PTX."""

MOST_BYTES = 10 * 2**20
"""Of a built library."""


def find(environment: Mapping[str, str] = os.environ) -> Path | None:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    home = environment.get("CUDA_HOME")
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    candidates = [
        Path(home) / "bin/nvcc" if home else None,
        on_path and Path(on_path),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def chosen(setting: str, torch_version: str, torch_cuda: str | None, nvcc: Path | None) -> bool:
    """Whether the CUDA extension is built.

    setting: CC4S_KERNELS_CUDA. "1" requires it, "0" forbids it, "" builds it where torch has CUDA and nvcc is found.

    Raises:
        SystemExit: it is required and cannot be built, or the setting is none of these.
    """
    if setting not in ("", "0", "1"):
        raise SystemExit(f"CC4S_KERNELS_CUDA: got {setting!r}, expected 0, 1 or nothing")
    lacking = None
    if torch_cuda is None:
        lacking = f"torch {torch_version} is built without CUDA"
    elif nvcc is None:
        lacking = "nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda"
    if setting == "1" and lacking is not None:
        raise SystemExit(f"CC4S_KERNELS_CUDA=1 requires the CUDA extension, but {lacking}")
    return setting != "0" and lacking is None


def architecture_flags(listed: str) -> list[str]:
    """The options of nvcc for a list such as "8.0+PTX 9.0a" (spaces or semicolons).

    Raises:
        SystemExit: an entry is not of that form.
    """
    flags = []
    for entry in listed.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries like 8.0, 9.0a or 8.0+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def architectures_of(file: Path, listed: str) -> str:
    """What `file` is compiled for where `listed` is asked for: kernels of wgmma are for one chip."""
    return "9.0a" if file.stem.endswith("_sm90_cuda") else listed


def sources() -> list[Path]:
    """The translation units with CUDA kernels."""
    return sorted((ROOT / "csrc").glob("*/*_cuda.cu"))


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_objects(
    nvcc: Path, files: Iterable[Path], folder: Path, architectures: str, processes: int, keep: bool = False
) -> dict[Path, tuple[Path, str]]:
    """Compiles each file into `folder`; with `keep` a folder named as the file has the CUBIN of each architecture.

    Returns:
        For each file its object and what nvcc and ptxas said of its kernels.

    Raises:
        RuntimeError: a file does not compile; with the command and what nvcc said.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xptxas=-v",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        Path(torch.__file__).parent / "include",
    ]

    def compile_one(file: Path) -> tuple[Path, str]:
        out, kept = folder / f"{file.stem}.o", folder / file.stem
        if keep:
            kept.mkdir()
        flags = architecture_flags(architectures_of(file, architectures))
        keeping = ["-keep", f"-keep-dir={kept}"] if keep else []
        return out, _run([*command, *flags, *keeping, "-c", file, "-o", out])

    files = list(files)
    with ThreadPoolExecutor(processes) as pool:
        return dict(zip(files, pool.map(compile_one, files), strict=True))


def link(nvcc: Path, objects: Iterable[Path], out: Path, library_folders: Iterable[Path]) -> None:
    """Links objects against the torch in `library_folders`.

    The CUDA runtime stays a shared library, the one that torch has loaded.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folders = [f"-L{folder}" for folder in library_folders]
    libraries = ["-ltorch_cpu", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
    _run([nvcc, "-shared", "-cudart=shared", *objects, "-o", out, *folders, *libraries])


def build(nvcc: Path, out: Path, folder: Path) -> None:
    """Builds `cc4s_kernels/_CU.so` as `out`, with objects in `folder`, for TORCH_CUDA_ARCH_LIST or ARCHITECTURES.

    Raises:
        RuntimeError: it does not compile. SystemExit: TORCH_CUDA_ARCH_LIST is not understood.
    """
    import torch

    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    processes = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    compiled = compile_objects(nvcc, sources(), folder, architectures, processes)
    link(nvcc, [found for found, _ in compiled.values()], out, [Path(torch.__file__).parent / "lib"])
