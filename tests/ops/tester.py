"""The battery of tests that every op goes through.

A test file of an op subclasses `OpTester` under a name that starts with `Test`:

    class TestPotts(OpTester):
        op_name = "potts"
        sizes = (1, 7, 33)
        differentiable = (0,)

        def make_inputs(self, dtype, device, size, seed):
            return (prob, graph), {"relaxation": "quadratic"}

        def naive(self, prob, graph, *, relaxation):
            return (energies,)                       # float64, written independently of the package

`make_inputs` builds everything from `seed` alone, the same values for every `dtype` (up to rounding) and
`device`, and takes `size=0` unless `zero_length = False`. Arguments may be tensors, numbers, or named tuples
of tensors. Floating tensors follow `dtype`; integer and bool tensors do not. `variants` are named keyword
options: every test that takes `variant` runs once for each, merged over the keywords of `make_inputs`.

Outputs and gradients are compared by `assert_matches`, which reports the worst index, the relative L2 error,
the cosine and the bias at once. Tests marked `gpu` are the same tests on a CUDA device.
"""

from __future__ import annotations

import contextlib
import mmap
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

import cc4s_kernels as ck
from cc4s_kernels import _library, _triton, backends

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

UNTESTED = (torch.bfloat16,) if _triton.INTERPRETED else ()
"""Triton's interpreter is silently wrong in bfloat16."""


GPU_TESTS = ("test_stream", "test_second_device", "test_cuda_graph")
"""Of kernels on a GPU; not of the reference, which may wait for the GPU."""

VALUE_TESTS = ("test_value", "test_gradcheck", "test_double_backward_of_reference", "test_precision", "test_exact")


class Difference(NamedTuple):
    """How far a tensor is from what was expected, in four views that fail for different bugs."""

    worst: float
    index: tuple[int, ...]
    got: complex
    expected: complex
    relative_l2: float
    cosine: float
    bias: float

    def __str__(self) -> str:
        return (
            f"worst error {self.worst:.3e} at {self.index} (got {self.got}, expected {self.expected}), "
            f"relative L2 {self.relative_l2:.3e}, cosine {self.cosine:.9f}, bias {self.bias:+.3e}"
        )


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """Measures `actual - expected` in float64. Not for empty tensors."""
    a, e = _wide(actual), _wide(expected)
    error = (a - e).abs()
    # NaN is the worst error wherever it stands; equal infinities are no error.
    error = torch.where(a == e, torch.zeros_like(error), error).nan_to_num(nan=float("inf"))
    flat = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    norm_a, norm_e = float(a.norm()), float(e.norm())
    inner = float((a.conj() * e).sum().real)
    return Difference(
        worst=float(error.flatten()[flat]),
        index=index,
        got=a.flatten()[flat].item(),
        expected=e.flatten()[flat].item(),
        relative_l2=float(error.norm()) / norm_e if norm_e > 0 else float(error.norm()),
        cosine=inner / (norm_a * norm_e) if norm_a > 0 and norm_e > 0 else float(norm_a == norm_e),
        bias=float((a - e).mean().real),
    )


def assert_matches(name: str, actual: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0) -> None:
    """Asserts same shape and, everywhere, |actual - expected| <= atol + rtol * max |expected|.

    The bound is relative to the largest entry, as rounding errors of sums are, not to each entry.
    """
    assert tuple(actual.shape) == tuple(expected.shape), f"{name}: shape {tuple(actual.shape)}, {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    found = difference(actual, expected)
    bound = atol + rtol * float(_wide(expected).abs().max())
    assert found.worst <= bound, f"{name}: {found}; allowed {bound:.3e}"


def assert_gradients_match(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    *,
    atol: float,
    rtol: float = 0.0,
    name: str = "gradient",
) -> None:
    """`assert_matches` for each pair of gradients."""
    assert len(actual) == len(expected), f"{name}: {len(actual)} gradients, expected {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_matches(f"{name} {i}", a, e, atol=atol, rtol=rtol)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def generator(seed: int) -> torch.Generator:
    """A CPU generator: inputs are drawn there and then cast, so that all dtypes and devices share them."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values that depend on shape and seed only (up to rounding to `dtype`)."""
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(device, dtype)


