"""Choice of a backend, with made-up ops: what runs, what is refused, and what is said about it."""

import subprocess
import sys
import types

import pytest
import torch

import cc4s_kernels as ck
from cc4s_kernels import _cuda, _triton, backends


def reference(x, *, bias=0.0):
    return x + bias


def fast(x, *, bias=0.0):
    return x + bias + 100


def fastest(x, *, bias=0.0):
    return x + bias + 200


def refuses_bias(x, *, bias=0.0):
    return "bias is not 0" if bias else None


@pytest.fixture
def registry(monkeypatch):
    """An empty registry on a machine where only what is registered as cpu or reference can run."""
    monkeypatch.setattr(backends, "_implementations", {})
    monkeypatch.setattr(backends, "missing", lambda name: "no CUDA device" if name in ("cuda", "triton") else None)
    return backends


@pytest.fixture
def two(registry):
    registry.register("add", "reference", reference)
    registry.register("add", "cpu", fast, refuses_bias)
    return registry


X = torch.zeros(2)


def test_the_fastest_that_accepts_runs(two):
    assert two.select("add", X) is fast
    assert two.select("add", X, bias=1.0) is reference
    assert two.available("add") == ("cpu", "reference")
    assert two.ops() == ("add",)


def test_a_forced_backend_never_falls_back(two):
    with ck.use_backend("reference"):
        assert two.select("add", X) is reference
    with ck.use_backend("cpu"):
        assert two.select("add", X) is fast
        with pytest.raises(RuntimeError, match=r"use_backend\('cpu'\): add cannot run there: bias is not 0"):
            two.select("add", X, bias=1.0)
    with (
        ck.use_backend("triton"),
        pytest.raises(RuntimeError, match="add has no triton kernel in this version"),
    ):
        two.select("add", X)


def test_missing_hardware_is_said(two):
    two.register("add", "cuda", fast)
    assert two.select("add", X) is fast
    assert "cuda" not in two.available("add")
    with ck.use_backend("cuda"), pytest.raises(RuntimeError, match="no CUDA device"):
        two.select("add", X)


NOT_VERIFIED = "built, not yet verified on this GPU (use_backend('cuda') runs it)"


@pytest.fixture
def with_cuda(two, monkeypatch):
    """A machine with a GPU of compute capability 9.0 and a CUDA kernel that takes every call."""
    monkeypatch.setattr(backends, "missing", lambda name: "no triton" if name == "triton" else None)
    monkeypatch.setattr(backends._cuda, "capability", lambda index: (9, 0))
    two.register("add", "cuda", fastest)
    return two


def test_a_cuda_kernel_that_nobody_ran_on_this_gpu_is_not_chosen(with_cuda, monkeypatch):
    for verified in ({}, {"add": frozenset({(8, 0)})}, {"subtract": frozenset({(9, 0)})}):
        monkeypatch.setattr(backends, "VERIFIED", verified)
        assert with_cuda.select("add", X) is fast
        found = ck.explain("add", X)
        assert found.backend == "cpu"
        assert found.reasons["cuda"] == NOT_VERIFIED
        # The next one that accepts the call.
        assert with_cuda.select("add", X, bias=1.0) is reference
        with ck.use_backend("cuda"):
            assert with_cuda.select("add", X) is fastest
            assert ck.explain("add", X).backend == "cuda"
    assert "cuda" in with_cuda.available("add")


def test_a_cuda_kernel_that_passed_on_this_gpu_is_chosen(with_cuda, monkeypatch):
    monkeypatch.setattr(backends, "VERIFIED", {"add": frozenset({(8, 0), (9, 0)})})
    assert with_cuda.select("add", X) is fastest
    assert ck.explain("add", X).backend == "cuda"
    assert ck.explain("add").backend == "cuda"
    # What it refuses is another reason.
    with_cuda.register("add", "cuda", fastest, refuses_bias)
    assert ck.explain("add", X, bias=1.0).reasons["cuda"] == "bias is not 0"


def test_nothing_is_verified_that_is_no_op():
    assert set(backends.VERIFIED) <= set(backends.ops())


def test_forcing_nests_and_ends_with_an_error(two):
    with ck.use_backend("reference"):
        with ck.use_backend("auto"):
            assert two.select("add", X) is fast
        assert two.select("add", X) is reference
        with pytest.raises(KeyError), ck.use_backend("cpu"):
            raise KeyError
        assert two.select("add", X) is reference
    assert two.select("add", X) is fast


