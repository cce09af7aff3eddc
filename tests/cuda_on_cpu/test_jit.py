"""Kernels compiled at run time: the host part in `_JIT.so`, driven by a driver that runs kernels on the CPU.

The same kernels with the same grids, blocks and argument bytes as from the C++ launcher, and the reference's results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from cc4s_kernels import _jit, _library
from cc4s_kernels.ops.color_affinity import reference as color_reference
from cc4s_kernels.ops.slic.reference import slic as slic_reference
from cc4s_kernels.ops.superpixel_boundaries.reference import superpixel_boundaries as boundaries_reference
from tests.cuda_on_cpu import test_color_affinity as affinity
from tests.cuda_on_cpu import test_slic as slic
from tests.cuda_on_cpu import test_superpixel_boundaries as boundaries
from tests.cuda_on_cpu import test_tree_filter as tree
from tests.cuda_on_cpu.build import library
from tests.ops.test_slic import random_mask, textured
from tests.ops.tester import generator, strided_copy

pytestmark = pytest.mark.skipif(_library.CUDA_EXTENSION_ERROR is None, reason="the CUDA key has its real kernels")

STREAM = 77
"""What the driver of these tests says is the current stream."""

# Of CUfunction_attribute and CUdevice_attribute in cuda.h.
MAX_DYNAMIC_SHARED_BYTES, MAX_SHARED_BYTES_PER_BLOCK_OPTIN = 8, 97
MOST_SHARED = 163 * 1024

_LISTENER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
)
_CURRENT_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_SET_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
_DEVICE_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Launch(NamedTuple):
    symbol: str
    shape: tuple[int, ...]
    arguments: tuple[bytes, ...]


class Machine:
    """A CUDA driver. Functions are numbers of kernels; kernels run in the harness of their op."""

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.error = 0
        self.refuses: str | None = None

        @_jit.FIND
        def find(symbol: bytes, name: bytes, device: int, message: Any, size: int) -> int | None:
            if self.refuses is not None:
                ctypes.memmove(message, self.refuses.encode(), len(self.refuses))
                return None
            self.symbols.append(symbol.decode())
            self.names[symbol.decode()] = name.decode()
            return len(self.symbols)

        @_CURRENT_STREAM
        def current_stream(device: int, stream: Any) -> int:
            stream[0] = STREAM
            return 0

        @_LAUNCH
        def launch(function: int, *rest: Any) -> int:
            *shape, shared, stream, arguments, extra = rest
            symbol = self.symbols[function - 1]
            if self.error:
                return self.error
            assert (shared, stream, extra) == (self.shared.get(function, 0), STREAM, None)
            op, _ = _jit.request(self.names[symbol])
            return library(op).launch(symbol.encode(), (ctypes.c_uint * 6)(*shape), arguments)

        @_SET_ATTRIBUTE
        def set_attribute(function: int, attribute: int, value: int) -> int:
            assert attribute == MAX_DYNAMIC_SHARED_BYTES
            self.shared[function] = value
            return 0

        @_DEVICE_ATTRIBUTE
        def device_attribute(value: Any, attribute: int, device: int) -> int:
            assert attribute == MAX_SHARED_BYTES_PER_BLOCK_OPTIN
            value[0] = MOST_SHARED
            return 0

        self.names: dict[str, str] = {}
        self.shared: dict[int, int] = {}
        functions = (current_stream, launch, set_attribute, device_attribute)
        self.driver = _jit.Driver(find, *(ctypes.cast(function, ctypes.c_void_p) for function in functions))
        self.kept = (find, *functions)


@pytest.fixture
def machine() -> Machine:
    path = _library.extension_path("_JIT")
    assert path is not None
    torch.ops.load_library(str(path))
    found = Machine()
    _jit.connect(path, found.driver)
    return found


def on_jit(op: str, *arguments: Any) -> Any:
    """The CUDA kernel of a torch op, for tensors on the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.cc4s_kernels, op).default.redispatch(keys, *arguments)