def tensors(value: Any) -> tuple[Tensor, ...]:
    """All tensors in an output or argument, in order."""
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def map_tensors(function: Any, value: Any) -> Any:
    """`value` with `function` applied to every tensor in it."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating tensors in `dtype`."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def strided_copy(tensor: Tensor) -> Tensor:
    """Equal values in memory with gaps and permuted axes."""
    if tensor.dim() == 0:
        return tensor
    axes = list(reversed(range(tensor.dim())))
    gaps = torch.zeros([2 * n + 1 for n in tensor.permute(axes).shape], dtype=tensor.dtype, device=tensor.device)
    view = gaps[tuple(slice(1, 2 * n + 1, 2) for n in tensor.permute(axes).shape)].permute(axes)
    return view.copy_(tensor)


def channels_last_copy(tensor: Tensor) -> Tensor:
    """Equal values with the second axis innermost in memory, as in a permuted convolution output."""
    if tensor.dim() < 3:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


# Of Linux; Python 3.13 has it as mmap.MAP_NORESERVE.
MAP_NORESERVE = 0x4000


def far_copies(value: Any, device: str, stride: int) -> Any:
    """`value` with tensors whose batch entries are `stride` elements apart, all in one block of memory, on a CPU of
    addresses alone."""
    batched = [t for t in tensors(value) if t.dim() > 1 and t.shape[0] > 1]
    spans = [stride * (t.shape[0] - 1) * t.element_size() for t in batched]
    needed = max(spans, default=0) + sum(t[0].nbytes + 512 for t in batched)
    if device == "cuda":
        if needed > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
        block = torch.empty(needed, dtype=torch.uint8, device=device)
    else:
        # Without a reservation only what is written takes memory.
        pages = mmap.mmap(-1, max(needed, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        block = torch.frombuffer(pages, dtype=torch.uint8)
    offset = 0

    def copy(t: Tensor) -> Tensor:
        nonlocal offset
        if t.dim() < 2 or t.shape[0] < 2:
            return t
        inner = torch.empty(t.shape[1:], device="meta").stride()
        here = block[offset:]
        whole = here[: here.numel() // t.element_size() * t.element_size()].view(t.dtype)
        offset += -(-t[0].nbytes // 512) * 512
        return whole.as_strided(t.shape, (stride, *inner)).copy_(t)

    return map_tensors(copy, value)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` returns NaN (largest value for integers) in the block."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class CountingBackend:
    """A torch.compile backend (aot_eager) that counts how often its compiled graphs ran."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0
        self.compile = aot_autograd(fw_compiler=self._counted("forward"), bw_compiler=self._counted("backward"))

    def _counted(self, name: str) -> Any:
        def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
            def run(args: list[Any]) -> Any:
                setattr(self, name, getattr(self, name) + 1)
                result = module(*args)
                args.clear()
                return result

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        return self.compile(module, inputs)


def devices_of(backend: str) -> tuple[str, ...]:
    """Devices whose tensors a backend takes."""
    if backend == "reference":
        return ("cpu", "cuda")
    return ("cpu",) if backend == "cpu" or (backend == "triton" and _triton.INTERPRETED) else ("cuda",)


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_DEVICE_MARKS: dict[str, list[Any]] = {"cpu": [], "cuda": [pytest.mark.gpu, _NO_GPU]}


def backend_params(op_name: str) -> list[Any]:
    """("backend", "device") for parametrize: all backends that are here, on each of their devices."""
    # In their own process (`make test`): the interpreter is chosen for a whole process.
    interpreter = [pytest.mark.triton_interpreter] if _triton.INTERPRETED else []
    return [
        pytest.param(backend, device, marks=_DEVICE_MARKS[device] + (interpreter if backend == "triton" else []))
        for backend in backends.available(op_name)
        for device in devices_of(backend)
    ]


def gpu_params(op_name: str) -> list[Any]:
    """("backend", "device") of the kernels of an op on a GPU; without a GPU one that is skipped."""
    found = [param for param in backend_params(op_name) if param.values[1] == "cuda" and param.values[0] != "reference"]
    return found or [pytest.param("cuda", "cuda", marks=_DEVICE_MARKS["cuda"])]


