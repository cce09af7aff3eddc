"""Builds the extensions of `cc4s_kernels` against the LibTorch stable ABI: `_C.so` for CPUs, `_JIT.so` with the host
part of CUDA kernels that are compiled at run time, and, where torch has CUDA and nvcc is found, `_CU.so` for NVIDIA
GPUs. The sources of device code are packed into the wheel.

One `.so` serves every Python (abi3: it has no Python symbols at all) and every torch >= 2.11.
Needs torch, ninja and g++ in the installing environment: `pip install --no-build-isolation -e .`
`CC4S_KERNELS_SKIP_BUILD=1` installs the pure-Python package (reference backend only). `CC4S_KERNELS_CUDA=1` fails where
`_CU.so` cannot be built, `CC4S_KERNELS_CUDA=0` leaves it out; TORCH_CUDA_ARCH_LIST says for which GPUs.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# A build front end need not have the project's folder on the path.
sys.path.insert(0, str(ROOT))

from tools import host_part, nvcc  # noqa: E402


class PackSources(build_py):
    """Copies the sources of device code into the package; an editable installation reads those of the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for suffix in ("cuh", "h"):
            for path in (ROOT / "csrc").glob(f"*/*.{suffix}"):
                out = Path(self.build_lib, "cc4s_kernels", path.relative_to(ROOT))
                out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out)


def extensions() -> dict:
    """Arguments of `setup` that build `cc4s_kernels/_C.so` and `cc4s_kernels/_CU.so`."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    def extension(name: str, pattern: str, *flags: str) -> Extension:
        return CppExtension(
            f"cc4s_kernels.{name}",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern)),
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
                *flags,
            ],
            py_limited_api=True,
        )

    cpu = extension("_C", "*/*_cpu.cpp", "-fvisibility=hidden")
    # Exports its kernels, which are named by their symbols.
    run_time = extension("_JIT", "*/*_jit.cpp")
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
                return
            if extension.name == run_time.name:
                # In front of csrc.
                extension.include_dirs.insert(0, str(host_part.write(Path(self.build_temp).resolve() / "host")))
            super().build_extension(extension)

    return {
        "ext_modules": [cpu, run_time, *([cuda] if with_cuda else [])],
        "cmdclass": {"build_ext": Build, "build_py": PackSources},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("CC4S_KERNELS_SKIP_BUILD") == "1" else extensions()))
