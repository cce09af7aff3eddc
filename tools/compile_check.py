"""Compiles the Triton and CUDA kernels ahead of time, without a GPU, and says what each needs on its chip.

    python -m tools.compile_check [--full] [--json FILE] [--targets sm_90 ...] [--ops random_walk ...]
                                  [--backends triton cuda nvrtc] [--require-nvcc]

Per kernel: registers per thread, bytes spilled, shared memory, occupancy (tools/occupancy.py). The exit code is 1 if a
kernel spills, needs more shared memory than its chip has, or does not compile. By default each Triton op is compiled at
the published size in bfloat16; `--full` takes every dtype and every size class of cc4s_kernels/_triton/configs.py.

What is compiled is what the ops launch: each op runs on meta tensors with a recorder in the place of the GPU. CUDA
sources (tools/cuda_check.py), and the same as CuPy compiles them at run time (tools/nvrtc_check.py), are left out where
there is no nvcc or no NVRTC, unless they are required.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools import cuda_check, nvcc, nvrtc_check, occupancy

PAIRWISE = ("random_walk", "transition_consistency", "transition_matrix")
OPS = (*PAIRWISE, "bilateral_filter", "potts", "gated_crf", "upsample_losses")
PUBLISHED = (64, 512)
SIZES = ((16, 64), PUBLISHED, (64, 256), (64, 1024), (128, 512), (256, 1024))
"""(d, D): one of every class of the table, and sizes around the published one."""
CLASSES = (21, 60, 2, 128, 255, 1000)
"""Of upsample_losses, and the first two of bilateral_filter: VOC 2012, Pascal Context, and one of every class of the
table."""

KIBI = 1024
# Largest dynamic shared memory of a block, CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_LIMIT = {"sm_80": 163 * KIBI, "sm_86": 99 * KIBI, "sm_90": 227 * KIBI, "sm_100": 227 * KIBI}
BACKENDS = ("triton", "cuda", "nvrtc")
TARGETS = ("sm_80", "sm_90", "sm_100")


class Job(NamedTuple):
    """One kernel instance. arguments: (name, Triton type, divisible by 16) or, for a constant, (name, value)."""

    target: str
    module: str
    kernel: str
    case: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int


class Found(NamedTuple):
    target: str
    kernel: str
    case: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_memory_columns: int
    seconds: float
    error: str

    @property
    def occupancy(self) -> float:
        """Of a multiprocessor."""
        return occupancy.occupancy(self.target, 32 * self.warps, self.registers, self.shared_bytes)

    def row(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**self._asdict(), "occupancy": self.occupancy, "passed": self.passed}

    @property
    def passed(self) -> bool:
        return not self.error and self.spill_bytes == 0 and self.shared_bytes <= self.shared_limit


# ---- what the ops launch

Case = tuple[str, torch.dtype, str, int, int]


def cases(ops: Sequence[str], full: bool) -> Iterator[Case]:
    """(op, dtype, precision of float32 products, d, D); d is the number of classes of upsample_losses and
    bilateral_filter, and d and D are 0 for ops without them."""
    kinds = [(torch.bfloat16, "ieee")]
    if full:
        kinds += [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    for op in ops:
        if op == "upsample_losses":
            # Its kernels see no other dtypes.
            for dtype in (torch.float32, torch.float64) if full else (torch.float32,):
                for classes in CLASSES if full else CLASSES[:2]:
                    yield op, dtype, "ieee", classes, 0
            continue
        for dtype, precision in kinds:
            # float16 compiles as bfloat16 does.
            sizes = SIZES if full and dtype != torch.float16 else (PUBLISHED,)
            if op == "bilateral_filter":
                for classes in CLASSES[:2] if full else CLASSES[:1]:
                    yield op, dtype, precision, classes, 0
                continue
            if op not in PAIRWISE:
                if precision == "ieee":
                    yield op, dtype, precision, 0, 0
                continue
            if op != "random_walk":
                sizes = tuple(dict.fromkeys((key, 0) for key, _ in sizes))
            for key, value in sizes:
                yield op, dtype, precision, key, value


def run_potts(kernels: Any, dtype: torch.dtype) -> None:
    """Every relaxation at the published crop, 21 classes, on 8-connected pixels and on 800 superpixels."""
    from cc4s_kernels.ops.potts.reference import RELAXATIONS

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    edges = 3 * 800 - 6
    grid = empty(2, 21, 465, 465), empty(2, 4, 465, 465, of=torch.float32), None
    graph = empty(2, 800, 21), empty(2, edges, of=torch.float32), empty(2, 2, edges, of=torch.int64)
    for tensors in (grid, graph):
        for relaxation in RELAXATIONS:
            energy, scale = kernels.forward(*tensors, relaxation, "frobenius")
            kernels.backward(energy, energy, scale, *tensors, relaxation, "frobenius", True, True)


def run_gated_crf(kernels: Any, dtype: torch.dtype, variants: bool) -> None:
    """At the published crop and radius with 21 classes; `variants` adds gates and more classes than a tile has."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    gate = empty(2, 465, 465, of=torch.bool)
    color, sums = empty(2, 3, 465, 465, of=torch.float32), empty(2, of=torch.float32)
    for classes, gates in ((21, (None, None)), (60, (gate, gate))) if variants else ((21, (None, None)),):
        arguments = (empty(2, classes, 465, 465), color, *gates, 5, 6.0)
        kernels.forward(*arguments)
        kernels.backward(sums, *arguments)


