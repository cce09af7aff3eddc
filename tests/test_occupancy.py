"""tools/occupancy.py against NVIDIA's occupancy calculator, the header that Triton's package carries."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import nvrtc_check, occupancy

INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"

CALCULATOR = """
#include <cstddef>
#include "cuda_occupancy.h"
extern "C" int blocks(int major, int minor, int most_threads, int shared_of_sm, int threads, int registers,
                      int shared) {
  cudaOccDeviceProp chip{};
  chip.computeMajor = major;
  chip.computeMinor = minor;
  chip.maxThreadsPerBlock = 1024;
  chip.maxThreadsPerMultiprocessor = most_threads;
  chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
  chip.warpSize = 32;
  chip.sharedMemPerBlock = 48 * 1024;
  chip.sharedMemPerMultiprocessor = shared_of_sm;
  chip.sharedMemPerBlockOptin = shared_of_sm - 1024;
  chip.reservedSharedMemPerBlock = 1024;
  chip.numSms = 1;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.maxDynamicSharedSizeBytes = chip.sharedMemPerBlockOptin;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  cudaOccDeviceState state{};
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult found{};
  const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &chip, &kernel, &state, threads, shared);
  return error == CUDA_OCC_SUCCESS ? found.activeBlocksPerMultiprocessor : -1;
}
"""


@pytest.fixture(scope="module")
def calculator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("occupancy") / "calculator.so"
    command = ["g++", "-shared", "-fPIC", "-isystem", str(INCLUDE), "-x", "c++", "-", "-o", str(out)]
    subprocess.run(command, input=CALCULATOR, text=True, check=True)
    return ctypes.CDLL(str(out))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    target=st.sampled_from(sorted(occupancy.CHIPS)),
    threads=st.integers(1, 1024),
    registers=st.integers(1, 255),
    shared=st.integers(0, 99 * 1024),
)
def test_equals_nvidias(calculator: ctypes.CDLL, target: str, threads: int, registers: int, shared: int) -> None:
    chip = occupancy.CHIPS[target]
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    expected = calculator.blocks(major, minor, chip.threads, chip.shared, threads, registers, shared)
    assert occupancy.blocks(target, threads, registers, shared) == expected


def test_occupancy() -> None:
    # 2048 threads: 8 blocks of 256.
    assert occupancy.occupancy("sm_80", 256, 32, 0) == 1.0
    # 3072 registers a warp, 5 warps in each quarter: what `__launch_bounds__(128, 5)` of slic::assign asks for.
    assert occupancy.blocks("sm_80", 128, 96, 19440) == 5
    assert occupancy.occupancy("sm_90a", 128, 96, 19440) == 20 / 64
    # Of 1536 threads.
    assert occupancy.occupancy("sm_86", 1024, 32, 0) == 2 / 3
    # No block fits: 1024 threads of more than 64 registers.
    assert occupancy.occupancy("sm_80", 1024, 65, 0) == 0.0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_threads_of_a_cubin(target: str) -> None:
    op = "superpixel_boundaries"
    cubin, _ = nvrtc_check.compile_unit(op, (f"{op}::mark<int>",), target)
    assert list(occupancy.threads_of(cubin).values()) == [256]
