"""`cc4s_kernels.contrib.cupy`: on NumPy arrays, which have CuPy's interface, and on CuPy's where there is a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels.contrib import cupy as ckc
from tests.ops.tester import generator

cupy = pytest.importorskip("cupy")

NUMPY = ckc.Framework("numpy.ndarray", np.ndarray, np.from_dlpack, nullcontext)


def image() -> np.ndarray:
    return torch.randint(0, 256, (2, 3, 30, 40), generator=generator(0), dtype=torch.uint8).numpy()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return type(found) is np.ndarray and np.array_equal(found, expected.numpy())
    return found == expected


def test_every_op_has_its_name() -> None:
    assert set(ck.backends.ops()) <= set(dir(ckc))
    for name in dir(ckc):
        assert getattr(ckc, name).__doc__ == getattr(ck, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ckc.nothing


def test_the_pipeline_of_superpixels() -> None:
    """Named tuples go in and come out; bool, integers and floats."""
    array, tensor = image(), torch.from_numpy(image())
    mask = np.ones((2, 30, 40), dtype=bool)
    mask[:, :3] = False
    ids = ckc.call(NUMPY, ck.slic, array, 20, iterations=2, mask=mask)
    expected = ck.slic(tensor, 20, iterations=2, mask=torch.from_numpy(mask))
    assert same(ids, expected)
    assert ids.dtype == np.int32
    boundaries = ckc.call(NUMPY, ck.superpixel_boundaries, ids)
    assert boundaries.dtype == bool
    assert same(boundaries, ck.superpixel_boundaries(expected))
    graph, wanted = ckc.call(NUMPY, ck.color_affinity, array, ids, 20), ck.color_affinity(tensor, expected, 20)
    assert type(graph) is ck.SuperpixelGraph
    assert all(same(a, b) for a, b in zip(graph, wanted, strict=True))
    prob = torch.rand(2, 20, 4, generator=generator(1)).softmax(-1)
    energy = ckc.call(NUMPY, ck.potts, prob.numpy(), graph, relaxation="bilinear")
    assert same(energy, ck.potts(prob, wanted, relaxation="bilinear"))


def test_pairs_and_complex_results() -> None:
    q, k, v = (torch.randn(2, 9, d, generator=generator(d)) for d in (4, 5, 6))
    k = k[..., :4]
    found = ckc.call(NUMPY, ck.random_walk, q.numpy(), k.numpy(), v.numpy(), return_lse=True)
    assert type(found) is tuple
    assert all(same(a, b) for a, b in zip(found, ck.random_walk(q, k, v, return_lse=True), strict=True))
    values, vectors = ckc.call(NUMPY, ck.neural_eigenspace, q.numpy(), k.numpy(), 3)
    assert (values.dtype, vectors.shape) == (np.complex64, (2, 9, 3))


def test_no_copy_and_no_gradient() -> None:
    array = np.arange(6.0).reshape(2, 3)[:, ::2]
    seen: list[Tensor] = []

    def identity(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    out = ckc.call(NUMPY, identity, array)
    assert seen[0].data_ptr() == array.ctypes.data == out.ctypes.data
    assert seen[0].stride() == (3, 2)
    weight = torch.ones((), requires_grad=True)
    assert isinstance(ckc.call(NUMPY, lambda x: x * weight, array), np.ndarray)


def test_arrays_of_another_framework_are_named() -> None:
    q = np.zeros((1, 3, 4), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^v: got a torch\.Tensor, expected a numpy\.ndarray$"):
        ckc.call(NUMPY, ck.random_walk, q, q, torch.zeros(1, 3, 4))
    graph = ck.SuperpixelGraph(q, torch.zeros(1), 3, q, q)
    with pytest.raises(TypeError, match=r"^graph_or_grid.weight: got a torch.Tensor, expected a numpy.ndarray$"):
        ckc.call(NUMPY, ck.potts, q, graph)
    # The op's own word where it is no array at all.
    with pytest.raises(TypeError, match=r"^k: got "):
        ckc.call(NUMPY, ck.random_walk, q, [1.0], q)
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        ckc.call(NUMPY, ck.random_walk, q, q)


def test_of_cupy_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = ckc._cupy()
    assert framework.array is cupy.ndarray
    monkeypatch.setattr(ckc, "_cupy", lambda: replace(framework, stream=nullcontext))
    with pytest.raises(TypeError, match=r"^image: got a numpy.ndarray, expected a cupy.ndarray$"):
        ckc.slic(image())


@pytest.mark.parametrize("pointer", [0, 1234])
def test_cupys_stream_is_torchs(monkeypatch: pytest.MonkeyPatch, pointer: int) -> None:
    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(id=1), get_current_stream=lambda: SimpleNamespace(ptr=pointer)
    )
    monkeypatch.setattr(ckc, "require", lambda module, package: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: ("external", ptr, device))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    assert ckc._current_stream() == (("external", 1234, 1) if pointer else ("default", 1))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """On a stream of CuPy, behind work that is still running there."""
    array = cupy.asarray(image())
    expected = ck.slic(torch.from_numpy(image()), 20)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        late = cupy.zeros_like(array)
        busy = cupy.ones((4096, 4096), dtype=cupy.float32)
        for _ in range(20):
            busy = busy @ busy * 0
        late += array
        ids = ckc.slic(late, 20)
        stream.synchronize()
    assert isinstance(ids, cupy.ndarray)
    assert np.array_equal(cupy.asnumpy(ids), expected.numpy())
    graph = ckc.color_affinity(array, ids, 20)
    assert type(graph.weight) is cupy.ndarray
    assert ckc.superpixel_boundaries(ids).dtype == bool