def run_bilateral_filter(kernels: Any, dtype: torch.dtype, channels: int, variants: bool) -> None:
    """At the published crop; `variants` adds a mask and the pair of a pixel with itself."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    values, levels = empty(2, channels, 465, 465), empty(2, 3, 465, 465, of=torch.float32)
    for mask in (None, empty(2, 465, 465, of=torch.bool)) if variants else (None,):
        kernels.bilateral_filter(values, levels, mask, 80.0, 13.0, mask is not None)


def run_op(op: str, dtype: torch.dtype, key: int, value: int, variants: bool) -> None:
    """Launches every kernel of `op` on meta tensors; `variants` adds masks, several steps and restarts."""
    kernels = importlib.import_module(f"cc4s_kernels.ops.{op}.triton")
    if op == "potts":
        return run_potts(kernels, dtype)
    if op == "gated_crf":
        return run_gated_crf(kernels, dtype, variants)
    if op == "bilateral_filter":
        return run_bilateral_filter(kernels, dtype, key, variants)
    if op == "upsample_losses":
        return run_upsample_losses(kernels, dtype, key, variants)
    n = 3481

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k = empty(2, n, key), empty(2, n, key)
    masks = (None, empty(2, n, of=torch.bool)) if variants else (None,)
    if op == "random_walk":
        from cc4s_kernels.ops.random_walk import steps as walk

        v, triton_kernels = empty(2, n, value), kernels.TritonKernels()
        for mask in masks:
            for steps, restart in ((1, 0.0), (2, 0.25)) if variants else ((1, 0.0),):
                saved = walk.forward(triton_kernels, q, k, v, mask, 1.0, steps, restart)
                walk.backward(triton_kernels, q, k, v, mask, *saved, v, saved[1], 1.0, steps, restart, True, True)
    elif op == "transition_consistency":
        from cc4s_kernels.ops.transition_consistency import passes

        triton_kernels = kernels.TritonKernels()
        for mask in masks:
            kl, diagonal, _, *lse = passes.forward(triton_kernels, q, k, q, k, mask, 1.0)
            passes.backward(triton_kernels, q, k, q, k, mask, diagonal, *lse, kl, kl, 1.0)
    else:
        for normalize in ("row", "symmetric", "column"):
            matrix, lse2 = kernels.forward(q, k, 1.0, normalize)
            kernels.backward(q, k, lse2, matrix, 1.0, normalize)


def run_upsample_losses(kernels: Any, dtype: torch.dtype, classes: int, variants: bool) -> None:
    """At the published size with and without superpixels; `variants` adds half-pixel centres and other upsamplings."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    ids = 800
    for side in (465, 233, 59) if variants else (465,):
        size = (2, side, side)
        labels = empty(*size, of=torch.uint8 if classes <= 255 else torch.int32)
        maps = (empty(*size, of=torch.bool), empty(*size, of=torch.int32), empty(classes))
        for given in ((None, None, None), maps):
            num_ids = 0 if given[1] is None else ids
            pooled = None if given[1] is None else empty(2, ids, classes)
            arguments = (empty(2, classes, 59, 59), labels, *given, num_ids, 255, side == 465)
            kernels.forward(*arguments)
            kernels.backward(empty(2), empty(2), pooled, *arguments)


TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# The constants that say how large a tile is.
SHAPE = ("BLOCK_M", "BLOCK_N", "QUADS", "PIXELS", "BLOCK_C")


def job_of(target: str, case: str, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], config: Any) -> Job:
    """The compilation that `kernel[grid](*args, **constants)` would start."""
    types: list[tuple[str, str]] = []
    fixed = dict(constants)
    divisible = []
    for index, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(arg, torch.Tensor):
            types.append((name, TYPES[arg.dtype]))
            divisible.append(index)
        elif isinstance(arg, float):
            types.append((name, "fp32"))
        elif arg == 1:
            fixed[name] = 1
        else:
            types.append((name, "i32" if -(2**31) <= arg < 2**31 else "i64"))
            if arg % 16 == 0:
                divisible.append(index)
    return Job(
        target,
        kernel.fn.__module__,
        kernel.fn.__name__,
        case,
        tuple(types),
        tuple(fixed.items()),
        tuple(divisible),
        config.warps,
        config.stages,
    )


def collect(target: Any, ops: Sequence[str], full: bool) -> list[Job]:
    """The different kernel instances that the ops launch on `target`."""
    from cc4s_kernels._triton import launch

    jobs: dict[Any, Job] = {}
    for op, dtype, precision, key, value in cases(ops, full):
        name = str(dtype).removeprefix("torch.") if precision == "ieee" else precision
        width = "d" if op in PAIRWISE else "C"
        case = name + (f" {width}={key}" if key else "") + (f" D={value}" if value else "")

        def record(
            kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], config: Any, case: str = case
        ) -> None:
            job = job_of(target, case, kernel, args, constants, config)
            jobs.setdefault(job._replace(case=""), job)

        torch.backends.cuda.matmul.fp32_precision = precision
        with launch.recording(target, record):
            published = key in (0, CLASSES[0]) if op not in PAIRWISE else (key, value or PUBLISHED[1]) == PUBLISHED
            run_op(op, dtype, key, value, variants=full and published)
    return list(jobs.values())


# ---- compilation


