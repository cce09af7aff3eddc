"""What is installed and what runs here: `python -m cc4s_kernels.info [--selftest]`.

Without options: versions, the C++ and CUDA extensions, the processor, devices, and for each op which backends it has on
this machine. `--selftest` also runs every op on small inputs on each available backend against an independent
NumPy value and against finite differences, and ends with exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree, shortest_path
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import _jit, _library, _triton, backends

Array = NDArray[Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

OPS = (
    "random_walk",
    "transition_matrix",
    "transition_consistency",
    "neural_eigenspace",
    "upsample_losses",
    "slic",
    "superpixel_boundaries",
    "color_affinity",
    "potts",
    "gated_crf",
    "tree_filter",
    "bilateral_filter",
    "random_walker",
)


# ---- what is here


def versions() -> dict[str, str]:
    """Name and version of the package and of what it runs on; "-" for what is not installed."""
    found = {"python": platform.python_version()}
    for name in ("cc4s", "torch", "numpy", "scipy", "triton", "cupy-cuda13x"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    found["torch"] = torch.__version__
    found["CUDA of torch"] = torch.version.cuda or "-"
    return found


def processor() -> str:
    """Vector instructions that PyTorch uses, cores and threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def devices() -> list[str]:
    """CUDA devices, in words."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return found


def extensions() -> list[str]:
    """Where the C++ and the CUDA extension are, or why one is not there."""
    cpu = _library.EXTENSION_ERROR or str(_library.extension_path("_C"))
    if not _library.CUDA_RUN_TIME:
        return [cpu, _library.CUDA_EXTENSION_ERROR or str(_library.extension_path("_CU"))]
    lacking = _library.CUDA_EXTENSION_ERROR or _jit.missing()
    return [cpu, lacking or f"{_library.extension_path('_JIT')}, kernels {_jit.TITLE}"]


def availability(op: str) -> dict[str, str]:
    """For each backend "available", or the reason why it is not."""
    if op not in backends.ops():
        return {name: "the op is not registered" for name in backends.BACKENDS}
    return {
        name: backends._refusal(op, name, (), {}) or backends._unverified(op, name, ()) or "available"
        for name in backends.BACKENDS
    }


def report() -> str:
    """All of the above as text."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    lines += [f"{'extension':<14}{found}" for found in extensions()]
    lines += [f"{'processor':<14}{processor()}"]
    lines += [f"{'device':<14}{device}" for device in devices() or ["no CUDA device"]]
    width = max(map(len, OPS)) + 2
    notes: list[str] = []
    rows = []
    for op in OPS:
        cells = []
        for backend, status in availability(op).items():
            if status == "available":
                cells.append("yes")
            else:
                # Reasons repeat from row to row: they stand once, below the table.
                note = status.replace(f"{op} has", "the op has")
                if note not in notes:
                    notes.append(note)
                cells.append(f"no ({notes.index(note) + 1})")
            cells[-1] = f"{cells[-1]:<{max(len(backend), 6) + 4}}"
        rows.append(f"{op:<{width}}" + "".join(cells).rstrip())
    header = f"{'op':<{width}}" + "".join(f"{name:<{max(len(name), 6) + 4}}" for name in backends.BACKENDS)
    lines += ["", header.rstrip(), *rows]
    lines += [f"({i}) {note}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines)


# ---- independent values


def _random(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.float().double()


def _numpy(value: Tensor) -> Array:
    return value.detach().cpu().numpy()


def _softmax(scores: Array, axis: int = -1) -> Array:
    shifted = np.exp(scores - scores.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def _walk_inputs() -> Inputs:
    q, k, v = (_random(2, 13, d, seed=i) for i, d in enumerate((4, 4, 6)))
    return (q, k, v), {"return_lse": True, "steps": 2, "restart": 0.25}


def _walk(q: Array, k: Array, v: Array, **_: Any) -> tuple[Array, ...]:
    scores = q @ k.swapaxes(-1, -2)
    p = _softmax(scores)
    y = v
    for _step in range(2):
        y = 0.75 * (p @ y) + 0.25 * v
    return y, np.log(np.exp(scores).sum(-1))


def _matrix_inputs() -> Inputs:
    return (_random(2, 13, 4, seed=0), _random(2, 13, 4, seed=1)), {}


def _matrix(q: Array, k: Array) -> tuple[Array, ...]:
    return (_softmax(q @ k.swapaxes(-1, -2)),)


def _consistency_inputs() -> Inputs:
    return tuple(_random(2, 13, 4, seed=i) for i in range(4)), {}


def _consistency(q: Array, k: Array, q_target: Array, k_target: Array) -> tuple[Array, ...]:
    p, target = _matrix(q, k)[0], _matrix(q_target, k_target)[0]
    kl = (target * (np.log(target) - np.log(p))).sum(-1)
    return kl, np.trace(p, axis1=1, axis2=2), np.trace(target, axis1=1, axis2=2)


def _upsample_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (2, 9, 8), generator=generator)
    options = {
        "weight": torch.rand(2, 9, 8, generator=generator).double(),
        "superpixels": torch.randint(-1, 3, (2, 9, 8), generator=generator, dtype=torch.int32),
        "num_superpixels": 3,
    }
    return (_random(2, 3, 4, 3, seed=3), labels.where(labels < 3, 255).to(torch.uint8)), options


def _interpolation(size: int, out: int) -> Array:
    """(out, size) weights of linear interpolation with aligned corners: hat functions."""
    position = np.linspace(0, size - 1, out)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))


