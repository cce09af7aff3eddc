"""The Triton backend of `upsample_losses`: what the battery of the op leaves out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cc4s_kernels as ck
from cc4s_kernels import _triton
from tests.ops.test_upsample_losses import assert_like_reference, run_large, source_position
from tests.ops.tester import Result, generator, map_tensors, randn, tensors

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.triton_interpreter),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def call(low: tuple[int, int], size: tuple[int, int], classes: int = 3, seed: int = 0) -> tuple[Any, ...]:
    """Float64 logits, labels, and options with all maps: half of the pixels labelled, 6 superpixels."""
    random = generator(seed)
    labels = torch.randint(0, classes, (2, *size), generator=random)
    labels = labels.where(torch.rand(labels.shape, generator=random) < 0.5, -1)
    return (
        randn(2, classes, *low, dtype=torch.float64, device="cpu", seed=seed, scale=3),
        labels,
        {
            "weight": torch.rand(2, *size, generator=random, dtype=torch.float64),
            "superpixels": torch.randint(-1, 6, (2, *size), generator=random),
            "num_superpixels": 6,
            "class_weight": torch.rand(classes, generator=random, dtype=torch.float64),
            "ignore_index": -1,
        },
    )


def run(backend: str, device: str, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Result:
    logits, labels, options = map_tensors(lambda t: t.to(device), (logits, labels, options))
    with ck.use_backend(backend):
        return run_large(logits, labels, options)


def assert_right(device: str, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
    """The bounds: sums of up to 2e3 terms, relative to the largest."""
    expected = run("reference", "cpu", logits, labels, options)
    found = run("triton", device, logits, labels, options)
    assert_like_reference(Result(*map_tensors(lambda t: t.cpu(), found)), expected, 1e-12)
    found = run("triton", device, logits.float(), labels, options)
    assert_like_reference(Result(*map_tensors(lambda t: t.cpu(), found)), expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("low", "size"),
    # One position, one row, identity, down, one pixel, and up by a factor that is no integer.
    [((1, 1), (19, 20)), ((1, 4), (7, 30)), ((9, 8), (9, 8)), ((23, 30), (9, 7)), ((3, 4), (1, 1)), ((5, 7), (33, 16))],
)
def test_sizes(device: str, low: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    logits, labels, options = call(low, size)
    assert_right(device, logits, labels, {**options, "align_corners": align_corners})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [2, 300])
def test_numbers_of_classes(device: str, classes: int) -> None:
    """300: several tiles of classes to a pixel, on every device."""
    assert_right(device, *call((3, 4), (9, 10), classes))


@pytest.mark.parametrize("device", DEVICES)
def test_one_class(device: str) -> None:
    """It has probability 1: nothing is lost, and no logit has a gradient but for rounding of weights of about 1."""
    logits, labels, options = call((3, 4), (9, 10), 1)
    found = run("triton", device, logits, labels, options)
    cross_entropy, _, entropy, _, pooled, counts = (t.cpu() for t in found.outputs)
    assert cross_entropy.tolist() == entropy.tolist() == [0, 0]
    torch.testing.assert_close(pooled[..., 0], counts, rtol=1e-12, atol=0)
    assert float(found.gradients[0].abs().max()) < 1e-14


@pytest.mark.parametrize("device", DEVICES)
def test_a_quad_of_many_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cc4s_kernels.ops.upsample_losses import triton

    monkeypatch.setattr(triton, "STEPS", 1)
    logits, labels, options = call((2, 1), (41, 43))
    plan = triton.Plan.of("upsample_losses", logits.to(device), labels, True)
    assert plan.parts > 1
    assert_right(device, logits, labels, options)


@pytest.mark.parametrize("device", DEVICES)
def test_wide_indices_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """int64 inside an image too, as for sizes that no test could hold."""
    import triton.language as tl

    from cc4s_kernels.ops.upsample_losses import triton

    arguments = call((4, 5), (13, 11))
    narrow = run("triton", device, *arguments)
    monkeypatch.setattr(triton.Plan, "index_type", lambda *_: tl.int64)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(narrow), tensors(run("triton", device, *arguments)), strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_of_maps_agree(device: str) -> None:
    logits, labels, options = call((3, 4), (9, 10))
    logits = logits.float()
    options = {**options, "weight": options["weight"] < 0.5}
    labels = labels.where(labels >= 0, 255)
    options["ignore_index"] = 255
    expected = run("triton", device, logits, labels, options)
    for label, ids, weight in (
        (torch.uint8, torch.int16, torch.float16),
        (torch.int16, torch.int32, torch.bfloat16),
        (torch.int32, torch.int64, torch.float64),
    ):
        changed = {**options, "superpixels": options["superpixels"].to(ids), "weight": options["weight"].to(weight)}
        found = run("triton", device, logits, labels.to(label), changed)
        assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(device: str, dtype: torch.dtype) -> None:
    logits, labels, options = call((3, 4), (9, 10))
    found = run("triton", device, logits.to(dtype), labels, options)
    expected = run("triton", device, logits.to(dtype).float(), labels, options)
    assert all(torch.equal(a, b) for a, b in zip(found.outputs, expected.outputs, strict=True))
    assert torch.equal(found.gradients[0], expected.gradients[0].to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_values_are_ignored(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the classes and ids, beyond int32, and such that int32 would make them valid."""
    monkeypatch.setattr("cc4s_kernels.ops.upsample_losses.may_read_values", lambda tensor: False)
    logits, labels, options = call((3, 4), (9, 10))
    wrong = torch.tensor([-7, 10**6, 2**31, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -(2**63)]).repeat(26)[: labels.numel()]
    wrong = wrong.view_as(labels)
    ids = options["superpixels"]
    bad = {**options, "superpixels": ids.where(ids != -1, wrong)}
    # The class and the id behind the last are wrong too.
    wrong[0], bad["superpixels"][0] = 3, ids[0].where(ids[0] != -1, 6)
    found = run("triton", device, logits, labels.where(labels != -1, wrong), bad)
    expected = run("triton", device, logits, labels, options)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_see_is_exactly_zero(device: str) -> None:
    """The left half of the pixels has no label, weight or superpixel: nothing moves the logits left of them."""
    logits, labels, options = call((4, 9), (17, 33))
    left = torch.arange(33) < 16
    labels[:, :, left], options["weight"][:, :, left], options["superpixels"][:, :, left] = -1, 0, -1
    gradient = run("triton", device, logits, labels, options).gradients[0].cpu()
    # Four pixels to a quad: column 16 has its source at position 4.
    assert bool((gradient[..., :4] == 0).all())
    assert bool((gradient[..., 4:] != 0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_confident_logits(device: str) -> None:
    """Probabilities of exactly 0 and 1, and an exact tie, at pixels that have a logit of their own."""
    logits = torch.tensor([1e4, -1e4, 0.0, 0.5, 1e4, 0.5]).view(1, 2, 3, 1).expand(1, 2, 3, 2)
    labels = torch.tensor([[0, -1], [1, -1], [0, 1]])[None]
    options = {"superpixels": torch.zeros(1, 3, 2, dtype=torch.int32), "num_superpixels": 1, "ignore_index": -1}
    out = run("triton", device, logits, labels, options)
    cross_entropy, labelled, entropy, _, pooled, counts = (t.cpu() for t in out.outputs)
    expected = run("reference", "cpu", logits.double(), labels, options)
    assert_like_reference(
        Result((cross_entropy, labelled, entropy, pooled, counts), tuple(g.cpu() for g in out.gradients)),
        Result(tuple(expected.outputs[i] for i in (0, 1, 2, 4, 5)), expected.gradients),
        1e-6,
    )


class _Largest(TorchDispatchMode):
    """The most bytes that any result of a torch op has, new or a view."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(t.nbytes for t in tensors(out))])
        return out


@pytest.mark.parametrize("device", DEVICES)
def test_no_tensor_of_the_upsampled_size(device: str) -> None:
    from cc4s_kernels.ops.upsample_losses import triton

    logits, labels, options = call((5, 6), (33, 41), classes=30)
    maps = (options["weight"], options["superpixels"], options["class_weight"])
    arguments = map_tensors(lambda t: t.to(device), (logits.float(), labels, *maps, 6, -1, True))
    with _Largest() as seen:
        # Under the torch ops, where a mode looks.
        sums = triton.forward(*arguments)
        triton.backward(sums[0], sums[2], sums[4], *arguments)
    # What the corners of 4 x 5 quads get, or an int64 map of pixels; the upsampled logits have 324,720 bytes.
    assert seen.bytes <= max(2 * 4 * 20 * 30 * 4, labels.nbytes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(size=st.integers(1, 70), out=st.integers(1, 90), align_corners=st.booleans())
def test_every_pixel_is_in_the_quad_of_its_source(size: int, out: int, align_corners: bool) -> None:
    from cc4s_kernels.ops.upsample_losses.triton import Axis

    axis = Axis.of(size, out, align_corners)
    first = [axis.first(quad) for quad in range(axis.quads + 1)]
    assert first[0] == 0
    assert first[-1] == out
    assert max(b - a for a, b in pairwise(first)) <= axis.most <= out
    for quad, (begin, end) in enumerate(pairwise(first)):
        for i in range(begin, end):
            position = min(max(axis.step * i + axis.offset, 0), axis.limit) / axis.whole
            # Positions behind the last of the logits are that one: source_position leaves them to its caller.
            assert position == pytest.approx(min(source_position(i, size, out, align_corners), size - 1), abs=1e-12)
            assert quad <= position <= quad + 1


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_triton, "missing", lambda: None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    logits, labels = torch.zeros(1, 2, 3, 3, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.uint8)
    assert ck.explain("upsample_losses", logits, labels).reasons["triton"] == "logits is on cpu"
    large = labels.expand(1, 2**16, 2**15)
    reason = ck.explain("upsample_losses", logits, large).reasons["triton"]
    assert reason == "labels have 65536 x 32768 pixels, the Triton kernels take less than 2^31"
    capsys.readouterr()