def test_unknown_names(two):
    with (
        pytest.raises(ValueError, match="name: got 'gpu', expected auto or one of cuda, triton"),
        ck.use_backend("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        two.register("add", "gpu", fast)
    with pytest.raises(ValueError, match="op_name: got 'subtract', expected one of add"):
        ck.explain("subtract")


def test_nothing_can_run(registry):
    registry.register("add", "cpu", fast, refuses_bias)
    with pytest.raises(RuntimeError, match="add: no backend runs"):
        registry.select("add", X, bias=1.0)


def test_explain_gives_every_reason(two, capsys):
    found = ck.explain("add", X)
    assert found.backend == "cpu"
    assert found.reasons == {
        "cuda": "add has no cuda kernel in this version",
        "triton": "add has no triton kernel in this version",
        "reference": "could run; cpu comes first",
    }
    printed = capsys.readouterr().out
    assert printed.startswith("add: cpu runs\n")
    assert all(reason in printed for reason in found.reasons.values())
    found = ck.explain("add", X, bias=1.0)
    assert found.backend == "reference"
    assert found.reasons["cpu"] == "bias is not 0"
    with ck.use_backend("reference"):
        found = ck.explain("add", X)
    assert found.backend == "reference"
    assert found.reasons["cpu"] == "use_backend('reference') is in force"


def test_explain_without_tensors(two):
    assert ck.explain("add").backend == "cpu"


def test_every_op_has_a_reference():
    names = {
        "bilateral_filter",
        "color_affinity",
        "gated_crf",
        "neural_eigenspace",
        "potts",
        "random_walk",
        "random_walker",
        "slic",
        "superpixel_boundaries",
        "transition_consistency",
        "transition_matrix",
        "tree_filter",
        "upsample_losses",
    }
    assert names <= set(backends.ops())
    for name in names:
        assert "reference" in backends.available(name)
        assert callable(getattr(ck, name))


def test_import_without_extension_and_without_cuda():
    """Import never fails: here the extension is hidden, and CUDA too."""
    code = """
import pathlib
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [] if pattern.startswith("_C") else glob(self, pattern)
import torch
torch.cuda.is_available = lambda: False
import cc4s_kernels as ck
assert ck.backends.missing("cpu").startswith("the C++ extension is not built")
q = torch.ones(3, 2)
assert torch.equal(ck.random_walk(q, q, q), q)
assert ck.explain("random_walk", q, q, q).backend == "reference"
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_extension_that_does_not_load_is_no_error(tmp_path, monkeypatch):
    from cc4s_kernels import _library

    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    (tmp_path / "_CU.so").write_bytes(b"not a library")
    assert _library._load_extension("_C", "C++").startswith("the C++ extension does not load: ")
    assert _library._load_extension("_CU", "CUDA").startswith("the CUDA extension does not load: ")


def test_the_extensions_are_not_taken_for_each_other(tmp_path, monkeypatch):
    from cc4s_kernels import _library

    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    (tmp_path / "_CU.abi3.so").touch()
    assert _library.extension_path("_C") is None
    assert _library._load_extension("_C", "C++").startswith("the C++ extension is not built")
    assert _library.extension_path("_CU") == tmp_path / "_CU.abi3.so"
    (tmp_path / "_C.so").touch()
    assert _library.extension_path("_C") == tmp_path / "_C.so"


def test_why_there_is_no_cuda_backend(tmp_path, monkeypatch):
    from cc4s_kernels import _library

    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda_extension() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    not_built = "the CUDA extension is not built (pip install --no-build-isolation -e .)"
    assert _library._load_cuda_extension() == not_built
    monkeypatch.setattr(_library, "CUDA_EXTENSION_ERROR", not_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.missing("cuda") == not_built
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.missing("cuda") == "no CUDA device"


def test_forcing_reaches_compiled_code():
    """torch.compile guards on the forced backend: no stale choice."""
    q = torch.ones(3, 2)
    torch._dynamo.reset()
    compiled = torch.compile(ck.random_walk, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, q, q), q)
    absent = next(name for name in backends.BACKENDS if name not in backends.available("random_walk"))
    with ck.use_backend(absent), pytest.raises(Exception, match="random_walk cannot run there"):
        compiled(q, q, q)
    assert torch.equal(compiled(q, q, q), q)


def test_not_strict_runs_the_reference_where_the_backend_has_no_kernel() -> None:
    prob = torch.rand(1, 4, 5, 6).softmax(1)
    grid = ck.pixel_grid(5, 6)
    expected = ck.potts(prob, grid)
    with ck.use_backend("cuda"), pytest.raises(RuntimeError, match="potts"):
        ck.potts(prob, grid)
    with ck.use_backend("cuda", strict=False):
        torch.testing.assert_close(ck.potts(prob, grid), expected)
        assert ck.explain("potts", prob, grid).backend == "reference"
    assert ck.explain("potts", prob, grid).backend in ("cpu", "reference")


@pytest.mark.parametrize("op", ["slic", "random_walk"])
def test_an_old_gpu_is_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs there is named, by `explain` and by the error where a backend is forced."""
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16, shape=(1, 8, 8))
    monkeypatch.setattr(_cuda, "capability", lambda index: (7, 5))
    monkeypatch.setattr(_triton, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    ending = "is on a GPU of compute capability 7.5, {} kernels need 8.0; the reference runs there"
    assert _cuda.refuses(on_gpu, "image") == "image " + ending.format("CUDA")
    assert _triton.refuses(on_gpu, "q") == "q " + ending.format("Triton")
    for backend, name in (("cuda", "CUDA"), ("triton", "Triton")):
        if backend not in backends._implementations[op]:
            continue
        monkeypatch.setattr(backends, "missing", lambda backend: None)
        monkeypatch.setattr(_cuda, "lacks", lambda op: None)
        message = rf"use_backend\('{backend}'\): {op} .* 7\.5, {name} kernels need 8\.0; the reference runs there"
        with ck.use_backend(backend), pytest.raises(RuntimeError, match=message):
            backends.select(op, on_gpu, on_gpu, on_gpu)
