"""`potts` against loops over pairs in Python floats, and the graph Laplacian."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import PixelGrid, SuperpixelGraph, _triton, backends
from cc4s_kernels.ops.potts import NORMS, RELAXATIONS
from tests.ops.tester import (
    Inputs,
    OpTester,
    Result,
    assert_matches,
    backend_params,
    eps,
    generator,
    randn,
    to_dtype,
)
from tests.peak_memory import printed_by

CLASSES = 5
# Interpreted kernels take half a second a call.
EXAMPLES = 6 if _triton.INTERPRETED else 60
every_backend = pytest.mark.parametrize(("backend", "device"), backend_params("potts"))
needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")
ZERO_ON_CONSTANT = ("quadratic", "normalized_quadratic", "collision_divergence", "log_quadratic")


def ln(x: float) -> float:
    return math.log(1e-6 + (1 - 1e-6) * x)


def pair_energy(p: np.ndarray, q: np.ndarray, relaxation: str) -> float:
    """The relaxations as they are written, in math.fsum, without the rearrangements of the package."""
    dot = math.fsum(a * b for a, b in zip(p, q, strict=True))
    square = math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    length = math.hypot(*p) * math.hypot(*q)
    cosine = min(dot / length, 1.0) if length > 0 else 0.0
    return {
        "bilinear": 1 - dot,
        "quadratic": square / 2,
        "normalized_quadratic": 1 - cosine,
        "collision_cross_entropy": -ln(dot),
        "collision_divergence": -ln(cosine),
        "log_quadratic": -ln(1 - square / 2),
    }[relaxation]


def normalised(pairs: list[tuple[float, float]], norm: str) -> float:
    """pairs of (weight, relaxation), once each -> energy; every pair counts in both orders."""
    total = 2 * math.fsum(2 * w * r for w, r in pairs)
    scale = {
        "sum": math.fsum(2 * w for w, _ in pairs),
        "frobenius": math.sqrt(math.fsum(2 * w * w for w, _ in pairs)),
        "none": 1.0,
    }[norm]
    return total / scale if scale > 0 else 0.0


def random_graph(
    batch: int, nodes: int, dtype: torch.dtype, device: str, seed: int, padding: int = 3
) -> SuperpixelGraph:
    """Random edges and weights, with `padding` places unused."""
    random = generator(seed)
    all_pairs = torch.combinations(torch.arange(nodes))
    number = min(len(all_pairs), 2 * nodes)
    index = torch.zeros(batch, 2, number + padding, dtype=torch.int64)
    weight = torch.zeros(batch, number + padding, dtype=torch.float64)
    num_edges = torch.full((batch,), number)
    for b in range(batch):
        edges = all_pairs[torch.randperm(len(all_pairs), generator=random)[:number]]
        index[b, :, :number] = edges.T
        weight[b, :number] = 0.1 + torch.rand(number, generator=random, dtype=torch.float64)
    counts = torch.ones(batch, nodes, dtype=torch.int64)
    return SuperpixelGraph(index.to(device), weight.to(device, dtype), nodes, num_edges.to(device), counts.to(device))


class TestPottsOnGraphs(OpTester):
    op_name = "potts"
    sizes = (1, 7, 33)
    differentiable = (0,)
    variants: ClassVar = {
        **{relaxation: {"relaxation": relaxation} for relaxation in RELAXATIONS},
        "frobenius": {"norm": "frobenius"},
        "none": {"norm": "none"},
    }
    # Those whose derivatives differ in kind, and a norm that depends on the weights otherwise.
    representatives = ("quadratic", "collision_divergence", "log_quadratic", "frobenius")

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, nodes = (2, size) if size else (0, 4)
        logits = randn(batch, nodes, CLASSES, dtype=torch.float64, device=device, seed=seed)
        return (logits.softmax(2).to(dtype), random_graph(batch, nodes, dtype, device, seed)), {}

    def naive(
        self, prob: Tensor, graph: SuperpixelGraph, relaxation: str = "quadratic", norm: str = "sum"
    ) -> tuple[Tensor, ...]:
        energies = []
        for b in range(len(prob)):
            s = prob[b].double().numpy()
            edges = graph.edge_index[b, :, : int(graph.num_edges[b])].T.tolist()
            pairs = [
                (float(w), pair_energy(s[i], s[j], relaxation))
                for (i, j), w in zip(edges, graph.weight[b].tolist(), strict=False)
            ]
            energies.append(normalised(pairs, norm))
        return (torch.tensor(energies, dtype=torch.float64),)

    # Energies and gradients up to a few units, gradients of logarithms up to a few tens at these inputs.
    low_precision_slack = 64.0


class TestPottsOnGrids(OpTester):
    op_name = "potts"
    sizes = (1, 2, 9)
    common_size = 5
    gradcheck_size = 3
    differentiable = (0,)
    low_precision_slack = 64.0
    variants: ClassVar = {
        **{relaxation: {"relaxation": relaxation} for relaxation in RELAXATIONS},
        "frobenius": {"norm": "frobenius"},
        "none": {"norm": "none"},
    }
    # Those whose derivatives differ in kind, and a norm that depends on the weights otherwise.
    representatives = ("quadratic", "collision_divergence", "log_quadratic", "frobenius")

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 3)
        shape = (size, size + 1)
        logits = randn(batch, CLASSES, *shape, dtype=torch.float64, device=device, seed=seed)
        weight = torch.rand(batch, 4, *shape, generator=generator(seed), dtype=torch.float64)
        return (logits.softmax(1).to(dtype), PixelGrid(weight.to(device, dtype))), {}

    def naive(
        self, prob: Tensor, grid: PixelGrid, relaxation: str = "quadratic", norm: str = "sum"
    ) -> tuple[Tensor, ...]:
        return (loop_over_grid(prob, grid.weight, relaxation, norm),)


def loop_over_grid(prob: Tensor, weight: Tensor, relaxation: str, norm: str) -> Tensor:
    energies = []
    for b in range(len(prob)):
        s, w = prob[b].double().numpy(), weight[min(b, len(weight) - 1)].double().numpy()
        height, width = s.shape[1:]
        pairs = []
        for y in range(height):
            for x in range(width):
                for d, (dy, dx) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)][: len(w)]):
                    if y + dy < height and 0 <= x + dx < width:
                        r = pair_energy(s[:, y, x], s[:, y + dy, x + dx], relaxation)
                        pairs.append((float(w[d, y, x]), r))
        energies.append(normalised(pairs, norm))
    return torch.tensor(energies, dtype=torch.float64)


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)


def to_device(where: Any, device: str) -> Any:
    return type(where)(*(part.to(device) if isinstance(part, Tensor) else part for part in where))


@pytest.mark.parametrize("norm", NORMS)
def test_quadratic_is_the_color_constraint(norm: str) -> None:
    """(2 / norm) tr(S^T Lap S) with dense matrices."""
    graph = random_graph(2, 9, torch.float64, "cpu", 0)
    s = randn(2, 9, CLASSES, dtype=torch.float64, device="cpu", seed=1).softmax(2)
    w = torch.zeros(2, 9, 9, dtype=torch.float64)
    for b in range(2):
        i, j = graph.edge_index[b, :, : int(graph.num_edges[b])]
        w[b, i, j] = w[b, j, i] = graph.weight[b, : len(i)]
    laplacian = torch.diag_embed(w.sum(2)) - w
    scale = {"sum": w.sum((1, 2)), "frobenius": torch.linalg.matrix_norm(w), "none": torch.ones(2)}[norm]
    expected = 2 * torch.einsum("bkc,bkl,blc->b", s, laplacian, s) / scale
    # The Laplacian form cancels: a few hundred eps of the sums.
    assert_matches("energy", ck.potts(s, graph, norm=norm), expected, atol=1e-13, rtol=1e-13)


def one_edge(weight: float = 0.7, dtype: torch.dtype = torch.float32) -> SuperpixelGraph:
    return SuperpixelGraph(
        torch.tensor([[[0], [1]]]),
        torch.tensor([[weight]], dtype=dtype),
        2,
        torch.tensor([1]),
        torch.ones(1, 2, dtype=torch.int64),
    )


@every_backend
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_opposite_one_hots(backend: str, device: str, relaxation: str) -> None:
    for dtype in dtypes_of(backend):
        prob = torch.eye(2, dtype=dtype, device=device)[None].requires_grad_()
        image = torch.eye(2, dtype=dtype, device=device)[None, :, None].requires_grad_()
        # Twice the largest relaxation, 1 or -ln(1e-6).
        log = relaxation in ("collision_cross_entropy", "collision_divergence", "log_quadratic")
        expected = 2 * (-math.log(1e-6) if log else 1)
        for leaf, where in (
            (prob, to_device(one_edge(dtype=dtype), device)),
            (image, ck.pixel_grid(1, 2, device=device)),
        ):
            with ck.use_backend(backend):
                energy = ck.potts(leaf, where, relaxation=relaxation)
                energy.sum().backward()
            # eps + (1 - eps) 0 has one rounding of 1e-6, its logarithm one of 14.
            assert float(energy.detach()) == pytest.approx(expected, rel=4 * eps(dtype))
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all()
            assert leaf.grad.any()


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(relaxation=st.sampled_from(RELAXATIONS), seed=st.integers(0, 1000), classes=st.integers(1, 9))
def test_large_logits(backend: str, device: str, relaxation: str, seed: int, classes: int) -> None:
    """Probabilities of logits of +-50, on a graph and on a grid: finite, gradients too."""
    for dtype in dtypes_of(backend):
        label = torch.randint(0, classes, (1, 12), generator=generator(seed))
        logits = torch.full((1, 12, classes), -50.0, dtype=dtype).scatter(2, label[..., None], 50.0)
        image = logits.transpose(1, 2).reshape(1, classes, 3, 4)
        for values, dim, where in (
            (logits, 2, random_graph(1, 12, dtype, device, seed)),
            (image, 1, ck.pixel_grid(3, 4, connectivity=8, device=device)),
        ):
            leaf = values.to(device).requires_grad_()
            with ck.use_backend(backend):
                energy = ck.potts(leaf.softmax(dim), where, relaxation=relaxation)
                energy.sum().backward()
            assert torch.isfinite(energy).all()
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_log_relaxations_keep_their_digits(relaxation: str) -> None:
    """Nearly opposite distributions in float32: no cancellation in 1 - |p - q|^2 / 2."""
    prob = torch.tensor([[[1 - 2.0**-17, 2.0**-17], [2.0**-18, 1 - 2.0**-18]]])
    # The values are exact in float32, so that only the arithmetic differs; the logarithm is of about 1e-5.
    expected = 2 * pair_energy(*prob[0].double().numpy(), relaxation)
    assert float(ck.potts(prob, one_edge(), relaxation=relaxation)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_zero_rows_have_finite_gradients(relaxation: str) -> None:
    # Absent superpixels: a row of zeros, reached only by padding; and, on an edge, still finite.
    for graph in (
        random_graph(1, 4, torch.float32, "cpu", 0),
        random_graph(1, 4, torch.float32, "cpu", 0, 0),
    ):
        prob = torch.full((1, 4, 3), 1 / 3)
        prob[0, 0] = 0
        prob.requires_grad_()
        ck.potts(prob, graph, relaxation=relaxation).sum().backward()
        assert prob.grad is not None
        assert torch.isfinite(prob.grad).all()


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    relaxation=st.sampled_from(RELAXATIONS),
    norm=st.sampled_from(NORMS),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0]),
    classes=st.integers(1, 30),
    narrow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_never_negative(
    backend: str, device: str, relaxation: str, norm: str, scale: float, classes: int, narrow: bool, seed: int
) -> None:
    half = torch.float16 if _triton.INTERPRETED else torch.bfloat16
    for dtype in (half,) if narrow else dtypes_of(backend):
        prob = randn(2, 8, classes, dtype=torch.float64, device=device, seed=seed, scale=scale).softmax(2).to(dtype)
        prob[1] = prob[1, :1]  # constant in one image
        graph = random_graph(2, 8, torch.float32, device, seed)
        image = prob[..., None].transpose(1, 2)  # [B, C, K, 1]
        grid = ck.pixel_grid(8, 1, connectivity=8, device=device)
        with ck.use_backend(backend):
            for energy in (
                ck.potts(p, where, relaxation=relaxation, norm=norm) for p, where in ((prob, graph), (image, grid))
            ):
                assert torch.isfinite(energy).all()
                assert (energy >= 0).all()


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    relaxation=st.sampled_from(RELAXATIONS),
    norm=st.sampled_from(NORMS),
    classes=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_constant_prediction(backend: str, device: str, relaxation: str, norm: str, classes: int, seed: int) -> None:
    for dtype in dtypes_of(backend):
        soft = randn(1, 1, classes, dtype=torch.float64, device=device, seed=seed).softmax(2).to(dtype)
        hard = torch.nn.functional.one_hot(soft.argmax(2), classes).to(dtype)
        for prob in (soft, hard):
            nodes = prob.expand(2, 9, -1)
            image = nodes.transpose(1, 2).reshape(2, classes, 3, 3)
            for p, where in (
                (nodes, random_graph(2, 9, dtype, device, 3)),
                (image, ck.pixel_grid(3, 3, connectivity=8, device=device)),
            ):
                with ck.use_backend(backend):
                    energy = ck.potts(p, where, relaxation=relaxation, norm=norm)
                if prob is hard or relaxation in ("quadratic", "normalized_quadratic", "collision_divergence"):
                    assert not energy.any()
                elif relaxation in ZERO_ON_CONSTANT:
                    # log_quadratic is -ln~ of the sum of p, which is 1 up to a few roundings; times up to 72 pairs.
                    assert energy.max() < 72 * 8 * eps(dtype)
                elif classes > 1:
                    assert energy.min() > 1e-2


@every_backend
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_weight_is_zero_with_gradient_zero(backend: str, device: str, relaxation: str, norm: str) -> None:
    prob = torch.rand(2, 3, 4, generator=generator(0)).softmax(2).to(device)
    image = prob.transpose(1, 2)[..., None]
    empty = SuperpixelGraph(
        torch.zeros(2, 2, 4, dtype=torch.int64),
        torch.zeros(2, 4),
        3,
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    masked = ck.pixel_grid(3, 1, connectivity=8, mask=torch.zeros(2, 3, 1, dtype=torch.bool))
    for values, where in (
        (prob, empty),
        (prob, empty._replace(edge_index=empty.edge_index[..., :0], weight=empty.weight[:, :0])),
        (prob[:, :1], empty._replace(num_nodes=1)),
        (image, masked),
        # One pixel; its weights belong to no pair.
        (image[:, :, :1], PixelGrid(torch.full((1, 4, 1, 1), torch.nan))),
    ):
        leaf = values.clone().requires_grad_()
        with ck.use_backend(backend):
            energy = ck.potts(leaf, to_device(where, device), relaxation=relaxation, norm=norm)
            energy.sum().backward()
        assert not energy.any()
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_the_weights(relaxation: str, norm: str) -> None:
    graph = random_graph(2, 5, torch.float64, "cpu", 2)
    prob = randn(2, 5, 3, dtype=torch.float64, device="cpu", seed=2).softmax(2)
    image = randn(2, 3, 3, 2, dtype=torch.float64, device="cpu", seed=2).softmax(1)

    def on_graph(weight: Tensor) -> Tensor:
        # Padding stays 0, as its weights are.
        real = torch.arange(weight.shape[1]) < graph.num_edges[:, None]
        return ck.potts(prob, graph._replace(weight=weight * real), relaxation=relaxation, norm=norm)

    def on_grid(weight: Tensor) -> Tensor:
        return ck.potts(image, PixelGrid(weight), relaxation=relaxation, norm=norm)

    assert torch.autograd.gradcheck(on_graph, graph.weight.clone().requires_grad_())
    weight = torch.rand(2, 4, 3, 2, generator=generator(0), dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(on_grid, weight.requires_grad_())


# ---- Backends


def draw(kind: str, dtype: torch.dtype, device: str, size: int = 1) -> tuple[Tensor, Any]:
    """Probabilities and a graph or grid of a kind; longer than vectors and tiles for `size` 3."""
    height, width, nodes = 4 * size + 1, 7 * size, 9 * size
    if kind == "graph":
        prob = randn(2, nodes, CLASSES, dtype=torch.float64, device=device, seed=1, scale=2).softmax(2).to(dtype)
        graph = random_graph(2, nodes, dtype, device, 2)
        # Any order and direction, an edge with one end, and one that stands twice.
        edges = graph.edge_index.flip(2)
        edges[:, :, 0::3] = edges[:, :, 0::3].flip(1)
        edges[:, :, 5] = 1
        edges[:, :, 6] = edges[:, :, 7]
        return prob, graph._replace(edge_index=edges, weight=graph.weight.flip(1))
    prob = randn(2, CLASSES, height, width, dtype=torch.float64, device=device, seed=1, scale=2).softmax(1).to(dtype)
    if kind == "gaussian":
        image = torch.randint(0, 64, (2, 3, height, width), generator=generator(2), dtype=torch.uint8)
        grid = ck.gaussian_grid(image.to(device))
        return prob, PixelGrid(grid.weight.to(dtype))
    batch = 1 if kind == "shared" else 2
    weight = torch.rand(batch, 2 if kind == "grid4" else 4, height, width, generator=generator(2), dtype=torch.float64)
    return prob, PixelGrid(weight.to(device, dtype))


def energy_and_gradients(
    backend: str, prob: Tensor, where: Any, weight_needed: bool = True, prob_needed: bool = True, **options: Any
) -> Result:
    """Energies, and gradients of prob and of the weights, of a fixed combination of the images."""
    prob = prob.detach().requires_grad_(prob_needed)
    weight = where.weight.detach().requires_grad_(weight_needed)
    leaves = [leaf for leaf in (prob, weight) if leaf.requires_grad]
    with ck.use_backend(backend):
        energy = ck.potts(prob, where._replace(weight=weight), **options)
        factors = torch.tensor([0.75, -1.5], dtype=energy.dtype, device=energy.device)
        gradients = torch.autograd.grad(energy, leaves, factors)
    return Result((energy.detach(),), gradients)


KINDS = ("graph", "grid4", "grid8", "gaussian", "shared")


@every_backend
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_kernels(backend: str, device: str, kind: str, relaxation: str) -> None:
    """Energies, and gradients of prob and weights, against the reference in float64; by the rule of the op tester."""
    for norm in ("frobenius",) if _triton.INTERPRETED else NORMS:
        for dtype in (torch.float32, torch.float16 if _triton.INTERPRETED else torch.bfloat16):
            prob, where = draw(kind, dtype, device, 1 if _triton.INTERPRETED else 3)
            options = {"relaxation": relaxation, "norm": norm}
            truth = energy_and_gradients("reference", *to_dtype((prob, where), torch.float64), **options)
            eager = energy_and_gradients("reference", prob, where, **options)
            got = energy_and_gradients(backend, prob, where, **options)
            names = ("energy", "gradient of prob", "gradient of weights")
            for name, a, b, e in zip(
                names, (*got[0], *got[1]), (*eager[0], *eager[1]), (*truth[0], *truth[1]), strict=True
            ):
                assert a.dtype == b.dtype
                OpTester().assert_error_within(f"{name}, {dtype}, {norm}", a, b, e)
            # Alone, each gradient is the same.
            alone = {"weight_needed": False}, {"prob_needed": False}
            for found, only in zip(got.gradients, alone, strict=True):
                again = energy_and_gradients(backend, prob, where, **only, **options).gradients[0]
                assert torch.equal(found, again)


@every_backend
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("kind", ["graph", "grid8"])
def test_weights_of_nan_poison_their_image_only(backend: str, device: str, kind: str, relaxation: str) -> None:
    prob, where = draw(kind, torch.float32, device)
    weight = where.weight.clone()
    weight[1] = torch.nan
    clean = energy_and_gradients(backend, prob, where, relaxation=relaxation)
    dirty = energy_and_gradients(backend, prob, where._replace(weight=weight), relaxation=relaxation)
    for a, b in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.isnan(b[1]).any()
    assert torch.isnan(dirty.outputs[0][1])


@every_backend
def test_weights_of_pairs_that_leave_the_grid_do_not_count(backend: str, device: str) -> None:
    prob, where = draw("grid8", torch.float32, device)
    weight = where.weight.clone()
    weight[:, 1:, -1] = torch.nan
    weight[:, 0, :, -1] = weight[:, 2, :, -1] = weight[:, 3, :, 0] = torch.nan
    outside = torch.isnan(weight)
    clean = energy_and_gradients(backend, prob, where)
    dirty = energy_and_gradients(backend, prob, PixelGrid(weight))
    for a, b in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True):
        assert torch.equal(a, b)
    assert not clean.gradients[1][outside].any()
    assert clean.gradients[1][~outside].all()


@every_backend
def test_an_edge_to_no_node(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at beforehand, the kernels guard themselves."""
    if backend == "reference":
        return
    monkeypatch.setattr("cc4s_kernels.ops.potts.may_read_values", lambda tensor: False)
    prob, graph = draw("graph", torch.float32, device)
    for wrong in (-1, prob.shape[1], 2**40):
        edges = graph.edge_index.clone()
        edges[1, 1, 4] = wrong
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=f"edge_index: got node {wrong}, expected 0 to 8"):
                energy_and_gradients(backend, prob, graph._replace(edge_index=edges))
        else:
            found = energy_and_gradients(backend, prob, graph._replace(edge_index=edges))
            assert torch.isfinite(found.outputs[0][0])
            assert torch.isnan(found.outputs[0][1])
            assert torch.isfinite(found.gradients[0][0]).all()


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_triton, "missing", lambda: None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    prob, grid = torch.rand(1, 2, 3, 3), ck.pixel_grid(3, 3)
    assert ck.explain("potts", prob, grid).reasons["triton"] == "prob is on cpu"
    assert ck.explain("potts", prob.double(), grid).reasons["triton"].startswith("prob is torch.float64, Triton")
    wide = PixelGrid(grid.weight.double())
    assert ck.explain("potts", prob, wide).reasons["triton"] == "prob is on cpu"
    if backends.missing("cpu") is None:
        tiny = PixelGrid(grid.weight.to(torch.float8_e5m2))
        assert ck.explain("potts", prob, tiny).reasons["cpu"].startswith("weight is torch.float8_e5m2, the C++")
        assert ck.explain("potts", prob.to("meta"), grid).reasons["cpu"] == "prob is on meta"
    capsys.readouterr()


