"""How many blocks of a kernel a multiprocessor holds, from what the kernel needs and the limits of the chip.

Limits: CUDA C++ Programming Guide 13.0, "Compute Capabilities", table "Technical Specifications per Compute
Capability". Granularities: NVIDIA's occupancy calculator (cuda_occupancy.h of CUDA 13.0), where they are the same for
all chips here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

KIBI = 1024
WARP = 32
REGISTERS = 64 * KIBI
"""32-bit registers per multiprocessor: the same guide, all chips here."""
QUARTERS = 4
"""Parts of a multiprocessor, with a quarter of its registers each (cudaOccSubPartitionsPerMultiprocessor)."""
REGISTER_UNIT = 256
"""Registers that a warp gets at a time (cudaOccRegAllocationGranularity)."""
SHARED_UNIT = 128
"""Bytes of shared memory that a block gets at a time (cudaOccSMemAllocationGranularity)."""
RESERVED_SHARED = 1 * KIBI
"""Bytes that the system takes of each block (cudaDeviceProp::reservedSharedMemPerBlock; the guide, "Shared Memory")."""


class Chip(NamedTuple):
    """Per multiprocessor: resident threads and blocks, bytes of shared memory."""

    threads: int
    blocks: int
    shared: int


CHIPS = {
    "sm_80": Chip(2048, 32, 164 * KIBI),
    "sm_86": Chip(1536, 16, 100 * KIBI),
    "sm_90": Chip(2048, 32, 228 * KIBI),
    "sm_100": Chip(2048, 32, 228 * KIBI),
}
"""Rows "Maximum number of resident threads / blocks per SM" and "Maximum amount of shared memory per SM"."""


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks(target: str, threads: int, registers: int, shared: int) -> int:
    """Resident blocks per multiprocessor of `target` ("sm_90" or "sm_90a").

    threads: of a block, at least 1. registers: per thread. shared: bytes of a block, static and dynamic.
    """
    chip = CHIPS[target.removesuffix("a")]
    warps = _up(threads, WARP) // WARP
    limits = [chip.blocks, chip.threads // (warps * WARP), chip.shared // (_up(shared, SHARED_UNIT) + RESERVED_SHARED)]
    if registers > 0:
        of_quarter = REGISTERS // QUARTERS // _up(registers * WARP, REGISTER_UNIT)
        limits.append(QUARTERS * of_quarter // warps)
    return min(limits)


def occupancy(target: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps as a share of those that a multiprocessor can hold."""
    warps = _up(threads, WARP) // WARP
    return blocks(target, threads, registers, shared) * warps * WARP / CHIPS[target.removesuffix("a")].threads


# ---- threads of a block, which ptxas -v does not say

# Attributes in the sections .nv.info.<symbol> of a CUBIN, as cuobjdump -elf names them: three 32-bit sizes.
_MAX_THREADS, _REQUIRED_THREADS = 0x05, 0x10
# An attribute starts with its format; only this one has a payload, whose size is in the next two bytes.
_SIZED = 0x04


def threads_of(cubin: bytes) -> dict[str, int]:
    """For each kernel with launch bounds in a CUBIN (an ELF file), by symbol, the most threads of a block."""
    found: dict[str, int] = {}
    begin, size, count, names_at = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, begin + size * i) for i in range(count)]
    strings = headers[names_at][4]
    for name_at, _, _, _, at, length in headers:
        name = cubin[strings + name_at : cubin.index(b"\0", strings + name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        end = at + length
        while at < end:
            form, attribute, bytes_ = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form != _SIZED:
                continue
            if attribute in (_MAX_THREADS, _REQUIRED_THREADS):
                x, y, z = struct.unpack_from("<3I", cubin, at)
                found[name.removeprefix(".nv.info.")] = x * y * z
            at += bytes_
    return found
