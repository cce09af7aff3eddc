"""Builds the extensions of `cc4s_kernels` against the LibTorch stable ABI: `_C.so` for CPUs and, where torch has CUDA
and nvcc is found, `_CU.so` for NVIDIA GPUs.

One `.so` serves every Python (abi3: it has no Python symbols at all) and every torch >= 2.11.
Needs torch, ninja and g++ in the installing environment: `pip install --no-build-isolation -e .`
`CC4S_KERNELS_SKIP_BUILD=1` installs the pure-Python package (reference backend only). `CC4S_KERNELS_CUDA=1` fails where
`_CU.so` cannot be built, `CC4S_KERNELS_CUDA=0` leaves it out; TORCH_CUDA_ARCH_LIST says for which GPUs.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
# A build front end need not have the project's folder on the path.
sys.path.insert(0, str(ROOT))

from tools import nvcc  # noqa: E402


def extensions() -> dict:
    """Arguments of `setup` that build `cc4s_kernels/_C.so` and `cc4s_kernels/_CU.so`."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*_cpu.cpp"))
    cpu = CppExtension(
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
            f"-DTORCH_TARGET_VERSION={nvcc.TORCH_TARGET_VERSION}",
            "-fvisibility=hidden",
        ],
        py_limited_api=True,
    )
    # Without sources: torch's part of the build would take .cu files for its own.
    cuda = Extension("cc4s_kernels._CU", [])
    compiler = nvcc.find()
    setting = os.environ.get("CC4S_KERNELS_CUDA", "")
    with_cuda = nvcc.chosen(setting, torch.__version__, torch.version.cuda, compiler)

    class Build(BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=True)):
        def build_extension(self, extension: Extension) -> None:
            if extension.name == cuda.name:
                out = Path(self.get_ext_fullpath(extension.name))
                nvcc.build(compiler, out, Path(self.build_temp).resolve() / "cuda")
            else:
                super().build_extension(extension)

    return {
        "ext_modules": [cpu, cuda] if with_cuda else [cpu],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("CC4S_KERNELS_SKIP_BUILD") == "1" else extensions()))