class _OpCalls(TorchDispatchMode):
    """Collects the calls of the package's torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == _library.NAMESPACE:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class _WorkerDataset(Dataset):
    """Runs the op inside a DataLoader worker."""

    def __init__(self, tester: OpTester) -> None:
        self.tester = tester

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[Tensor]:
        args, kwargs = self.tester.make_inputs(self.tester.work_dtype, "cpu", self.tester.common_size, index)
        return [t.detach() for t in tensors(self.tester.op(*args, **kwargs))]


class OpTester:
    """Abstract tester; see the module docstring."""

    op_name: ClassVar[str]
    sizes: ClassVar[tuple[int, ...]] = (1, 7, 33)
    """Sizes for the value tests; odd ones, and one that spans several tiles."""
    common_size: ClassVar[int] = 7
    """Size for the tests where the size does not matter."""
    gradcheck_size: ClassVar[int] = 4
    differentiable: ClassVar[tuple[int | str, ...]] = ()
    """Positions (or keyword names) of the arguments that have gradients."""
    variants: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    representatives: ClassVar[tuple[str, ...]] = ()
    """The variants for tests of layout, compilation and the like, where others take the same path; all if empty."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    """Dtypes in which each backend is compared with the float64 reference; empty for integer ops."""
    backend_dtypes: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {}
    """The dtypes of backends that do not take all of `dtypes`; the first one is for tests where it does not matter."""
    exact: ClassVar[bool] = False
    """Integer-defined op: every backend equals the reference bit by bit."""
    autocast: ClassVar[str] = "float32"
    """"float32": autocast changes nothing; "cast": inputs are cast to the autocast dtype first."""
    zero_length: ClassVar[bool] = True
    double_backward: ClassVar[bool] = True
    value_tolerance: ClassVar[float] = 1e-11
    """Float64 against `naive`, relative to the largest entry: some 1e4 eps, for sums over up to 1e3 terms."""
    noise: ClassVar[float] = 0.0
    """Absolute error that a kernel may leave where eager PyTorch is exact, in results or gradients: for ops whose
    terms are of order 1 and may cancel."""
    low_precision_slack: ClassVar[float] = 16.0
    """Error of the reference in a dtype, in units of that dtype's eps and relative to the largest entry:
    rounding of the scores, of the sums in float32, and of the output."""

    @classmethod
    def applies(cls, test: str) -> bool:
        """Whether a test of the battery has a meaning for this op; the others are not collected."""
        return {
            "test_gradcheck": bool(cls.differentiable),
            "test_double_backward_of_reference": bool(cls.differentiable) and cls.double_backward,
            "test_exact": cls.exact,
            "test_precision": bool(cls.dtypes),
            "test_zero_length": cls.zero_length,
            "test_opcheck": cls.custom_op_calls is not OpTester.custom_op_calls,
        }.get(test, True)

    # ---- hooks

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        """Arguments of a call: (args, kwargs)."""
        raise NotImplementedError

    def naive(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The outputs by an independent float64 definition on the CPU."""
        raise NotImplementedError

    def custom_op_calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """(custom op, args, kwargs) for `torch.library.opcheck`."""
        return []

    # ---- tools

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.float32

    def work_dtype_on(self, backend: str) -> torch.dtype:
        """The dtype of tests where it does not matter, on a backend."""
        return self.backend_dtypes.get(backend, (self.work_dtype,))[0]

    def op(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(ck, self.op_name)(*args, **kwargs)

    def inputs(self, variant: str, dtype: torch.dtype, device: str = "cpu", size: int | None = None) -> Inputs:
        size = self.common_size if size is None else size
        args, kwargs = self.make_inputs(dtype, device, size, zlib.crc32(f"{self.op_name} {size}".encode()) % 1000)
        return args, {**kwargs, **self.variants[variant]}

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(args[key] if isinstance(key, int) else kwargs[key] for key in self.differentiable)

    def _with_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: tuple[Tensor, ...]) -> Inputs:
        new_args, new_kwargs = list(args), dict(kwargs)
        for key, leaf in zip(self.differentiable, leaves, strict=True):
            if isinstance(key, int):
                new_args[key] = leaf
            else:
                new_kwargs[key] = leaf
        return tuple(new_args), new_kwargs

    def _cotangents(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            # Multiples of 1/4 up to 2: exact in every dtype, so that all dtypes have the same gradient.
            (torch.randint(-8, 9, out.shape, generator=generator(91 + i)) / 4).to(out.device, out.dtype)
            for i, out in enumerate(outputs)
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, function: Any = None) -> Result:
        """Outputs, and gradients of a fixed random combination of the differentiable outputs."""
        leaves = tuple(t.detach().requires_grad_() for t in self._leaves(args, kwargs))
        args, kwargs = self._with_leaves(args, kwargs, leaves)
        outputs = tensors((function or self.op)(*args, **kwargs))
        gradients: tuple[Tensor, ...] = ()
        live = tuple(out for out in outputs if out.requires_grad)
        if leaves:
            assert live, "no output has a gradient"
            found = torch.autograd.grad(live, leaves, self._cotangents(live), allow_unused=True)
            gradients = tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True))
        return Result(tuple(out.detach() for out in outputs), gradients)

    def assert_same(self, actual: Result, expected: Result, *, rtol: float, atol: float = 0.0) -> None:
        for i, (a, e) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
            assert a.dtype == e.dtype, f"output {i}: {a.dtype}, expected {e.dtype}"
            assert_matches(f"output {i}", a, e, atol=atol, rtol=rtol if inexact(a) else 0.0)
        assert_gradients_match(actual.gradients, expected.gradients, atol=atol, rtol=rtol)

    def assert_bitwise(self, actual: Result, expected: Result) -> None:
        for i, (a, e) in enumerate(
            zip(actual.outputs + actual.gradients, expected.outputs + expected.gradients, strict=True)
        ):
            assert a.dtype == e.dtype
            assert torch.equal(a, e), f"tensor {i}: {difference(a, e)}"

    def assert_error_within(self, name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
        """The rule for a kernel: its error is at most twice that of eager PyTorch in that dtype, plus eps."""
        if truth.numel() == 0:
            return
        mine, theirs = difference(got, truth), difference(eager, truth)
        # One rounding of the largest entry: eager may be exact by luck.
        floor = 2 * eps(got.dtype) * float(_wide(truth).abs().max()) + self.noise
        assert mine.worst <= 2 * theirs.worst + floor, f"{name}: {mine}; eager: {theirs}"
        if float(_wide(truth).norm()) <= self.noise * truth.numel() ** 0.5:
            # Zero but for rounding: nothing to be relative to.
            return
        assert mine.relative_l2 <= 2 * theirs.relative_l2 + 2 * eps(got.dtype), f"{name}: {mine}; eager: {theirs}"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = metafunc.fixturenames
        dtypes = [d for d in self.dtypes if d not in UNTESTED] or [torch.float32]
        if "backend" in names and "dtype" in names:
            pairs = [
                pytest.param(*param.values, dtype, marks=param.marks)
                for param in backend_params(self.op_name)
                for dtype in self.backend_dtypes.get(str(param.values[0]), dtypes)
            ]
            metafunc.parametrize(("backend", "device", "dtype"), pairs, ids=str)
        elif "backend" in names:
            on_gpu = metafunc.definition.originalname in GPU_TESTS
            metafunc.parametrize(("backend", "device"), (gpu_params if on_gpu else backend_params)(self.op_name))
        elif "device" in names:
            metafunc.parametrize(
                "device", [pytest.param(device, marks=marks) for device, marks in _DEVICE_MARKS.items()]
            )
        if "size" in names:
            # One position, and several tiles: an interpreted kernel takes seconds.
            sizes = (min(self.sizes), max(self.sizes)) if _triton.INTERPRETED else self.sizes
            metafunc.parametrize("size", sizes)
        if "variant" in names:
            name = metafunc.definition.originalname
            variants = list(self.variants if name in VALUE_TESTS else self.representatives or self.variants)
            # Addresses are the same for all of them.
            metafunc.parametrize("variant", variants[:1] if name == "test_far_apart" else variants)
        if "dtype" in names and "backend" not in names:
            metafunc.parametrize("dtype", dtypes, ids=str)

    # ---- the battery

    def test_value(self, size: int, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, torch.float64, device, size)
        with ck.use_backend("reference"):
            outputs = tensors(self.op(*args, **kwargs))
        expected = tensors(self.naive(*map_tensors(lambda t: t.cpu(), args), **map_tensors(lambda t: t.cpu(), kwargs)))
        assert len(outputs) == len(expected)
        for i, (a, e) in enumerate(zip(outputs, expected, strict=True)):
            rtol = 0.0 if self.exact else self.value_tolerance
            assert_matches(f"output {i}", a, e, atol=rtol, rtol=rtol)

    def _function_of_leaves(self, variant: str) -> tuple[Any, tuple[Tensor, ...]]:
        args, kwargs = self.inputs(variant, torch.float64, size=self.gradcheck_size)
        leaves = tuple(t.detach().clone().requires_grad_() for t in self._leaves(args, kwargs))

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            new_args, new_kwargs = self._with_leaves(args, kwargs, values)
            return tuple(out for out in tensors(self.op(*new_args, **new_kwargs)) if out.requires_grad)

        return function, leaves

    def test_gradcheck(self, variant: str) -> None:
        function, leaves = self._function_of_leaves(variant)
        with ck.use_backend("reference"):
            assert torch.autograd.gradcheck(function, leaves, fast_mode=False)

    def test_double_backward_of_reference(self, variant: str) -> None:
        function, leaves = self._function_of_leaves(variant)
        with ck.use_backend("reference"):
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    def test_precision(self, backend: str, dtype: torch.dtype, size: int, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, dtype, device, size)
        with ck.use_backend("reference"):
            truth = self.run(*to_dtype((args, kwargs), torch.float64))
            eager = self.run(args, kwargs)
        if backend == "reference":
            for i, (a, e) in enumerate(
                zip(eager.outputs + eager.gradients, truth.outputs + truth.gradients, strict=True)
            ):
                # Both start from the same rounded inputs: only the dtype of this tensor counts.
                bound = self.low_precision_slack * (eps(a.dtype) if inexact(a) else 0.0)
                assert_matches(f"tensor {i}", a, e, atol=bound, rtol=bound)
            return
        with ck.use_backend(backend):
            got = self.run(args, kwargs)
        pairs = zip(
            got.outputs + got.gradients,
            eager.outputs + eager.gradients,
            truth.outputs + truth.gradients,
            strict=True,
        )
        for i, (a, b, e) in enumerate(pairs):
            assert a.dtype == b.dtype
            if inexact(a):
                self.assert_error_within(f"tensor {i}", a, b, e)
            else:
                assert torch.equal(a, b)

    def test_exact(self, backend: str, size: int, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, torch.float32, device, size)
        with ck.use_backend("reference"):
            expected = tensors(self.op(*args, **kwargs))
        with ck.use_backend(backend):
            outputs = tensors(self.op(*args, **kwargs))
        for a, e in zip(outputs, expected, strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e), str(difference(a, e))

    def test_compile(self, backend: str, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        torch._dynamo.reset()
        counter = CountingBackend()
        compiled = torch.compile(getattr(ck, self.op_name), fullgraph=True, backend=counter)
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            got = self.run(args, kwargs, function=compiled)
        assert counter.forward == 1, "the compiled graph did not run"
        assert counter.backward == (1 if self.differentiable else 0), "the compiled backward did not run"
        # Decompositions may reorder sums: a few roundings.
        self.assert_same(
            got, expected, rtol=32 * eps(self.work_dtype_on(backend)), atol=32 * eps(self.work_dtype_on(backend))
        )

    def test_fake_shapes(self, backend: str, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        with ck.use_backend(backend):
            expected = tensors(self.op(*args, **kwargs))
            with FakeTensorMode() as mode:
                fake_args, fake_kwargs = map_tensors(mode.from_tensor, (args, kwargs))
                outputs = tensors(self.op(*fake_args, **fake_kwargs))
        for a, e in zip(outputs, expected, strict=True):
            assert a.shape == e.shape
            assert a.dtype == e.dtype

    def test_autocast(self, backend: str, variant: str, device: str) -> None:
        # What autocast casts may be float32 on every backend.
        given = torch.float32 if self.autocast == "cast" else self.work_dtype_on(backend)
        args, kwargs = self.inputs(variant, given, device)
        dtype = torch.float16 if torch.bfloat16 in UNTESTED else torch.bfloat16

        def under_autocast(*a: Any, **k: Any) -> Any:
            with torch.autocast(device, dtype):
                return self.op(*a, **k)

        with ck.use_backend(backend):
            got = self.run(args, kwargs, function=under_autocast)
            if self.autocast == "cast":
                expected = self.run(*to_dtype((args, kwargs), dtype))
                expected = Result(expected.outputs, tuple(g.float() for g in expected.gradients))
            else:
                expected = self.run(args, kwargs)
        self.assert_bitwise(got, expected)

    @pytest.mark.parametrize("layout", [strided_copy, channels_last_copy])
    def test_layout(self, backend: str, variant: str, device: str, layout: Any) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            got = self.run(*map_tensors(layout, (args, kwargs)))
        # A matrix product may sum in another order for another layout.
        self.assert_same(
            got, expected, rtol=32 * eps(self.work_dtype_on(backend)), atol=32 * eps(self.work_dtype_on(backend))
        )

    def test_far_apart(self, backend: str, variant: str, device: str) -> None:
        """Strides are int32, and what is computed with them is not: the last of four entries is at 3 * 2^30."""
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        batch = tensors(args)[0].shape[0]
        args, kwargs = map_tensors(
            lambda t: torch.cat([t] * (4 // batch)) if t.dim() > 0 and t.shape[0] == batch > 1 else t, (args, kwargs)
        )
        far = far_copies((args, kwargs), device, 2**30 + 64)
        assert tensors(far)[0].stride(0) * (tensors(far)[0].shape[0] - 1) >= 3 * 2**30
        with ck.use_backend(backend):
            expected, got = self.run(args, kwargs), self.run(*far)
        # A matrix product may sum in another order for another layout.
        self.assert_same(
            got, expected, rtol=32 * eps(self.work_dtype_on(backend)), atol=32 * eps(self.work_dtype_on(backend))
        )

    def test_stream(self, backend: str, variant: str, device: str) -> None:
        """On a stream whose earlier work has the inputs: another stream would see what was there before."""
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device, size=max(self.sizes))
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            late = map_tensors(torch.zeros_like, (args, kwargs))
            # What is compiled is compiled before.
            self.run(args, kwargs)
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)
                for to, value in zip(tensors(late), tensors((args, kwargs)), strict=True):
                    to.copy_(value)
                got = self.run(*late)
            stream.synchronize()
        self.assert_bitwise(got, expected)

    def test_second_device(self, backend: str, variant: str, device: str) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device")
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            got = self.run(*map_tensors(lambda t: t.to("cuda:1"), (args, kwargs)))
        assert torch.cuda.current_device() == 0
        assert all(t.device == torch.device("cuda:1") for t in got.outputs + got.gradients)
        self.assert_bitwise(Result(*map_tensors(lambda t: t.to("cuda:0"), tuple(got))), expected)

    def test_cuda_graph(self, backend: str, variant: str, device: str) -> None:
        """Forward and backward are captured, which no synchronisation and no foreign allocation survives, and replayed
        on other inputs."""
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device, size=max(self.sizes))
        held = map_tensors(torch.clone, (args, kwargs))
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.run(*held)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = self.run(*held)
        for t in tensors(held):
            t.zero_()
        graph.replay()
        for to, value in zip(tensors(held), tensors((args, kwargs)), strict=True):
            to.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        self.assert_bitwise(got, expected)

    def test_zero_length(self, backend: str, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device, size=0)
        with ck.use_backend(backend):
            result = self.run(args, kwargs)
        for out in result.outputs:
            assert bool(torch.isfinite(out).all())
        for gradient in result.gradients:
            assert bool((gradient == 0).all()), "an empty input has gradient 0"

    def test_poisoned_memory(self, backend: str, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        with ck.use_backend(backend):
            expected = self.run(args, kwargs)
            with poisoned_empty():
                got = self.run(args, kwargs)
        self.assert_same(
            got, expected, rtol=32 * eps(self.work_dtype_on(backend)), atol=32 * eps(self.work_dtype_on(backend))
        )

    def test_repeats_bitwise(self, backend: str, variant: str, device: str) -> None:
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device, size=max(self.sizes))
        with ck.use_backend(backend):
            self.assert_bitwise(self.run(args, kwargs), self.run(args, kwargs))

    # Python 3.12 warns about every fork of a process with threads; torch's workers are made for it.
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_data_loader_worker(self) -> None:
        loader = DataLoader(
            _WorkerDataset(self), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        for index, outputs in enumerate(loader):
            args, kwargs = self.make_inputs(self.work_dtype, "cpu", self.common_size, index)
            for a, e in zip(outputs, tensors(self.op(*args, **kwargs)), strict=True):
                # A worker has one thread: sums may be split otherwise.
                bound = 32 * eps(self.work_dtype) if inexact(e) else 0.0
                assert_matches("output", a, e, atol=bound, rtol=bound)

    def test_opcheck(self) -> None:
        # torch.library.opcheck imports it.
        pytest.importorskip("expecttest")
        for op, args, kwargs in self.custom_op_calls():
            for layout in (torch.clone, strided_copy):
                # Leaves again: opcheck looks at their gradients.
                leaves = map_tensors(lambda t: layout(t.detach()).requires_grad_(t.requires_grad), (args, kwargs))  # noqa: B023
                torch.library.opcheck(op, *leaves)

    def test_opcheck_of_kernels(self, backend: str, variant: str, device: str) -> None:
        """Every torch op that a call and its gradient go through."""
        pytest.importorskip("expecttest")
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        with ck.use_backend(backend), _OpCalls() as found:
            self.run(args, kwargs)
        for op, op_args, op_kwargs in found.calls:
            if self.op_name not in op.name():
                # A helper of the argument checks: it sees what the checks let it see.
                continue
            # Second derivatives are refused.
            first = self.differentiable and not op.name().endswith("_backward")
            for layout in (torch.clone, strided_copy):

                def prepare(t: Tensor, layout: Any = layout, first: bool = bool(first)) -> Tensor:
                    return layout(t.detach()).requires_grad_(first and t.is_floating_point())

                torch.library.opcheck(op, *map_tensors(prepare, (op_args, op_kwargs)))

    def test_second_derivative(self, backend: str, variant: str, device: str) -> None:
        """A kernel's gradient has no gradient, and says who has."""
        if not self.differentiable or backend == "reference":
            return
        args, kwargs = self.inputs(variant, self.work_dtype_on(backend), device)
        leaves = tuple(t.detach().requires_grad_() for t in self._leaves(args, kwargs))
        with ck.use_backend(backend):
            outputs = tensors(self.op(*self._with_leaves(args, kwargs, leaves)[0], **kwargs))
            total = sum(out.sum() for out in outputs if out.requires_grad)
            first = torch.autograd.grad(total, leaves, create_graph=True)
            with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
                torch.autograd.grad(sum(g.sum() for g in first), leaves)

    def test_strict_backend(self) -> None:
        args, kwargs = self.inputs(next(iter(self.variants)), self.work_dtype)
        for name in backends.BACKENDS:
            if name not in backends.available(self.op_name):
                with (
                    ck.use_backend(name),
                    pytest.raises(RuntimeError, match=f"{self.op_name} cannot run there"),
                ):
                    self.op(*args, **kwargs)

    def test_explain(self, capsys: pytest.CaptureFixture[str]) -> None:
        args, kwargs = self.inputs(next(iter(self.variants)), self.work_dtype)
        found = ck.explain(self.op_name, *args, **kwargs)
        assert found.backend in backends.available(self.op_name)
        assert f"{self.op_name}: {found.backend} runs" in capsys.readouterr().out
