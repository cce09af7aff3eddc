"""`upsample_losses` against a loop over pixels and against compositions of torch.nn.functional."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cc4s_kernels as ck
from cc4s_kernels import backends
from tests.ops.tester import Inputs, OpTester, Result, assert_matches, generator, randn
from tests.peak_memory import printed_by

needs_extension = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")

CLASSES = 5
SUPERPIXELS = 4


def source_position(i: int, size: int, out: int, align_corners: bool) -> float:
    if align_corners:
        return 0.0 if out == 1 else i * (size - 1) / (out - 1)
    return max((i + 0.5) * size / out - 0.5, 0.0)


def upsampled_pixel(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """image (C, h, w) at a real position."""
    h, w = image.shape[1:]
    y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    fy, fx = y - y0, x - x0
    top = (1 - fx) * image[:, y0, x0] + fx * image[:, y0, x1]
    bottom = (1 - fx) * image[:, y1, x0] + fx * image[:, y1, x1]
    return (1 - fy) * top + fy * bottom


def loop(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    superpixels: Tensor | None = None,
    num_superpixels: int | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    batch, classes, h, w = logits.shape
    height, width = labels.shape[1:]
    bins = num_superpixels or 0
    ce, labelled, entropy, total = (np.zeros(batch) for _ in range(4))
    pooled, counts = np.zeros((batch, bins, classes)), np.zeros((batch, bins))
    image, target = logits.detach().double().numpy(), labels.numpy()
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                at = upsampled_pixel(
                    image[b],
                    source_position(i, h, height, align_corners),
                    source_position(j, w, width, align_corners),
                )
                shifted = at - at.max()
                log_p = shifted - math.log(np.exp(shifted).sum())
                p = np.exp(log_p)
                y = int(target[b, i, j])
                if y != ignore_index:
                    a = 1.0 if class_weight is None else float(class_weight[y])
                    ce[b] -= a * log_p[y]
                    labelled[b] += a
                m = 1.0 if weight is None else float(weight[b, i, j])
                entropy[b] -= m * sum(v * math.log(v) for v in p if v > 0)
                total[b] += m
                if superpixels is not None and superpixels[b, i, j] >= 0:
                    pooled[b, superpixels[b, i, j]] += p
                    counts[b, superpixels[b, i, j]] += 1
    return tuple(torch.from_numpy(x) for x in (ce, labelled, entropy, total, pooled, counts))


class TestUpsampleLosses(OpTester):
    op_name = "upsample_losses"
    sizes = (1, 7, 21)
    differentiable = (0,)
    variants: ClassVar = {
        "all": {},
        "half_pixel": {"align_corners": False},
        "plain": {"weight": None, "superpixels": None, "num_superpixels": None, "class_weight": None},
        "ignore_class": {"ignore_index": 2},
    }

    def make_inputs(self, dtype: torch.dtype, device: str, size: int, seed: int) -> Inputs:
        batch, size = (2, size) if size else (0, 1)
        shape = (batch, size, size + 2)
        random = generator(seed)
        labels = torch.randint(0, CLASSES, shape, generator=random)
        labels = labels.where(torch.rand(shape, generator=random) < 0.5, 2).to(torch.uint8)
        ids = torch.randint(-1, SUPERPIXELS, shape, generator=random, dtype=torch.int32)
        logits = randn(batch, CLASSES, (size + 2) // 3, (size + 1) // 2, dtype=dtype, device=device, seed=seed, scale=2)
        return (logits, labels.to(device)), {
            "weight": torch.rand(shape, generator=random, dtype=torch.float64).to(device, dtype),
            "superpixels": ids.to(device),
            "num_superpixels": SUPERPIXELS,
            "class_weight": torch.rand(CLASSES, generator=random, dtype=torch.float64).to(device, dtype),
        }

    def naive(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return loop(*args, **kwargs)

    def custom_op_calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        if "cpu" not in backends.available("upsample_losses"):
            return []
        (logits, labels), options = self.make_inputs(torch.float32, "cpu", 7, 0)
        maps = (labels, options["weight"], options["superpixels"], options["class_weight"])
        rest = (SUPERPIXELS, 255, True)
        given = (torch.ones(2), torch.ones(2), torch.ones(2, SUPERPIXELS, CLASSES))
        ops = torch.ops.cc4s_kernels
        return [
            (ops.upsample_losses.default, (logits.requires_grad_(), *maps, *rest), {}),
            (ops.upsample_losses.default, (logits.detach().double(), labels, None, None, None, 0, 255, False), {}),
            (ops.upsample_losses_backward.default, (*given, logits.detach(), *maps, *rest), {}),
        ]


def composition(logits: Tensor, labels: Tensor, weight: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    ce = F.cross_entropy(full, labels.long(), ignore_index=255, reduction="none").sum((1, 2))
    return ce, (torch.distributions.Categorical(logits=full.movedim(1, -1)).entropy() * weight).sum((1, 2))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(9, 11), (33, 29), (4, 5), (1, 1), (9, 40)])
def test_any_size_of_labels(size: tuple[int, int], align_corners: bool) -> None:
    """Identity, up, down, a single pixel and mixed."""
    logits = randn(3, 21, 9, 11, dtype=torch.float64, device="cpu", seed=0).requires_grad_()
    labels = torch.randint(0, 21, (3, *size), generator=generator(1))
    labels = labels.where(torch.rand(labels.shape, generator=generator(2)) < 0.3, 255)
    weight = torch.rand(labels.shape, generator=generator(3), dtype=torch.float64)
    out = ck.upsample_losses(logits, labels, weight=weight, align_corners=align_corners)
    ce, entropy = composition(logits, labels, weight, align_corners)
    torch.testing.assert_close(out.cross_entropy, ce)
    torch.testing.assert_close(out.entropy, entropy)
    torch.testing.assert_close(out.weight, weight.sum((1, 2)))
    assert out.labelled.tolist() == (labels != 255).sum((1, 2)).tolist()
    assert out.pooled.shape == (3, 0, 21)
    assert out.counts.shape == (3, 0)
    got = torch.autograd.grad((out.cross_entropy + out.entropy).sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad((ce + entropy).sum(), logits))


def test_label_dtypes_agree() -> None:
    logits = randn(2, 4, 3, 3, dtype=torch.float32, device="cpu", seed=0)
    labels = torch.randint(0, 4, (2, 7, 7), generator=generator(0))
    labels[:, :3] = 255
    expected = ck.upsample_losses(logits, labels)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        found = ck.upsample_losses(logits, labels.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_than_255_classes() -> None:
    logits = randn(1, 300, 2, 2, dtype=torch.float64, device="cpu", seed=0)
    labels = torch.tensor([[[255, 299], [-1, 0]]])
    out = ck.upsample_losses(logits, labels, ignore_index=-1)
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(out.cross_entropy[0], expected)
    assert out.labelled.tolist() == [3]
    with pytest.raises(ValueError, match="ignore_index: got 255, which is one of 300 classes"):
        ck.upsample_losses(logits, labels)
    with pytest.raises(TypeError, match=r"labels: .*uint8.* for 300 classes"):
        ck.upsample_losses(logits, labels.to(torch.uint8), ignore_index=-1)


def test_bool_weight_is_zero_and_one() -> None:
    logits = randn(2, 4, 3, 3, dtype=torch.float32, device="cpu", seed=0)
    labels = torch.full((2, 6, 6), 255)
    mask = torch.rand(2, 6, 6, generator=generator(0)) < 0.5
    a = ck.upsample_losses(logits, labels, weight=mask)
    b = ck.upsample_losses(logits, labels, weight=mask.float())
    assert torch.equal(a.entropy, b.entropy)
    assert a.weight.tolist() == mask.sum((1, 2)).tolist()


def test_no_label_and_no_weight_give_exactly_zero() -> None:
    logits = randn(2, 4, 3, 3, dtype=torch.float32, device="cpu", seed=0).requires_grad_()
    labels = torch.full((2, 6, 6), 255, dtype=torch.uint8)
    out = ck.upsample_losses(logits, labels, weight=torch.zeros(2, 6, 6))
    for value in (out.cross_entropy, out.entropy):
        assert value.tolist() == [0, 0]
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert not gradient.any()
    assert out.labelled.tolist() == out.weight.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)[None, :, None, None].repeat(1, 1, 2, 2)
    logits[..., 1, 1] = torch.tensor([-1e4, 1e4, 1e4], dtype=dtype)
    logits.requires_grad_()
    labels = torch.tensor([[[0, 1], [2, 0]]])
    out = ck.upsample_losses(logits, labels, superpixels=torch.zeros(1, 2, 2, dtype=torch.int32), num_superpixels=1)
    # Pixels: right, 2e4 off, 1e4 off, 2e4 + ln 2 off; one pixel is undecided between two classes.
    # 1e-4 relative: bfloat16 rounds 1e4 to 9984; the exact number is that of the rounded logits.
    high = float(logits.detach()[0, 0, 0, 0])
    assert out.cross_entropy.item() == pytest.approx(5 * high + math.log(2), rel=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(out.cross_entropy + out.entropy + out.pooled.sum(), logits)
    assert bool(gradient.isfinite().all())


def test_gradient_of_entropy_is_the_formula() -> None:
    """dH/dlogit_c = -p_c (log p_c + H) without upsampling (docs/method.md section 4)."""
    logits = randn(2, 6, 4, 5, dtype=torch.float64, device="cpu", seed=0, scale=3).requires_grad_()
    weight = torch.rand(2, 4, 5, generator=generator(0), dtype=torch.float64)
    out = ck.upsample_losses(logits, torch.full((2, 4, 5), 255), weight=weight)
    (gradient,) = torch.autograd.grad(out.entropy.sum(), logits)
    p = F.softmax(logits.detach(), 1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, -weight[:, None] * p * (p.log() + entropy))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 9),
    low=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    align_corners=st.booleans(),
)
def test_properties(seed: int, classes: int, low: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    logits = randn(2, classes, *low, dtype=torch.float64, device="cpu", seed=seed, scale=4)
    random = generator(seed)
    labels = torch.randint(0, classes + 1, (2, *size), generator=random)
    labels = labels.where(labels < classes, 255)
    ids = torch.randint(-1, 6, (2, *size), generator=random, dtype=torch.int32)
    weight = torch.rand(2, *size, generator=random, dtype=torch.float64)

    def run(logits: Tensor, labels: Tensor = labels) -> ck.UpsampleLosses:
        return ck.upsample_losses(
            logits, labels, weight=weight, superpixels=ids, num_superpixels=6, align_corners=align_corners
        )

    out = run(logits)
    # Probabilities sum to one, and lie between 0 and the number of pixels. 1e-9: rounding of up to 144 terms.
    torch.testing.assert_close(out.pooled.sum(-1), out.counts, rtol=1e-9, atol=1e-9)
    assert bool((out.pooled >= 0).all())
    assert out.counts.sum().item() == (ids >= 0).sum().item()
    # The entropy of C classes is between 0 and ln C.
    assert bool((out.entropy >= 0).all())
    assert bool((out.entropy <= out.weight * math.log(classes) + 1e-9).all())
    assert bool((out.cross_entropy >= 0).all())
    # A number added to all classes changes nothing; a renaming of the classes renames the columns.
    shift = randn(2, 1, *low, dtype=torch.float64, device="cpu", seed=seed + 1)
    order = torch.randperm(classes, generator=random)
    renamed = torch.argsort(order)[labels.clamp(max=classes - 1)].where(labels != 255, 255)
    moved = run(logits[:, order] + shift, renamed)
    expected = out._replace(pooled=out.pooled[..., order])
    for a, b in zip(moved, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def good() -> dict[str, Any]:
    return {
        "logits": torch.zeros(2, 3, 4, 4),
        "labels": torch.zeros(2, 8, 8, dtype=torch.uint8),
        "weight": torch.ones(2, 8, 8),
        "superpixels": torch.zeros(2, 8, 8, dtype=torch.int32),
        "num_superpixels": 2,
        "class_weight": torch.ones(3),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1]}, TypeError, "logits: got list"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits: .* expected shape \(B, C, h, w\)"),
        ({"logits": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "logits: .* floating"),
        ({"logits": torch.zeros(2, 3, 0, 4)}, ValueError, "logits: .* at least one"),
        ({"labels": torch.zeros(2, 8, 8)}, TypeError, "labels: .* expected one of torch.uint8"),
        ({"labels": torch.zeros(1, 8, 8, dtype=torch.uint8)}, ValueError, r"labels: .*\(2, 8, 8\)"),
        ({"labels": torch.zeros(2, 0, 8, dtype=torch.uint8)}, ValueError, "labels: .* at least one pixel"),
        ({"labels": torch.full((2, 8, 8), 3)}, ValueError, "labels: got 3 among 128 values out of range"),
        ({"labels": torch.full((2, 8, 8), -1)}, ValueError, "labels: got -1 among 128"),
        ({"weight": torch.ones(2, 8, 7)}, ValueError, "weight: .*the shape of labels"),
        ({"weight": torch.ones(2, 8, 8, dtype=torch.uint8)}, TypeError, "weight: .* floating dtype or bool"),
        ({"weight": torch.full((2, 8, 8), -0.5)}, ValueError, "weight: got values from -0.5"),
        ({"weight": torch.full((2, 8, 8), math.nan)}, ValueError, "weight: .* finite"),
        ({"weight": torch.full((2, 8, 8), math.inf)}, ValueError, "weight: .* finite"),
        ({"weight": torch.ones(2, 8, 8, requires_grad=True)}, ValueError, "weight: .*detach"),
        ({"superpixels": torch.zeros(2, 8, 8)}, TypeError, "superpixels: .* torch.int32"),
        ({"superpixels": torch.zeros(2, 7, 8, dtype=torch.int32)}, ValueError, "superpixels: .* labels"),
        ({"superpixels": torch.full((2, 8, 8), 2)}, ValueError, "superpixels: got ids from 2 to 2"),
        ({"superpixels": torch.full((2, 8, 8), -2)}, ValueError, "superpixels: got ids from -2"),
        ({"superpixels": None}, ValueError, "num_superpixels: got 2 without superpixels"),
        ({"num_superpixels": None}, ValueError, "num_superpixels: got None"),
        ({"num_superpixels": -1}, ValueError, "num_superpixels: got -1"),
        ({"num_superpixels": 2.0}, TypeError, "num_superpixels: .* integer"),
        ({"ignore_index": 255.0}, TypeError, "ignore_index: .* integer"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight: .*\(3,\)"),
        ({"class_weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "class_weight: got values from -1.0"),
        ({"labels": torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta")}, ValueError, "labels: .*device"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {**good(), **changes}
    logits, labels = options.pop("logits"), options.pop("labels")
    with pytest.raises(error, match=message):
        ck.upsample_losses(logits, labels, **options)


def test_unchecked_values_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a look at the values would cost a synchronisation, values out of range count as ignored."""
    logits = randn(1, 3, 2, 2, dtype=torch.float64, device="cpu", seed=0)
    labels = torch.tensor([[[0, 7], [-3, 255]]])
    ids = torch.tensor([[[0, 9], [-5, 1]]])
    with monkeypatch.context() as patch:
        patch.setattr("cc4s_kernels.ops.upsample_losses.may_read_values", lambda tensor: False)
        out = ck.upsample_losses(logits, labels, superpixels=ids, num_superpixels=2)
    clean_labels, clean_ids = torch.tensor([[[0, 255], [255, 255]]]), torch.tensor([[[0, -1], [-1, 1]]])
    expected = ck.upsample_losses(logits, clean_labels, superpixels=clean_ids, num_superpixels=2)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# ---- The C++ backend


