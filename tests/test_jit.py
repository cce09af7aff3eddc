"""Kernels compiled at run time: when, from what, and what is said where they cannot be. NVRTC compiles one op."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import cc4s_kernels as ck
from cc4s_kernels import _cuda, _jit, _library, backends, info
from tools import host_part, nvrtc_check
from tools.compile_check import TARGETS


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """What is found once in a process is found anew in each test."""
    caches = (_jit.missing, _jit.source, _jit._module)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit.importlib.util, "find_spec", lambda name: None)


# ---- when


def test_chosen_where_nothing_is_compiled_and_cupy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_jit.VARIABLE, raising=False)
    assert _jit.chosen(compiled=False)
    assert not _jit.chosen(compiled=True)
    monkeypatch.setenv(_jit.VARIABLE, "1")
    assert _jit.chosen(compiled=True)
    monkeypatch.setenv(_jit.VARIABLE, "0")
    assert not _jit.chosen(compiled=False)
    without_cupy(monkeypatch)
    monkeypatch.delenv(_jit.VARIABLE)
    assert not _jit.chosen(compiled=False)
    # Then `missing` says why it does not work.
    monkeypatch.setenv(_jit.VARIABLE, "1")
    assert _jit.chosen(compiled=False)


def test_an_unknown_setting_is_said_and_import_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_jit.VARIABLE, "yes")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _library._load_cuda_extension() == "CC4S_KERNELS_JIT: got 'yes', expected 0, 1 or nothing"


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension loads; only its driver is missing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_RUN_TIME", True)
    monkeypatch.setattr(_library, "_load_extension", lambda name, title: None)

    def absent() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(_jit, "cuda_driver", absent)
    error = _library._load_cuda_extension()
    assert error == (
        "the CUDA driver, for kernels compiled at run time by NVRTC through CuPy, does not load: "
        "libcuda.so.1: cannot open shared object file"
    )


def test_missing_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _jit.missing() is None
    _jit.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.ModuleType("cupy.cuda"))
    reason = _jit.missing()
    assert reason is not None
    assert reason.startswith("NVRTC, with which CuPy compiles kernels at run time, does not load: ")
    _jit.missing.cache_clear()
    without_cupy(monkeypatch)
    reason = _jit.missing()
    assert reason is not None
    assert reason.startswith("CuPy, which compiles kernels at run time, is not installed (pip install cupy-cuda13x)")


def test_explain_and_info_say_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.zeros(1, 4, 4, dtype=torch.int32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "CUDA_RUN_TIME", True)
    monkeypatch.setattr(_library, "CUDA_EXTENSION_ERROR", None)
    monkeypatch.setattr(_cuda, "refuses", lambda tensor, name: None)
    reason = ck.explain("superpixel_boundaries", ids).reasons["cuda"]
    assert reason.startswith("compiled at run time by NVRTC through CuPy, not yet verified on this GPU")
    with ck.use_backend("cuda"):
        assert ck.explain("superpixel_boundaries", ids).backend == "cuda"
    assert "superpixel_boundaries: cuda runs (kernels compiled at run time by NVRTC through CuPy)" in (
        capsys.readouterr().out
    )
    assert info.extensions()[1].endswith("_JIT.so, kernels compiled at run time by NVRTC through CuPy")
    monkeypatch.setattr(_jit, "missing", lambda: "CuPy is not there")
    assert ck.explain("superpixel_boundaries", ids).reasons["cuda"] == "CuPy is not there"
    assert info.extensions()[1] == "CuPy is not there"


def test_an_op_without_a_host_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "CUDA_RUN_TIME", True)
    monkeypatch.setattr(_library, "CUDA_EXTENSION_ERROR", None)
    assert _cuda.lacks("slic") is None
    assert _cuda.lacks("no_op") == "no_op has no CUDA kernels that can be compiled at run time"
    backends.register("no_op", "cuda", lambda: None)
    try:
        assert backends._refusal("no_op", "cuda", (), {}) == _cuda.lacks("no_op")
    finally:
        del backends._implementations["no_op"]


def test_every_op_with_a_host_part_is_registered() -> None:
    path = _library.extension_path("_JIT")
    ops = {source.parent.name for source in host_part.ROOT.glob("csrc/*/*_jit.cpp")} - {"common"}
    assert ops
    assert all(_jit.has(path, op) and "cuda" in backends._implementations[op] for op in ops)


# ---- from what


@pytest.mark.parametrize(
    ("name", "op", "instances"),
    [
        ("slic::prepare(slic::Problem, slic::Scratch)", "slic", None),
        ("void f::mark<int>(int const*, Strides)", "f", ("f::mark<int>",)),
        ("void f::walk<(bool)1, 64, g::T<int> >(void (*)(int))", "f", ("f::walk<(bool)1, 64, g::T<int> >",)),
    ],
)
def test_what_is_asked_of_nvrtc(name: str, op: str, instances: tuple[str, ...] | None) -> None:
    assert _jit.request(name) == (op, instances)


def test_the_source_changes_with_what_it_includes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CuPy would take what it compiled from other headers."""
    for path in ("f/f.cuh", "common/strides.cuh", "g/g.cuh"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("int a;")
    monkeypatch.setattr(_jit, "sources", lambda: tmp_path)
    texts = [_jit.source("f")]
    for path in ("g/g.cuh", "f/f.cuh", "common/strides.cuh"):
        (tmp_path / path).write_text("int b;")
        _jit.source.cache_clear()
        texts.append(_jit.source("f"))
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert all(text.endswith('\n#include "f/f.cuh"\n') for text in texts)


def test_cupy_compiles_each_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module for the plain kernels of an op, and one for each instance of a template."""
    made: list[dict[str, Any]] = []
    devices: list[int] = []

    def module(**arguments: Any) -> Any:
        made.append(arguments)
        return types.SimpleNamespace(
            get_function=lambda name: types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=hash(name) % 2**31 + 1))
        )

    def device(index: int) -> Any:
        devices.append(index)
        return nullcontext()

    cupy = types.ModuleType("cupy")
    cupy.RawModule = module  # type: ignore[attr-defined]
    cupy.cuda = types.SimpleNamespace(Device=device)  # type: ignore[attr-defined]
    monkeypatch.setattr(_jit, "missing", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = [
        _jit._function("_ZN4slic5mergeE", "slic::merge(slic::Problem)", 0),
        _jit._function("_ZN4slic6numberE", "slic::number(slic::Problem)", 1),
        _jit._function("_ZN1f4markIiE", "void superpixel_boundaries::mark<int>(int)", 0),
    ]
    names = ["_ZN4slic5mergeE", "_ZN4slic6numberE", "superpixel_boundaries::mark<int>"]
    assert found == [hash(name) % 2**31 + 1 for name in names]
    assert devices == [0, 1, 0]
    assert [one["name_expressions"] for one in made] == [None, ("superpixel_boundaries::mark<int>",)]
    assert all(one["options"] == ("-std=c++17", f"-I{_jit.sources()}") for one in made)


def test_a_compiler_error_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "missing", lambda: "NVRTC is not there")
    message = ctypes.create_string_buffer(4096)
    assert _jit._find(b"symbol", b"slic::merge(int)", 0, message, 4095) is None
    assert message.value.decode() == (
        "slic::merge cannot be compiled at run time by NVRTC through CuPy: RuntimeError: NVRTC is not there"
    )


# ---- the host part


CUH = """\
// A comment with a brace {
namespace f {
constexpr int kThreads = 256;
template <class T>
struct Maps {
  T* at;
  __host__ __device__ int tiles() const { return 3; }
  __device__ explicit Maps(T* at) : at(at) { if (at) { trap("}"); } }
};
__device__ constexpr int twice(int x) { return 2 * x; }
__device__ __forceinline__ int lane();
template <int size>
__global__ void __launch_bounds__(kThreads, 2)
    mark(Maps<int> maps, const int (&sizes)[2]) {
  __shared__ int all[size];
  asm volatile("{ mov.u32 %0, 1; }" : "=r"(all[0]));
}
__constant__ const int table[2] = {1, 2};
}  // namespace f
"""


def test_host_part() -> None:
    text = host_part.host_part(CUH)
    assert text.count("\n") == CUH.count("\n")
    assert "asm" not in text
    assert "mark(Maps<int> maps, const int (&sizes)[2]) {}" in text
    assert "explicit Maps(T* at) : at(at) { __builtin_trap(); }" in text
    for line in ("tiles() const { return 3; }", "twice(int x) { return 2 * x; }", "table[2] = {1, 2};", "int lane();"):
        assert line in text
    with pytest.raises(ValueError, match="a bracket that nothing closes"):
        host_part.host_part("__global__ void f() { {")


def test_the_host_part_is_written_once(tmp_path: Path) -> None:
    host_part.write(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cuh")}
    assert len(times) == len(list(host_part.ROOT.glob("csrc/*/*.cuh")))
    host_part.write(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in times} == times


# ---- NVRTC, without a GPU; all ops: tools/compile_check.py


def test_nvrtc_compiles_for_every_chip() -> None:
    rows = nvrtc_check.check(TARGETS, 1, ("superpixel_boundaries",))
    kernels = {f"superpixel_boundaries::mark<{id}>" for id in ("short", "int", "long long")}
    assert {(row.target, row.kernel) for row in rows} == {(target, kernel) for target in TARGETS for kernel in kernels}
    assert all(row.passed for row in rows)


def test_a_kernel_that_is_not_compiled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = ("superpixel_boundaries", ("superpixel_boundaries::mark<int>",), ["_ZN4slic5mergeE"])
    monkeypatch.setattr(nvrtc_check, "units", lambda: [unit])
    with pytest.raises(RuntimeError, match="not among the compiled kernels: _ZN4slic5mergeE"):
        nvrtc_check.check(("sm_80",), 1)
    monkeypatch.setattr(nvrtc_check, "units", lambda: [("superpixel_boundaries", ("no_such<int>",), [])])
    with pytest.raises(RuntimeError, match=r"superpixel_boundaries for sm_80: .*no_such"):
        nvrtc_check.check(("sm_80",), 1)


def test_all_kernels_of_host_parts_are_known() -> None:
    """Each `.cuh` with a host part has kernels there, and no kernel has a name that is taken for none."""
    ops = {source.parent.name for source in host_part.ROOT.glob("csrc/*/*_jit.cpp")} - {"common"}
    assert {op for op, _, _ in nvrtc_check.units()} == ops
    named = {_jit.expression(name).split("<")[0] for name in nvrtc_check.symbols().values()}
    assert named == {name for name in host_part.kernel_names() if name.split("::")[0] in ops}