def compile_job(job: Job) -> Found:
    """Compiles one kernel; never raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    capability = int(job.target.removeprefix("sm_"))
    types, constants = dict(job.types), dict(job.constants)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in job.divisible})
    flags = [f"{name}={value}" for name, value in job.constants if name.isupper() and value is True]
    flags += [constants["RELAXATION"]] if "RELAXATION" in constants else []
    shape = "x".join(str(constants[name]) for name in SHAPE if name in constants)
    case = " ".join([job.case, shape, *flags])
    head = (job.target, job.kernel, case, job.warps, job.stages)
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": job.warps, "num_stages": job.stages},
        )
        registers, spills = resources(compiled.asm["ptx"], capability)
    except Exception as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        return Found(*head, 0, 0, 0, SHARED_LIMIT[job.target], 0, time.perf_counter() - start, message[-1])
    return Found(
        *head,
        registers,
        spills,
        compiled.metadata.shared,
        SHARED_LIMIT[job.target],
        getattr(compiled.metadata, "tmem_size", None) or 0,
        time.perf_counter() - start,
        "",
    )


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from the assembler in Triton's package."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    blackwell = folder / "ptxas-blackwell"
    ptxas = blackwell if capability >= 100 and blackwell.exists() else folder / "ptxas"
    # Instructions of 9.0 and 10.0 that no other chip has carry the suffix a.
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "kernel.ptx"
        path.write_text(ptx)
        # The options of Triton's own call.
        command = [ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", str(path), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = max(map(int, re.findall(r"Used (\d+) registers", result.stderr)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", result.stderr)))


def check_triton(options: argparse.Namespace) -> list[Found]:
    """Compiles what `options` asks for, and prints it."""
    jobs = [job for target in options.targets for job in collect(target, options.ops, options.full)]
    print(
        f"{'chip':<8}{'kernel':<26}{'warps':>5}{'stages':>7}{'regs':>6}{'spills':>8}{'shared KiB':>12}{'occ.':>6}  case"
    )
    rows = []
    # Triton's compiler is not safe to fork.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_job, jobs):
            shared = f"{row.shared_bytes / KIBI:.0f}/{row.shared_limit // KIBI}"
            print(
                f"{row.target:<8}{row.kernel:<26}{row.warps:>5}{row.stages:>7}{row.registers:>6}{row.spill_bytes:>8}"
                f"{shared:>12}{row.occupancy:>6.0%}  {row.case}{'' if row.passed else '  FAILED ' + row.error}",
                flush=True,
            )
            rows.append(row)
    return rows


def print_kernels(rows: Sequence[cuda_check.Kernel]) -> None:
    print(f"{'chip':<8}{'op':<24}{'regs':>6}{'stack':>8}{'spills':>8}{'shared B':>10}{'threads':>8}{'occ.':>6}  kernel")
    for row in rows:
        share = "-" if row.occupancy is None else f"{row.occupancy:.0%}"
        print(
            f"{row.target:<8}{row.op:<24}{row.registers:>6}{row.stack_bytes:>8}{row.spill_bytes:>8}"
            f"{row.shared_bytes:>10}{row.threads or '-':>8}{share:>6}  {row.kernel}{'' if row.passed else '  FAILED'}"
        )


def check_cuda(options: argparse.Namespace) -> list[cuda_check.Kernel]:
    """Compiles the CUDA extension where nvcc is, and prints its kernels."""
    compiler = nvcc.find()
    if compiler is None:
        print("CUDA kernels left out: nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda")
        return []
    rows = cuda_check.check(compiler, options.targets, options.processes)
    print_kernels(rows)
    return rows


def check_nvrtc(options: argparse.Namespace) -> list[cuda_check.Kernel]:
    """Compiles the same kernels with NVRTC where it is, and prints them."""
    if (lacking := nvrtc_check.lacking()) is not None:
        print(f"Kernels compiled at run time left out: {lacking}")
        return []
    rows = nvrtc_check.check(options.targets, options.processes)
    print("Compiled by NVRTC, with the options of CuPy:")
    print_kernels(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the Triton and CUDA kernels without a GPU.")
    parser.add_argument("--full", action="store_true", help="every dtype and size class, not one of each kernel")
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=SHARED_LIMIT, metavar="SM")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, metavar="OP", help="which Triton ops")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--require-nvcc", action="store_true", help="fail where there is no nvcc or no NVRTC")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: interpreted kernels cannot be compiled")
    if options.require_nvcc and nvcc.find() is None:
        parser.error("--require-nvcc: nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda")
    if options.require_nvcc and (lacking := nvrtc_check.lacking()) is not None:
        parser.error(f"--require-nvcc: {lacking}")

    triton_rows = check_triton(options) if "triton" in options.backends else []
    cuda_rows = check_cuda(options) if "cuda" in options.backends else []
    nvrtc_rows = check_nvrtc(options) if "nvrtc" in options.backends else []
    rows = [*triton_rows, *cuda_rows, *nvrtc_rows]
    if options.json is not None:
        import triton

        tables = {
            name: [row.row() for row in table]
            for name, table in (("kernels", triton_rows), ("cuda_kernels", cuda_rows), ("nvrtc_kernels", nvrtc_rows))
        }
        options.json.write_text(json.dumps({"triton": triton.__version__, **tables}, indent=1) + "\n")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} kernels compiled, {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