def large_inputs(dtype: torch.dtype = torch.float32, classes: int = 21) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Several strips of rows, blocks of pixels that nothing looks at, and a width that is no multiple of a vector."""
    random = generator(7)
    logits = randn(2, classes, 13, 11, dtype=dtype, device="cpu", seed=3, scale=4)
    labels = torch.randint(0, classes, (2, 101, 87), generator=random)
    labels = labels.where(torch.rand(labels.shape, generator=random) < 0.1, 255)
    weight = torch.rand(labels.shape, generator=random)
    labels[:, 40:60, :40], weight[:, 40:60, :40] = 255, 0
    ids = (torch.arange(101)[:, None] // 10 * 9 + torch.arange(87) // 10).int().repeat(2, 1, 1)
    ids[:, 40:60, :40] = -1
    return logits, labels, {"weight": weight, "superpixels": ids, "num_superpixels": 99}


def run_large(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Result:
    leaf = logits.detach().requires_grad_()
    out = ck.upsample_losses(leaf, labels, **options)
    factor = torch.linspace(-1, 1, out.pooled.numel(), dtype=out.pooled.dtype, device=leaf.device).view_as(out.pooled)
    total = (out.cross_entropy * 2 - out.entropy).sum() + (out.pooled * factor).sum()
    return Result(tuple(t.detach() for t in out), torch.autograd.grad(total, leaf))


def assert_like_reference(found: Result, expected: Result, bound: float) -> None:
    for i, (a, e) in enumerate(
        zip(found.outputs + found.gradients, expected.outputs + expected.gradients, strict=True)
    ):
        assert_matches(f"tensor {i}", a, e, atol=0, rtol=bound)


@needs_extension
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_every_instruction_set(
    monkeypatch: pytest.MonkeyPatch, instructions: str, dtype: torch.dtype, bound: float
) -> None:
    """Those that the processor lacks fall back to narrower ones. The bounds: some 20 eps of sums of 1e4 terms."""
    logits, labels, options = large_inputs(dtype)
    with ck.use_backend("reference"):
        expected = run_large(logits.double(), labels, options)
    monkeypatch.setenv("CC4S_KERNELS_CPU", instructions)
    with ck.use_backend("cpu"):
        assert_like_reference(run_large(logits, labels, options), expected, bound)


@needs_extension
def test_every_number_of_threads_gives_the_same() -> None:
    inputs = large_inputs()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            with ck.use_backend("cpu"):
                results.append(run_large(*inputs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result.outputs + result.gradients, results[0].outputs + results[0].gradients, strict=True):
            assert torch.equal(a, b)


@needs_extension
def test_many_classes_on_the_cpu() -> None:
    logits, labels, options = large_inputs(classes=301)
    labels = labels.where(labels != 255, -1)
    with ck.use_backend("reference"):
        expected = run_large(logits.double(), labels, {**options, "ignore_index": -1})
    with ck.use_backend("cpu"):
        assert_like_reference(run_large(logits, labels, {**options, "ignore_index": -1}), expected, 3e-6)


@needs_extension
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("low", "size"),
    [((1, 1), (40, 70)), ((2, 1), (300, 3)), ((33, 40), (33, 40)), ((70, 90), (9, 7)), ((5, 40), (50, 41))],
)
def test_sizes_on_the_cpu(low: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    random = generator(1)
    logits = randn(2, 3, *low, dtype=torch.float64, device="cpu", seed=0)
    labels = torch.randint(0, 3, (2, *size), generator=random)
    ids = torch.randint(-1, 5, (2, *size), generator=random)
    options = {"superpixels": ids, "num_superpixels": 5, "align_corners": align_corners, "weight": None}
    with ck.use_backend("reference"):
        expected = run_large(logits, labels, options)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        with ck.use_backend("cpu"):
            assert_like_reference(run_large(logits.to(dtype), labels, options), expected, bound)


@needs_extension
def test_double_backward_on_the_cpu_names_the_reference() -> None:
    logits, labels, options = large_inputs()
    logits.requires_grad_()
    with ck.use_backend("cpu"):
        out = ck.upsample_losses(logits, labels, **options)
        (gradient,) = torch.autograd.grad(out.entropy.sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*use_backend\('reference'\)"):
            gradient.square().sum().backward()


@needs_extension
def test_no_memory_of_the_upsampled_size() -> None:
    """The process grows by less than a sixteenth of the upsampled logits, 256 MiB; allocations of C++ count."""
    code = """
import torch, cc4s_kernels as ck
from tests.peak_memory import grown_mb
def case(classes, low, size):
    logits = torch.randn(1, classes, low, low, requires_grad=True)
    labels = torch.ones(1, size, size, dtype=torch.uint8)
    ids = torch.arange(size, dtype=torch.int32).expand(1, size, size).contiguous()
    def run():
        out = ck.upsample_losses(logits, labels, superpixels=ids, num_superpixels=size)
        (out.cross_entropy.sum() + out.entropy.sum() + out.pooled.square().sum()).backward()
    return run
with ck.use_backend("cpu"):
    case(2, 4, 32)()
    print(grown_mb(case(64, 32, 1024)))
print(grown_mb(lambda: torch.ones(64, 1024, 1024)))
"""
    ours, whole = map(float, printed_by(code).split())
    assert whole >= 250, "the measure does not see an allocation"
    assert ours < 16, f"{ours:.1f} MiB"