def launches(op: str, run: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """What `run` returns, and what it starts in the harness of an op."""
    found: list[Launch] = []

    @_LISTENER
    def listen(symbol: bytes, shape: Any, arguments: Any, sizes: Any, count: int) -> None:
        values = tuple(ctypes.string_at(arguments[i], sizes[i]) for i in range(count))
        found.append(Launch(symbol.decode(), tuple(shape[:6]), values))

    library(op).listen(listen)
    try:
        return run(), found
    finally:
        library(op).listen(None)


def words(launch: Launch) -> Iterator[int]:
    """The arguments in parts of eight bytes, or what is left of them."""
    for argument in launch.arguments:
        for begin in range(0, len(argument), 8):
            yield int.from_bytes(argument[begin : begin + 8], "little")


def assert_same_launches(op: str, compiled: Callable[[], Any], run_time: Callable[[], Any], allocations: int) -> Any:
    """allocations: how many blocks of memory differ between the two."""
    _, expected = launches(op, compiled)
    out, found = launches(op, run_time)
    assert [launch[:2] for launch in found] == [launch[:2] for launch in expected]
    assert [[len(argument) for argument in launch.arguments] for launch in found] == [
        [len(argument) for argument in launch.arguments] for launch in expected
    ]
    pairs = [
        pair
        for ours, theirs in zip(found, expected, strict=True)
        for pair in zip(words(ours), words(theirs), strict=True)
    ]
    # Addresses of outputs and scratch are as far apart as the blocks that they are in; all else is the same.
    assert len({ours - theirs for ours, theirs in pairs if ours != theirs}) <= allocations
    assert all(min(pair) > 2**32 for pair in pairs if pair[0] != pair[1])
    return out


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_superpixel_boundaries(machine: Machine, dtype: torch.dtype) -> None:
    ids = strided_copy(torch.randint(-1, 3, (2, 21, 19), generator=generator(1)).to(dtype))
    out = assert_same_launches(
        "superpixel_boundaries",
        lambda: boundaries.on_cpu(ids, 0),
        lambda: on_jit("superpixel_boundaries", ids),
        allocations=1,
    )
    assert torch.equal(out, boundaries_reference(ids))


@pytest.mark.parametrize(("masked", "iterations"), [(False, 0), (True, 2)])
def test_slic(machine: Machine, masked: bool, iterations: int) -> None:
    image = strided_copy(textured(2, 23, 40, 3, 60))
    mask = strided_copy(random_mask(2, 23, 40, 4, 0.2)) if masked else None
    options = (12, 2560, iterations)
    out = assert_same_launches(
        "slic",
        lambda: slic.on_cpu(image, mask, *options, 0),
        lambda: on_jit("slic", image, mask, *options),
        allocations=2,
    )
    assert torch.equal(out, slic_reference(image, mask, *options))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_color_affinity(machine: Machine, dtype: torch.dtype) -> None:
    image = strided_copy(textured(2, 40, 35, 5, 80))
    ids = slic_reference(image, None, 12, 2560, 2).to(dtype)
    k = 12
    places = color_reference.planar_edges(k)
    out = assert_same_launches(
        "color_affinity",
        lambda: affinity.affinity(image, ids, k, places),
        lambda: on_jit("color_affinity", image, ids, k, places),
        allocations=5,
    )
    expected = affinity.affinity(image, ids, k, places)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True))
    color, texture, counts = assert_same_launches(
        "color_affinity",
        lambda: affinity.histograms(image, ids, k),
        lambda: on_jit("color_histograms", image, ids, k),
        allocations=4,
    )
    found = affinity.histograms(image, ids, k)
    assert all(torch.equal(a, b) for a, b in zip((color, texture, counts), found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tree_filter(machine: Machine, dtype: torch.dtype) -> None:
    weight = strided_copy(torch.rand(2, tree.edges(7, 9), dtype=dtype, generator=generator(6)))
    found = assert_same_launches(
        "tree_filter",
        lambda: tree.trees(weight, 7, 9),
        lambda: on_jit("tree_filter_trees", weight, 7, 9),
        allocations=4,
    )
    tree.assert_same(found, tree.trees(weight, 7, 9))
    values, decay, order, parent, gradient = map(strided_copy, tree.problem(2, 5, 7, 9, dtype, 7))
    out = assert_same_launches(
        "tree_filter",
        lambda: tree.run(values, decay, order, parent),
        lambda: on_jit("tree_filter", values, decay, order, parent),
        allocations=2,
    )
    gradients = assert_same_launches(
        "tree_filter",
        lambda: tree.run(values, decay, order, parent, gradient),
        lambda: on_jit("tree_filter_backward", gradient, values, decay, order, parent),
        allocations=3,
    )
    tree.assert_same((out,), tree.run(values, decay, order, parent))
    tree.assert_same(gradients, tree.run(values, decay, order, parent, gradient))


def test_each_kernel_is_asked_for_once(machine: Machine) -> None:
    ids = torch.zeros(1, 3, 3, dtype=torch.int32)
    for _ in range(3):
        launches("superpixel_boundaries", lambda: boundaries.on_cpu(ids, 0))
        on_jit("superpixel_boundaries", ids)
    assert len(machine.symbols) == len(set(machine.symbols))


def test_errors(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the driver and of the compiler, and the checks that the compiled extension makes too."""
    ids = torch.zeros(1, 3, 3, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="superpixels: expected int16, int32 or int64"):
        on_jit("superpixel_boundaries", ids.float())
    monkeypatch.setattr(machine, "error", 719)
    with pytest.raises(RuntimeError, match="a CUDA kernel did not start: error 719 of the driver"):
        on_jit("superpixel_boundaries", ids)


def test_what_does_not_compile_is_said(machine: Machine) -> None:
    machine.refuses = "slic::prepare cannot be compiled: no NVRTC"
    with pytest.raises(RuntimeError, match=r"slic::prepare cannot be compiled: no NVRTC"):
        on_jit("slic", textured(1, 8, 8, 1, 9), None, 4, 2560, 1)