@needs_extension
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch, instructions: str, relaxation: str) -> None:
    """Those that the processor lacks fall back to narrower ones."""
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    for kind in ("graph", "grid8"):
        for dtype in (torch.float32, torch.float64):
            prob, where = draw(kind, dtype, "cpu", 3)
            truth = energy_and_gradients("reference", *to_dtype((prob, where), torch.float64), relaxation=relaxation)
            got = energy_and_gradients("cpu", prob, where, relaxation=relaxation)
            for a, e in zip((*got[0], *got[1]), (*truth[0], *truth[1]), strict=True):
                # A few roundings of terms of order 1, in sums of up to 8 terms or, per row, some 20.
                assert_matches("tensor", a, e, atol=0, rtol=16 * eps(dtype))


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_threads_gives_the_same(kind: str) -> None:
    prob, where = draw(kind, torch.float32, "cpu", 12)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(energy_and_gradients("cpu", prob, where, relaxation="log_quadratic"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        OpTester().assert_bitwise(result, results[0])


@needs_extension
@pytest.mark.parametrize("relaxation", ["quadratic", "collision_divergence"])
def test_the_published_size(relaxation: str) -> None:
    """A 465 x 465 crop with 21 classes in 8-connected pixels, in each layout."""
    prob = randn(1, 21, 465, 465, dtype=torch.float32, device="cpu", seed=0, scale=3).softmax(1)
    image = torch.randint(0, 64, (1, 3, 465, 465), generator=generator(1), dtype=torch.uint8)
    grid = ck.gaussian_grid(image)

    def run(backend: str, values: Tensor) -> Result:
        leaf = values.requires_grad_()
        with ck.use_backend(backend):
            energy = ck.potts(leaf, grid, relaxation=relaxation)
            return Result((energy.detach(),), torch.autograd.grad(energy.sum(), leaf))

    expected = run("reference", prob.detach())
    for values in (prob.detach(), prob.detach().to(memory_format=torch.channels_last)):
        got = run("cpu", values)
        # Sums of 8e5 pairs; gradients of at most 8.
        assert_matches("energy", got.outputs[0], expected.outputs[0], atol=0, rtol=1e-5)
        assert_matches("gradient", got.gradients[0], expected.gradients[0], atol=0, rtol=1e-5)


@needs_extension
def test_memory_of_a_backward_pass() -> None:
    """The reference keeps tensors of the size of prob for each direction; the kernels the gradient and a few rows."""
    code = """
import torch, cc4s_kernels as ck
from tests.peak_memory import grown_mb
def case(size):
    prob = torch.full((1, 21, size, size), 1 / 21, requires_grad=True)
    grid = ck.pixel_grid(size, size, connectivity=8)
    return lambda: torch.autograd.grad(ck.potts(prob, grid, relaxation="log_quadratic").sum(), prob)
with ck.use_backend("cpu"):
    case(32)()
    print(grown_mb(case(465)))
"""
    grown = float(printed_by(code))
    gradient = 21 * 465 * 465 * 4 / 2**20
    assert gradient <= grown < 1.25 * gradient, f"{grown:.1f} MiB, the gradient is {gradient:.1f} MiB"


# ---- Grids


def test_pixel_grid_counts_its_pairs() -> None:
    prob = torch.zeros(1, 2, 4, 5)
    prob[0, 0] = 1
    prob[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    # A corner differs from 2 or 3 neighbours; the quadratic relaxation is 1 there; both orders, times 2.
    assert float(ck.potts(prob, ck.pixel_grid(4, 5), norm="none")) == 8
    assert float(ck.potts(prob, ck.pixel_grid(4, 5, connectivity=8), norm="none")) == 12
    # 31 pairs on the 4-connected 4 x 5 grid.
    assert float(ck.potts(prob, ck.pixel_grid(4, 5))) == pytest.approx(8 / 62)


def test_one_weight_for_the_batch() -> None:
    prob = randn(3, 4, 5, 6, dtype=torch.float64, device="cpu", seed=0).softmax(1)
    weight = torch.rand(1, 2, 5, 6, generator=generator(0), dtype=torch.float64)
    grid = ck.pixel_grid(5, 6, weight=weight)
    expected = loop_over_grid(prob, weight, "quadratic", "frobenius")
    # Sums of a hundred terms.
    assert_matches("energy", ck.potts(prob, grid, norm="frobenius"), expected, atol=0, rtol=1e-13)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_gaussian_grid(connectivity: int, masked: bool) -> None:
    image = torch.randint(0, 60, (2, 3, 4, 5), generator=generator(0), dtype=torch.uint8)
    mask = torch.rand(2, 4, 5, generator=generator(1)) < 0.7
    found = ck.gaussian_grid(image, sigma_color=12.5, connectivity=connectivity, mask=mask if masked else None).weight
    offsets = [(0, 1), (1, 0), (1, 1), (1, -1)][: connectivity // 2]
    expected = np.zeros((2, len(offsets), 4, 5))
    for b, d, y, x in np.ndindex(*expected.shape):
        v, u = y + offsets[d][0], x + offsets[d][1]
        if v < 4 and 0 <= u < 5 and (not masked or (mask[b, y, x] and mask[b, v, u])):
            color = image[b].double().numpy()
            expected[b, d, y, x] = math.exp(-((color[:, y, x] - color[:, v, u]) ** 2).sum() / (2 * 12.5**2))
    # exp of float32 arguments up to 35: relative error 35 eps of values that are small there.
    assert_matches("weight", found, torch.from_numpy(expected), atol=1e-6)
    as_float = ck.gaussian_grid(
        image.double() / 255, sigma_color=12.5, connectivity=connectivity, mask=mask if masked else None
    )
    assert_matches("weight", as_float.weight, torch.from_numpy(expected), atol=1e-14)


def test_masked_pixels_of_a_grid_do_not_matter() -> None:
    prob = randn(2, 3, 6, 6, dtype=torch.float64, device="cpu", seed=0).softmax(1)
    mask = torch.rand(2, 6, 6, generator=generator(0)) < 0.6
    other = torch.where(mask[:, None], prob, prob.flip(1))
    for grid in (
        ck.pixel_grid(6, 6, connectivity=8, mask=mask),
        ck.gaussian_grid(prob, connectivity=8, mask=mask),
    ):
        for relaxation in RELAXATIONS:
            a, b = (ck.potts(p, grid, relaxation=relaxation) for p in (prob, other))
            assert torch.equal(a, b)


def test_compiled_from_image_to_energy() -> None:
    image = torch.randint(0, 256, (2, 3, 12, 15), generator=generator(0), dtype=torch.uint8)
    logits = randn(2, 4, 12, 15, dtype=torch.float32, device="cpu", seed=0)

    def energies(logits: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        prob = logits.softmax(1)
        ids = ck.slic(image, 9)
        graph = ck.color_affinity(image, ids, 9)
        index = ids.long().flatten(1)[..., None].expand(-1, -1, 4)
        sums = torch.zeros(2, 9, 4).scatter_add(1, index, prob.flatten(2).transpose(1, 2))
        means = sums / graph.counts.clamp(min=1)[..., None]
        return ck.potts(means, graph), ck.potts(prob, ck.gaussian_grid(image), relaxation="log_quadratic")

    torch._dynamo.reset()
    compiled = torch.compile(energies, fullgraph=True, backend="aot_eager")
    for a, e in zip(compiled(logits, image), energies(logits, image), strict=True):
        # Sums in another order.
        assert_matches("energy", a, e, atol=0, rtol=1e-5)


def test_errors() -> None:
    graph, prob = random_graph(1, 4, torch.float32, "cpu", 0), torch.rand(1, 4, 3)
    cases: list[tuple[type[Exception], str, Any]] = [
        (
            ValueError,
            "relaxation: got 'cubic', expected one of 'bilinear'",
            lambda: ck.potts(prob, graph, relaxation="cubic"),
        ),
        (ValueError, "norm: got 'max'", lambda: ck.potts(prob, graph, norm="max")),
        (TypeError, "graph_or_grid: got", lambda: ck.potts(prob, prob)),  # type: ignore[arg-type]
        (TypeError, "prob: got .* floating", lambda: ck.potts(prob.long(), graph)),
        (ValueError, "prob: got .* expected 4 nodes", lambda: ck.potts(prob[:, 1:], graph)),
        (ValueError, "edge_index: got .*the batch of prob", lambda: ck.potts(prob.expand(2, -1, -1), graph)),
        (
            ValueError,
            "edge_index: got nodes from 0 to 7",
            lambda: ck.potts(prob, graph._replace(edge_index=graph.edge_index * 0 + 7 * (graph.weight[:, None] > 0))),
        ),
        (ValueError, "prob: got .* expected shape", lambda: ck.potts(prob, ck.pixel_grid(4, 3))),
        (
            ValueError,
            "weight: got .*the pixels of prob",
            lambda: ck.potts(torch.rand(1, 3, 4, 4), ck.pixel_grid(4, 3)),
        ),
        (
            ValueError,
            "weight: got .* 2 or 4 directions",
            lambda: ck.potts(torch.rand(1, 3, 4, 4), PixelGrid(torch.rand(1, 3, 4, 4))),
        ),
        (ValueError, "connectivity: got 6", lambda: ck.pixel_grid(4, 4, connectivity=6)),
        (ValueError, "height: got 0", lambda: ck.pixel_grid(0, 4)),
        (
            ValueError,
            "weight: got values from -1",
            lambda: ck.pixel_grid(4, 4, weight=torch.full((1, 2, 4, 4), -1.0)),
        ),
        (
            ValueError,
            "weight: got .*connectivity 8",
            lambda: ck.pixel_grid(4, 4, connectivity=8, weight=torch.ones(1, 2, 4, 4)),
        ),
        (TypeError, "mask: got .* torch.bool", lambda: ck.pixel_grid(4, 4, mask=torch.ones(1, 4, 4))),
        (
            ValueError,
            "mask: got .*pixels of the grid",
            lambda: ck.pixel_grid(4, 4, mask=torch.ones(1, 4, 5) > 0),
        ),
        (ValueError, "sigma_color: got 0", lambda: ck.gaussian_grid(torch.rand(1, 3, 4, 4), sigma_color=0)),
        (TypeError, "image: got .* torch.uint8", lambda: ck.gaussian_grid(torch.ones(1, 3, 4, 4).int())),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