def _upsample(
    logits: Array, labels: Array, weight: Array, superpixels: Array, num_superpixels: int
) -> tuple[Array, ...]:
    rows, columns = _interpolation(4, 9), _interpolation(3, 8)
    p = _softmax(np.einsum("ih,bchw,jw->bcij", rows, logits, columns), 1)
    chosen = np.take_along_axis(p, np.where(labels == 255, 0, labels)[:, None].astype(int), 1)[:, 0]
    labelled = labels != 255
    member = superpixels[:, None] == np.arange(num_superpixels)[:, None, None]
    return (
        -np.where(labelled, np.log(chosen), 0).sum((1, 2)),
        labelled.sum((1, 2)).astype(float),
        -(weight * (p * np.log(p)).sum(1)).sum((1, 2)),
        weight.sum((1, 2)),
        np.einsum("bkij,bcij->bkc", member.astype(float), p),
        member.sum((2, 3)).astype(float),
    )


def _squares() -> Tensor:
    """(1, 24, 24) int32: nine superpixels in a 3 x 3 grid, one corner without any."""
    index = torch.arange(24, dtype=torch.int32) // 8
    ids = 3 * index[:, None] + index
    ids[:3, :3] = -1
    return ids[None]


def _image() -> Tensor:
    """(1, 3, 24, 24) uint8: nine squares of different colours and a little noise."""
    generator = torch.Generator().manual_seed(5)
    colors = torch.randint(0, 200, (9, 3), generator=generator)
    noise = torch.randint(0, 40, (24, 24, 3), generator=generator)
    return (colors[_squares()[0].clamp(min=0).long()] + noise).permute(2, 0, 1)[None].to(torch.uint8)


def _boundaries(superpixels: Array) -> tuple[Array, ...]:
    edge = np.zeros(superpixels.shape, dtype=bool)
    for axis in (1, 2):
        differs = np.diff(superpixels, axis=axis) != 0
        before = [(0, 0)] * 3
        after = [(0, 0)] * 3
        before[axis], after[axis] = (1, 0), (0, 1)
        edge |= np.pad(differs, before) | np.pad(differs, after)
    return (edge & (superpixels >= 0),)


