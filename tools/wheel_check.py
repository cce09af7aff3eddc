"""Builds the sdist, a wheel from it, and proves that the wheel works where there is no compiler: `make wheel-check`, or

    python -m tools.wheel_check [--out dist]

The wheel is installed into a new environment with torch, NumPy and SciPy of constraints.txt, and passes
`python -m cc4s_kernels.info --selftest` with nothing but that environment on PATH.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.nvcc import MOST_BYTES, ROOT


def faults(wheel: Path) -> list[str]:
    """What is wrong with the name or the content of a wheel."""
    found = []
    if "-abi3-" not in wheel.name:
        found.append(f"{wheel.name} is not for every Python")
    with zipfile.ZipFile(wheel) as packed:
        sizes = {info.filename: info.file_size for info in packed.infolist()}
    libraries = {name for name in sizes if name.endswith(".so")}
    found += [f"no {name}" for name in ("_C", "_JIT") if not any(f"/{name}." in path for path in libraries)]
    found += [f"{name} has {sizes[name]} bytes" for name in sorted(libraries) if sizes[name] >= MOST_BYTES]
    sources = {path.relative_to(ROOT) for suffix in ("cuh", "h") for path in (ROOT / "csrc").glob(f"*/*.{suffix}")}
    found += [f"no {path}" for path in sorted(sources) if f"cc4s_kernels/{path}" not in sizes]
    found += [f"{name} is of no use there" for name in sizes if name.endswith((".cpp", ".cu"))]
    return found


def run(title: str, command: Sequence[str | Path], environment: Mapping[str, str], folder: Path) -> None:
    start = time.monotonic()
    print(f"{title} ...", flush=True)
    subprocess.run(list(map(str, command)), cwd=folder, env=dict(environment), check=True)
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds sdist and wheel, and tries the wheel without a compiler.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    out = parser.parse_args().out.resolve()
    # Without --wheel or --sdist: the sdist, and the wheel from what is in it.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("sdist, and the wheel from it", build, os.environ, folder)
        wheel = max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)
        if wrong := faults(wheel):
            print("\n".join(wrong), file=sys.stderr)
            return 1
        run("environment", [sys.executable, "-m", "venv", folder / "venv"], os.environ, folder)
        python = folder / "venv/bin/python"
        alone = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX", "CC")}
        alone["PATH"] = str(python.parent)
        install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
        run("installation", install, alone, folder)
        run("self-test", [python, "-m", "cc4s_kernels.info", "--selftest"], alone, folder)
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
