"""Builds the C++ extension of `cc4s_kernels` against the LibTorch stable ABI.

One `.so` serves every Python (abi3: it has no Python symbols at all) and every torch >= 2.11.
Needs torch, ninja and g++ in the installing environment: `pip install --no-build-isolation -e .`
`CC4S_KERNELS_SKIP_BUILD=1` installs the pure-Python package (reference backend only).
"""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# Stable ABI of torch 2.11: the library loads in that version and in every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"


def cpu_extension() -> dict:
    """Arguments of `setup` that build `cc4s_kernels/_C.so`."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*_cpu.cpp"))
    extension = CppExtension(
        "cc4s_kernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        # No -march: instruction sets are chosen at run time, per function.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-std=c++17",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            "-fvisibility=hidden",
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("CC4S_KERNELS_SKIP_BUILD") == "1" else cpu_extension()))