def _affinity(image: Array, superpixels: Array, num_superpixels: int) -> dict[tuple[int, int], float]:
    """Weight of each edge of one image, docs/method.md section 7."""
    rgb, ids = image[0].astype(np.int64), superpixels[0]
    valid = ids >= 0
    luma = np.where(valid, np.tensordot([299, 587, 114], rgb, 1), 0)
    inside = np.pad(valid, 1)
    padded = np.pad(luma, 1)
    gradients = []
    for axis in (0, 1):
        after, before = np.roll(padded, -1, axis), np.roll(padded, 1, axis)
        has_after, has_before = np.roll(inside, -1, axis), np.roll(inside, 1, axis)
        # Twice the one-sided difference where one neighbour is missing, 0 where both are.
        right = np.where(has_after, after - padded, np.where(has_before, padded - before, 0))
        left = np.where(has_before, padded - before, np.where(has_after, after - padded, 0))
        gradients.append((right + left)[1:-1, 1:-1])
    low = min(g[valid].min() for g in gradients)
    high = max(g[valid].max() for g in gradients)

    def histogram(bins: Sequence[Array], size: int) -> Array:
        per_channel = [[np.bincount(b[ids == k], minlength=size) for b in bins] for k in range(num_superpixels)]
        pixels = np.maximum([(ids == k).sum() for k in range(num_superpixels)], 1)
        return np.array(per_channel).reshape(num_superpixels, -1) / pixels[:, None]

    color = histogram([np.minimum(24, channel * 25 // 255) for channel in rgb], 25)
    spread = max(high - low, 1)
    texture = histogram([np.minimum(9, (g - low) * 10 // spread) for g in gradients[::-1]], 10)

    pairs = set()
    for one, other in ((ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:])):
        touching = (one != other) & (one >= 0) & (other >= 0)
        ends = np.stack([one[touching], other[touching]], 1)
        pairs |= {(min(pair), max(pair)) for pair in ends.tolist()}
    weight = {
        (i, j): np.exp(-5 * (np.linalg.norm(color[i] - color[j]) / 25 + np.linalg.norm(texture[i] - texture[j]) / 100))
        for i, j in sorted(pairs)
    }
    raised = {pair: max(w - 0.8 * min(weight.values()), 0) for pair, w in weight.items()}
    return {pair: float(0.8 * u / max(raised.values())) for pair, u in raised.items()}


def _potts_inputs() -> Inputs:
    prob = _random(2, 5, 3, seed=8).softmax(-1).float().double()
    edges = torch.tensor([[0, 0, 1, 2, 0], [1, 2, 3, 4, 0]])
    weight = torch.tensor([0.5, 0.25, 0.75, 0.1, 0.0]).double()
    graph = ck.SuperpixelGraph(
        edges.expand(2, -1, -1), weight.expand(2, -1), 5, torch.tensor([4, 4]), torch.ones(2, 5).long()
    )
    return (prob, graph), {}


def _potts(prob: Array, graph: Any) -> tuple[Array, ...]:
    """The colour constraint as a quadratic form, docs/method.md section 7."""
    energies = []
    for s, (i, j), w in zip(prob, graph.edge_index, graph.weight, strict=True):
        matrix = np.zeros((len(s), len(s)))
        matrix[i, j] = w
        matrix += matrix.T
        laplacian = np.diag(matrix.sum(1)) - matrix
        energies.append(2 / matrix.sum() * np.trace(s.T @ laplacian @ s))
    return (np.array(energies),)


def _gated_inputs() -> Inputs:
    image = 0.2 * _random(2, 3, 4, 5, seed=9).sigmoid().float().double()
    prob = _random(2, 4, 4, 5, seed=10).softmax(1).float().double()
    return (prob, image), {"radius": 2, "mask": _random(2, 4, 5, seed=11) > -1}


def _gated(prob: Array, image: Array, radius: int, mask: Array) -> tuple[Array, ...]:
    """With the dense matrix of all pairs of pixels."""
    position = np.indices(prob.shape[2:]).reshape(2, -1).T
    offset = position[:, None] - position
    near = (np.abs(offset).max(-1) <= radius) & offset.any(-1)
    plane = (offset**2).sum(-1) / 6**2
    p, color, gate = (x.reshape(*x.shape[:-2], -1) for x in (prob, image, mask))
    rgb = ((color[..., None] - color[:, :, None]) ** 2).sum(1) / 0.1**2
    kernel = np.exp(-0.5 * (plane + rgb)) * near * gate[:, None] * gate[..., None]
    different = 1 - np.einsum("bci,bcj->bij", p, p)
    return ((kernel * different).sum((1, 2)) / gate.sum(1),)


def _tree_inputs() -> Inputs:
    return (_random(2, 3, 3, 4, seed=12), _random(2, 2, 3, 4, seed=13)), {"sigma": 2.0}


def _tree(values: Array, guide: Array, sigma: float) -> tuple[Array, ...]:
    """Distances in the spanning tree, by repeated shortening over all pairs of pixels."""
    position = np.indices(values.shape[2:]).reshape(2, -1).T
    touch = np.abs(position[:, None] - position).sum(-1) == 1
    filtered = []
    for v, g in zip(values.reshape(*values.shape[:2], -1), guide.reshape(*guide.shape[:2], -1), strict=True):
        weight = ((g[:, :, None] - g[:, None]) ** 2).sum(0)
        tree = minimum_spanning_tree(np.where(touch, weight, 0)).toarray()
        similarity = np.exp(-shortest_path(tree, directed=False) / sigma)
        filtered.append(v @ similarity / similarity.sum(0))
    return (np.stack(filtered).reshape(values.shape),)


def _bilateral_inputs() -> Inputs:
    return (_random(1, 3, 18, 20, seed=9), _image()[:, :, :18, :20]), {"sigma_xy": 6.0, "sigma_rgb": 40.0}


def _bilateral(values: Array, image: Array, sigma_xy: float, sigma_rgb: float) -> tuple[Array, ...]:
    """All pairs at once: features whose squared distance is the exponent."""
    position = np.indices(image.shape[2:]).reshape(2, -1) / sigma_xy
    features = np.concatenate([position, image[0].reshape(3, -1) / sigma_rgb])
    kernel = np.exp(-0.5 * ((features[:, :, None] - features[:, None]) ** 2).sum(0))
    np.fill_diagonal(kernel, 0)
    return ((values[0].reshape(len(values[0]), -1) @ kernel).reshape(values.shape),)


# ---- the self-test


def _distance(outputs: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest error, relative to the largest entry of each tensor (absolute below 1)."""
    if len(outputs) != len(expected):
        return float("inf")
    worst = 0.0
    for got, want in zip(outputs, expected, strict=True):
        if got.shape != want.shape:
            return float("inf")
        if want.size:
            error = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
            worst = max(worst, float(error / max(1.0, np.abs(want).max())))
    return worst


def _eigenspace_error(outputs: Sequence[Array], q: Array, k: Array, num: int) -> float:
    """Eigenvalues by magnitude against LAPACK, and the residual |P v - lambda v|."""
    values, vectors = outputs
    p = _matrix(q, k)[0]
    magnitude = np.sort(np.abs(np.linalg.eigvals(p)), -1)[:, ::-1][:, :num]
    residual = np.abs(p @ vectors - vectors * values[:, None, :]).max()
    return max(float(residual), float(np.abs(np.abs(values) - magnitude).max()))


def _slic_error(outputs: Sequence[Array], image: Array, num_segments: int) -> float:
    """0 if ids have no gaps, are few enough, connected, and follow the colours; else 1."""
    (ids,) = outputs
    count = int(ids.max()) + 1
    whole = set(np.unique(ids).tolist()) == set(range(count)) and count <= num_segments
    connected = all(ndimage.label(ids[0] == k)[1] == 1 for k in range(count))
    # Regions explain most of the variance of an image of nine coloured squares.
    rest = sum(image[0][:, ids[0] == k].var(1).sum() * (ids[0] == k).sum() for k in range(count))
    follows = rest < 0.5 * image[0].reshape(3, -1).var(1).sum() * ids[0].size
    return 0.0 if whole and connected and follows else 1.0


def _affinity_error(outputs: Sequence[Array], image: Array, superpixels: Array, num_superpixels: int) -> float:
    index, weight, num_edges, counts = outputs
    expected = _affinity(image, superpixels, num_superpixels)
    edges = [tuple(pair) for pair in index[0].T[: num_edges[0]].tolist()]
    present = [(superpixels == k).sum() for k in range(num_superpixels)]
    if edges != list(expected) or counts[0].tolist() != present or weight[0, num_edges[0] :].any():
        return float("inf")
    return _distance([weight[0, : num_edges[0]]], [np.array(list(expected.values()))])


def _walker_inputs() -> Inputs:
    seeds = torch.full((1, 5, 6), 255)
    seeds[0, 0, 1], seeds[0, 4, 4], seeds[0, 2, 5] = 0, 1, 2
    return (0.2 * _random(1, 2, 5, 6, seed=7), seeds, 3), {}


def _walker(image: Array, seeds: Array, num_classes: int) -> tuple[Array, ...]:
    """With a dense Laplacian."""
    height, width = seeds.shape[1:]
    number = np.arange(height * width).reshape(height, width)
    values, laplacian = image[0].reshape(len(image[0]), -1), np.zeros((number.size, number.size))
    for one, other in ((number[:, 1:], number[:, :-1]), (number[1:], number[:-1])):
        i, j = one.ravel(), other.ravel()
        squares = ((values[:, i] - values[:, j]) ** 2).sum(0)
        w = np.exp(-130 / (10 * values.std() * np.sqrt(len(values))) * squares) + 1e-10
        laplacian[i, j] = laplacian[j, i] = -w
    np.fill_diagonal(laplacian, -laplacian.sum(1))
    known = seeds.ravel() != 255
    prob = (seeds.reshape(-1, 1) == np.arange(num_classes)).astype(np.float64)
    prob[~known] = np.linalg.solve(laplacian[~known][:, ~known], -laplacian[~known][:, known] @ prob[known])
    return (prob.T.reshape(1, num_classes, height, width),)


class Check(NamedTuple):
    """A self-test of one op.

    inputs: makes the arguments, floating ones in float64 on the CPU. error: how far the outputs (arrays) are
    from an independent value, given the arguments as arrays. leaves: positions of the arguments with a
    gradient. tolerance: allowed error in float32. exact: all backends agree bit by bit. dtypes: of backends that
    do not take float32; there the inputs are rounded first, and 64 eps more are allowed: of a few roundings of
    probabilities, of sums over them, and of the outputs.
    """

    op: str
    inputs: Callable[[], Inputs]
    error: Callable[..., float]
    leaves: tuple[int, ...] = ()
    tolerance: float = 1e-4
    exact: bool = False
    dtypes: Mapping[str, torch.dtype] = {}


def _against(function: Callable[..., Sequence[Array]]) -> Callable[..., float]:
    def error(outputs: Sequence[Array], *args: Any, **kwargs: Any) -> float:
        return _distance(outputs, function(*args, **kwargs))

    return error


CHECKS = (
    Check("random_walk", _walk_inputs, _against(_walk), (0, 1, 2), dtypes={"cuda": torch.float16}),
    Check("transition_matrix", _matrix_inputs, _against(_matrix), (0, 1)),
    Check(
        "transition_consistency", _consistency_inputs, _against(_consistency), (0, 1), dtypes={"cuda": torch.float16}
    ),
    Check("neural_eigenspace", lambda: ((*_matrix_inputs()[0], 4), {}), _eigenspace_error),
    Check("upsample_losses", _upsample_inputs, _against(_upsample), (0,)),
    Check("slic", lambda: ((_image(), 16), {}), _slic_error, exact=True),
    Check("superpixel_boundaries", lambda: ((_squares(),), {}), _against(_boundaries), exact=True),
    Check("color_affinity", lambda: ((_image(), _squares(), 9), {}), _affinity_error),
    Check("potts", _potts_inputs, _against(_potts), (0,)),
    Check("gated_crf", _gated_inputs, _against(_gated), (0,)),
    Check("tree_filter", _tree_inputs, _against(_tree), (0, 1)),
    Check("bilateral_filter", _bilateral_inputs, _against(_bilateral), (0,)),
    Check("random_walker", _walker_inputs, _against(_walker), (0,)),
)


class Row(NamedTuple):
    """Result of one check on one backend. value, gradient: errors, None where there is none to measure."""

    op: str
    backend: str
    passed: bool
    value: float | None = None
    gradient: float | None = None
    message: str = ""

    def __str__(self) -> str:
        errors = [
            f"{name} error {error:.1e}"
            for name, error in (("value", self.value), ("gradient", self.gradient))
            if error is not None
        ]
        status = "ok  " if self.passed else "FAIL"
        return f"{status} {self.op:<24}{self.backend:<11}{'  '.join([*errors, self.message])}".rstrip()


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to the tensors in tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_map(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _tensors(value: Any) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    return tuple(item for item in value if isinstance(item, Tensor))


def _scalar(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A fixed combination of all differentiable outputs, float64."""
    outputs = [out for out in _tensors(getattr(ck, op)(*args, **kwargs)) if out.requires_grad]
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for i, out in enumerate(outputs):
        total = total + (out.double() * _random(*out.shape, seed=70 + i).to(out.device)).sum()
    return total


def _gradient_error(check: Check, backend: str, device: str) -> float:
    """Slope along a fixed direction: a backend's gradient against a float64 difference quotient."""
    args, kwargs = _inputs(check, backend)
    directions = {i: _random(*args[i].shape, seed=80 + i) for i in check.leaves}

    def at(step: float) -> float:
        moved = tuple((x + step * directions[i]).requires_grad_() if i in directions else x for i, x in enumerate(args))
        with ck.use_backend("reference"):
            return float(_scalar(check.op, moved, kwargs).detach())

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    args, kwargs = _map(lambda t: _to(t, device, _dtype(check, backend)), (args, kwargs))
    leaves = {i: args[i].requires_grad_() for i in check.leaves}
    with ck.use_backend(backend):
        gradients = torch.autograd.grad(_scalar(check.op, args, kwargs), tuple(leaves.values()))
    slope = sum(float((g.double().cpu() * directions[i]).sum()) for i, g in zip(leaves, gradients, strict=True))
    return abs(slope - expected) / max(1.0, abs(expected))


def _dtype(check: Check, backend: str) -> torch.dtype:
    return check.dtypes.get(backend, torch.float32)


def _to(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _inputs(check: Check, backend: str) -> Inputs:
    """The arguments in float64, with values that a half-precision backend has."""
    dtype = _dtype(check, backend)
    if dtype == torch.float32:
        return check.inputs()
    return _map(lambda t: t.to(dtype).to(t.dtype) if t.is_floating_point() else t, check.inputs())


def _outputs(check: Check, backend: str, device: str) -> list[Array]:
    """The op's outputs on a backend, as arrays."""
    args, kwargs = _map(lambda t: _to(t, device, _dtype(check, backend)), check.inputs())
    with ck.use_backend(backend):
        return [_numpy(out) for out in _tensors(getattr(ck, check.op)(*args, **kwargs))]


def run_check(check: Check, backend: str) -> Row:
    """Runs one op on one backend, in float32 where it takes that; never raises."""
    interpreted = backend == "triton" and _triton.INTERPRETED
    device = "cuda" if backend in ("triton", "cuda") and not interpreted else "cpu"
    try:
        args, kwargs = _inputs(check, backend)
        outputs = _outputs(check, backend, device)
        value = check.error(outputs, *_map(_numpy, args), **_map(_numpy, kwargs))
        gradient = _gradient_error(check, backend, device) if check.leaves else None
        if check.exact:
            definition = _outputs(check, "reference", "cpu")
            if not all(np.array_equal(a, b) for a, b in zip(outputs, definition, strict=True)):
                return Row(check.op, backend, False, value, message="differs from the reference backend")
    except Exception as error:
        return Row(check.op, backend, False, message=f"{type(error).__name__}: {error}")
    half = _dtype(check, backend) != torch.float32
    tolerance = check.tolerance + (64 * torch.finfo(_dtype(check, backend)).eps if half else 0.0)
    passed = value <= tolerance and (gradient is None or gradient <= (1 if half else 10) * tolerance)
    return Row(check.op, backend, passed, value, gradient)


def selftest() -> Iterator[Row]:
    """Runs every op on every backend of this machine."""
    for check in CHECKS:
        if check.op not in backends.ops():
            yield Row(check.op, "-", False, message="the op is not registered")
            continue
        for backend in backends.available(check.op):
            yield run_check(check, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cc4s_kernels.info", description="What is installed and what runs here."
    )
    parser.add_argument("--selftest", action="store_true", help="run every op on every available backend")
    options = parser.parse_args(arguments)
    print(report())
    if not options.selftest:
        return 0
    print()
    failed = 0
    for row in selftest():
        print(row, flush=True)
        failed += not row.passed
    print(f"self-test: {'all rows ok' if not failed else f'{failed} rows FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
