"""The losses of `cc4s_kernels.nn` against compositions of torch.nn.functional and dense matrices."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cc4s_kernels as ck
from cc4s_kernels.nn import Counts
from tests.ops.tester import CountingBackend

CLASSES = 4
SUPERPIXELS = 12


class Batch(NamedTuple):
    logits: Tensor
    labels: Tensor
    image: Tensor
    superpixels: Tensor
    mask: Tensor

    def part(self, images: slice) -> Batch:
        return Batch(*(t[images] for t in self))


def grid_superpixels(size: int) -> Tensor:
    """(size, size) int32: a 3 x 4 grid of rectangles."""
    y, x = torch.arange(size) * 3 // size, torch.arange(size) * 4 // size
    return (4 * y[:, None] + x).int()


def make_batch(images: int = 3, size: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Sparse labels (the last image has none), noisy rectangles, padding at the right of the first image."""
    random = torch.Generator().manual_seed(seed)
    superpixels = grid_superpixels(size).expand(images, -1, -1).clone()
    colors = torch.randint(0, 150, (images, SUPERPIXELS, 3), generator=random)
    image = torch.stack([c[s.long()] for c, s in zip(colors, superpixels, strict=True)]).permute(0, 3, 1, 2)
    image = image + torch.randint(0, 100, image.shape, generator=random)
    labels = torch.randint(0, CLASSES, (images, size, size), generator=random)
    labels = labels.where(torch.rand(labels.shape, generator=random) < 0.2, 255)
    labels[-1] = 255
    mask = torch.ones(images, size, size, dtype=torch.bool)
    mask[0, :, size - 5 :] = False
    logits = 2 * torch.randn(images, CLASSES, size // 4, size // 3, generator=random, dtype=torch.float64)
    return Batch(logits.to(dtype).requires_grad_(), labels.to(torch.uint8), image.to(torch.uint8), superpixels, mask)


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)


def pixel_entropy(logits: Tensor, size: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=upsampled(logits, size).movedim(1, -1)).entropy()


def default_map(superpixels: Tensor, mask: Tensor) -> Tensor:
    """docs/method.md section 4, pixel by pixel."""
    ids = superpixels.masked_fill(~mask, -1)
    height, width = ids.shape[1:]
    m = torch.zeros(ids.shape, dtype=torch.float64)
    for b in range(ids.shape[0]):
        grid = ids[b].tolist()
        for i in range(height):
            for j in range(width):
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                same = all(grid[y][x] == grid[i][j] for y, x in around if 0 <= y < height and 0 <= x < width)
                m[b, i, j] = float(grid[i][j] >= 0 and same)
    return m


def color_by_matrix(batch: Batch, norm: str, mask: Tensor | None = None) -> Tensor:
    """(B,) L_color as the quadratic form (2 / norm) tr(Sᵀ Lap S) with dense matrices."""
    superpixels = batch.superpixels if mask is None else batch.superpixels.masked_fill(~mask, -1)
    graph = ck.color_affinity(batch.image, superpixels, SUPERPIXELS)
    prob = upsampled(batch.logits, batch.labels).softmax(1)
    energies = []
    for b in range(prob.shape[0]):
        w = torch.zeros(SUPERPIXELS, SUPERPIXELS, dtype=torch.float64)
        for e in range(int(graph.num_edges[b])):
            i, j = graph.edge_index[b, :, e].tolist()
            w[i, j] = w[j, i] = graph.weight[b, e].double()
        present = [bool((superpixels[b] == k).any()) for k in range(SUPERPIXELS)]
        s = torch.stack(
            [
                prob[b][:, superpixels[b] == k].mean(1) if there else torch.zeros(CLASSES)
                for k, there in enumerate(present)
            ]
        )
        scale = w.sum() if norm == "sum" else w.norm()
        energies.append(2 / scale * torch.trace(s.T @ (torch.diag(w.sum(1)) - w) @ s))
    return torch.stack(energies)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


def assert_same(loss: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Values and gradients; float64, so differences are rounding only."""
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


# ---- partial cross-entropy


@pytest.mark.parametrize("class_weight", [None, [0.5, 2.0, 0.0, 1.0]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_that_of_torch(reduction: str, class_weight: list[float] | None) -> None:
    batch = make_batch()
    loss = ck.nn.PartialCrossEntropyLoss(reduction=reduction, class_weight=class_weight)
    weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
    expected = F.cross_entropy(
        upsampled(batch.logits, batch.labels),
        batch.labels.long(),
        weight,
        ignore_index=255,
        reduction=reduction,
    )
    assert_same(loss(batch.logits, batch.labels), expected, batch.logits)


def test_cross_entropy_of_each_image() -> None:
    batch = make_batch()
    each = ck.nn.PartialCrossEntropyLoss(reduction="none")(batch.logits, batch.labels)
    assert each.shape == (3,)
    assert each[-1] == 0
    assert_same(each.sum(), ck.nn.PartialCrossEntropyLoss(reduction="sum")(batch.logits, batch.labels), batch.logits)


@pytest.mark.parametrize("ignore_index", [255, -100])
def test_labels_outside_the_mask_do_not_count(ignore_index: int) -> None:
    batch = make_batch()
    labels = batch.labels.where(batch.labels != 255, 0)
    inside = labels.long().masked_fill(~batch.mask, -100)
    expected = F.cross_entropy(upsampled(batch.logits, labels), inside, ignore_index=-100)
    loss = ck.nn.PartialCrossEntropyLoss(ignore_index=ignore_index)
    assert_same(loss(batch.logits, labels, batch.mask), expected, batch.logits)
    assert loss.count(labels, batch.mask).item() == batch.mask.sum().item()


# ---- soft entropy


def test_entropy_is_a_weighted_mean() -> None:
    batch = make_batch()
    weight = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    entropy = pixel_entropy(batch.logits, batch.labels)
    loss = ck.nn.SoftEntropyLoss()
    assert_same(loss(batch.logits, weight), (weight * entropy).sum() / weight.sum(), batch.logits)
    assert_same(loss(batch.logits, size=(24, 24)), entropy.mean(), batch.logits)
    inside = weight * batch.mask
    assert_same(loss(batch.logits, weight, mask=batch.mask), (inside * entropy).sum() / inside.sum(), batch.logits)
    assert_same(loss(batch.logits), pixel_entropy(batch.logits, batch.logits).mean(), batch.logits)
    each = ck.nn.SoftEntropyLoss(reduction="none")(batch.logits, weight)
    assert_same(each, (weight * entropy).sum((1, 2)), batch.logits)


def test_entropy_is_off_on_boundaries_and_padding_by_default() -> None:
    batch = make_batch()
    m = default_map(batch.superpixels, batch.mask)
    assert 0 < m.mean() < 1
    loss = ck.nn.SoftEntropyLoss()
    expected = (m * pixel_entropy(batch.logits, batch.labels)).sum() / m.sum()
    assert_same(loss(batch.logits, superpixels=batch.superpixels, mask=batch.mask), expected, batch.logits)
    assert loss.count(superpixels=batch.superpixels, mask=batch.mask).item() == m.sum().item()


def test_entropy_of_more_than_255_classes() -> None:
    logits = torch.randn(1, 300, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ck.nn.SoftEntropyLoss()(logits), pixel_entropy(logits, logits).mean())


# ---- colour constraint


@pytest.mark.parametrize("norm", ["sum", "frobenius"])
def test_color_is_the_quadratic_form(norm: str) -> None:
    batch = make_batch()
    expected = color_by_matrix(batch, norm)
    assert bool((expected > 0).all())
    options: dict[str, Any] = {"num_superpixels": SUPERPIXELS, "norm": norm}
    loss = ck.nn.ColorConstraintLoss(**options)
    # 1e-6: the weights of the graph and their sum are float32.
    got = loss(batch.logits, batch.image, batch.superpixels)
    torch.testing.assert_close(got, expected.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient(got, batch.logits), gradient(expected.mean(), batch.logits), rtol=1e-5, atol=1e-9
    )
    each = ck.nn.ColorConstraintLoss(**options, reduction="none")
    torch.testing.assert_close(
        each(batch.logits, batch.image, batch.superpixels, batch.mask),
        color_by_matrix(batch, norm, batch.mask),
        rtol=1e-6,
        atol=0,
    )


def test_color_computes_superpixels_of_the_image() -> None:
    batch = make_batch()
    loss = ck.nn.ColorConstraintLoss(num_superpixels=20, compactness=5.0)
    superpixels = ck.slic(batch.image, 20, compactness=5.0, mask=batch.mask)
    expected = loss(batch.logits, batch.image, superpixels)
    assert torch.equal(loss(batch.logits, batch.image, mask=batch.mask), expected)
    # A float image means [0, 1].
    assert torch.equal(loss(batch.logits, batch.image.float() / 255, superpixels), expected)


def test_color_of_a_grey_image() -> None:
    batch = make_batch()
    grey = batch.image[:, :1]
    loss = ck.nn.ColorConstraintLoss(num_superpixels=20)
    assert torch.equal(loss(batch.logits, grey), loss(batch.logits, grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("relaxation", ["quadratic", "collision_cross_entropy"])
def test_color_without_an_edge_is_zero(relaxation: str) -> None:
    batch = make_batch()
    one = torch.zeros_like(batch.superpixels)
    loss = ck.nn.ColorConstraintLoss(num_superpixels=SUPERPIXELS, relaxation=relaxation)
    for superpixels in (one, one - 1):
        value = loss(batch.logits, batch.image, superpixels)
        assert value.item() == 0
        assert not gradient(value, batch.logits).any()


def test_constant_prediction_has_no_color_loss() -> None:
    batch = make_batch()
    constant = batch.logits.detach()[:, :, :1, :1].expand_as(batch.logits)
    value = ck.nn.ColorConstraintLoss(num_superpixels=20)(constant, batch.image)
    # Rounding of equal probabilities, squared.
    assert 0 <= value.item() < 1e-25


# ---- all in one


def separate(batch: Batch, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        ck.nn.PartialCrossEntropyLoss(**options)(batch.logits, batch.labels, batch.mask),
        ck.nn.SoftEntropyLoss(**options)(batch.logits, superpixels=batch.superpixels, mask=batch.mask),
        ck.nn.ColorConstraintLoss(SUPERPIXELS, **options)(batch.logits, batch.image, batch.superpixels, batch.mask),
    )


def scribble_loss(**options: Any) -> ck.nn.ScribbleLoss:
    return ck.nn.ScribbleLoss(1.0, 0.5, 3.0, num_superpixels=SUPERPIXELS, **options)


def maps(batch: Batch) -> dict[str, Any]:
    return {"superpixels": batch.superpixels, "mask": batch.mask}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scribble_loss_is_the_sum_of_its_parts(reduction: str) -> None:
    batch = make_batch()
    loss = scribble_loss(reduction=reduction)
    terms = loss.terms(batch.logits, batch.labels, batch.image, **maps(batch))
    parts = separate(batch, reduction=reduction)
    for name, got, expected in zip(terms._fields[1:], terms[1:], parts, strict=True):
        assert torch.equal(got, expected), name
    assert_same(terms.total, parts[0] + 0.5 * parts[1] + 3 * parts[2], batch.logits)
    assert torch.equal(loss(batch.logits, batch.labels, batch.image, **maps(batch)), terms.total)


def test_scribble_loss_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ck.upsample_losses(*args, **kwargs)

    monkeypatch.setattr("cc4s_kernels.nn.losses.upsample_losses", counted)
    batch = make_batch()
    scribble_loss()(batch.logits, batch.labels, batch.image, **maps(batch))
    assert len(calls) == 1


def test_scribble_loss_without_color_needs_no_image() -> None:
    batch = make_batch()
    terms = ck.nn.ScribbleLoss(color=0).terms(batch.logits, batch.labels)
    assert terms.color.item() == 0
    ce = ck.nn.PartialCrossEntropyLoss()(batch.logits, batch.labels)
    entropy = ck.nn.SoftEntropyLoss()(batch.logits, size=(24, 24))
    assert_same(terms.total, ce + entropy, batch.logits)
    with pytest.raises(ValueError, match=r"image: got None, .*color=1\.0"):
        ck.nn.ScribbleLoss()(batch.logits, batch.labels)


def test_scribble_loss_computes_superpixels_once_for_all_terms() -> None:
    batch = make_batch()
    loss = ck.nn.ScribbleLoss(num_superpixels=15)
    superpixels = ck.slic(batch.image, 15, mask=batch.mask)
    a = loss.terms(batch.logits, batch.labels, batch.image, mask=batch.mask)
    b = loss.terms(batch.logits, batch.labels, batch.image, superpixels=superpixels, mask=batch.mask)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    counts = loss.counts(batch.labels, batch.image, mask=batch.mask)
    assert [float(c) for c in counts] == [
        float(((batch.labels != 255) & batch.mask).sum()),
        float(default_map(superpixels, batch.mask).sum()),
        3.0,
    ]


def test_given_entropy_map_replaces_the_default() -> None:
    batch = make_batch()
    weight = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = scribble_loss().terms(batch.logits, batch.labels, batch.image, weight=weight, **maps(batch))
    expected = ck.nn.SoftEntropyLoss()(batch.logits, weight, mask=batch.mask)
    assert torch.equal(terms.entropy, expected)
    counts = scribble_loss().counts(batch.labels, batch.image, weight=weight, **maps(batch))
    assert float(counts.weight) == pytest.approx(float((weight * batch.mask).sum()), rel=1e-6)


def test_padding_changes_nothing() -> None:
    """Labels, colours, ids and (without upsampling) logits under a False mask have no influence."""
    batch = make_batch()
    full = upsampled(batch.logits, batch.labels).detach()
    random = torch.Generator().manual_seed(5)
    outside = ~batch.mask
    changed = Batch(
        full.masked_scatter(outside[:, None].expand_as(full), torch.randn(10**4, generator=random).double()),
        batch.labels.masked_fill(outside, 1),
        batch.image.masked_fill(outside[:, None], 200),
        batch.superpixels.masked_fill(outside, 3),
        batch.mask,
    )
    loss = scribble_loss()
    expected = loss.terms(full, batch.labels, batch.image, **maps(batch))
    got = loss.terms(changed.logits, changed.labels, changed.image, **maps(changed))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_nothing_to_learn_from_gives_zero() -> None:
    batch = make_batch()
    loss = scribble_loss()
    nowhere = torch.zeros_like(batch.mask)
    for inputs in (
        {"superpixels": batch.superpixels, "mask": nowhere},
        {"superpixels": torch.full_like(batch.superpixels, -1), "weight": nowhere},
    ):
        labels = torch.full_like(batch.labels, 255)
        value = loss(batch.logits, labels, batch.image, **inputs)
        assert value.item() == 0
        assert not gradient(value, batch.logits).any()
        assert [float(c) for c in loss.counts(labels, batch.image, **inputs)] == [0, 0, 3]


def test_empty_batch_gives_zero() -> None:
    batch = make_batch().part(slice(0, 0))
    value = scribble_loss()(batch.logits, batch.labels, batch.image, **maps(batch))
    assert value.item() == 0


def test_gradcheck() -> None:
    batch = make_batch(size=12)
    loss = scribble_loss()
    assert torch.autograd.gradcheck(lambda logits: loss(logits, batch.labels, batch.image, **maps(batch)), batch.logits)


def test_half_precision_logits_and_autocast() -> None:
    batch = make_batch(dtype=torch.bfloat16)
    loss = scribble_loss(class_weight=[1.0, 2.0, 3.0, 4.0])
    wide = batch._replace(logits=batch.logits.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(batch.logits, batch.labels, batch.image, **maps(batch))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(wide.logits, wide.labels, wide.image, **maps(wide)))


@pytest.mark.parametrize("given_superpixels", [True, False])
def test_compiles_without_graph_breaks(given_superpixels: bool) -> None:
    batch = make_batch(dtype=torch.float32)
    loss = scribble_loss()
    inputs = maps(batch) if given_superpixels else {"mask": batch.mask}
    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    got = compiled(batch.logits, batch.labels, batch.image, **inputs)
    expected = loss(batch.logits, batch.labels, batch.image, **inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, batch.logits), gradient(expected, batch.logits))
    assert (counter.forward, counter.backward) == (1, 1)


# ---- Potts


@pytest.mark.parametrize("relaxation", ["quadratic", "bilinear", "log_quadratic"])
def test_potts_on_superpixels_is_the_color_loss(relaxation: str) -> None:
    batch = make_batch()
    graph = ck.color_affinity(batch.image, batch.superpixels, SUPERPIXELS)
    potts = ck.nn.PottsLoss(relaxation=relaxation)(batch.logits, graph, superpixels=batch.superpixels)
    color = ck.nn.ColorConstraintLoss(SUPERPIXELS, relaxation=relaxation)
    assert potts.item() > 0
    torch.testing.assert_close(color(batch.logits, batch.image, batch.superpixels), potts)


def test_potts_on_a_grid_is_a_mean_of_squared_differences() -> None:
    batch = make_batch()
    prob = upsampled(batch.logits, batch.labels).softmax(1)
    across = (prob[..., 1:] - prob[..., :-1]).square().sum(1).flatten(1)
    down = (prob[..., 1:, :] - prob[..., :-1, :]).square().sum(1).flatten(1)
    expected = torch.cat([across, down], 1).mean(1)
    grid = ck.pixel_grid(24, 24)
    assert_same(ck.nn.PottsLoss(reduction="none")(batch.logits, grid), expected, batch.logits)
    loss = ck.nn.PottsLoss()
    assert_same(loss(batch.logits, grid), expected.mean(), batch.logits)
    assert_same(loss(batch.logits, grid, normalizer=6), expected.sum() / 6, batch.logits)
    assert loss.count(batch.logits).item() == 3
    with pytest.raises(ValueError, match="superpixels: got a tensor with a grid"):
        loss(batch.logits, grid, batch.superpixels)
    with pytest.raises(TypeError, match="graph_or_grid: got int"):
        loss(batch.logits, 4)
    graph = ck.color_affinity(batch.image, batch.superpixels, SUPERPIXELS)
    with pytest.raises(TypeError, match="superpixels: got NoneType"):
        loss(batch.logits, graph)


# ---- gated CRF


def test_gated_crf_is_a_mean_over_images() -> None:
    batch = make_batch()
    prob = upsampled(batch.logits, batch.labels).softmax(1)
    unlabelled = batch.labels == 255
    options = {"radius": 3, "sigma_xy": 4.0, "sigma_rgb": 0.2}
    expected = ck.gated_crf(prob, batch.image, **options, mask=batch.mask, destination=unlabelled)

    def loss(**kwargs: Any) -> Tensor:
        made = ck.nn.GatedCRFLoss(**options, **kwargs)
        return made(batch.logits, batch.image, batch.mask, destination=unlabelled)

    assert_same(loss(reduction="none"), expected, batch.logits)
    assert_same(loss(), expected.mean(), batch.logits)
    assert_same(loss(normalizer=6), expected.sum() / 6, batch.logits)
    assert ck.nn.GatedCRFLoss().count(batch.logits).item() == 3
    with pytest.raises(ValueError, match=r"image: got .*the pixels of prob"):
        ck.nn.GatedCRFLoss()(batch.logits, batch.image[:1])


# ---- tree energy


@pytest.mark.parametrize("detach", [True, False])
def test_tree_energy_is_the_distance_to_two_filters(detach: bool) -> None:
    batch = make_batch()
    prob = batch.logits.softmax(1)
    size = prob.shape[2:]
    image = batch.image.double() / 255
    features = torch.randn(3, 5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unlabelled = torch.ones(3, *size, dtype=torch.bool)
    unlabelled[0, :, 2:] = False
    unlabelled[1] = False
    low = ck.tree_filter(prob, F.interpolate(image, size, mode="bilinear"), sigma=0.3)
    pseudo = ck.tree_filter(low, features, sigma=1.0)
    pseudo = pseudo.detach() if detach else pseudo
    count = unlabelled.sum((1, 2)).clamp(min=1)
    expected = ((prob - pseudo).abs().sum(1) * unlabelled).sum((1, 2)) / count

    def loss(**options: Any) -> Tensor:
        made = ck.nn.TreeEnergyLoss(0.3, detach=detach, **options)
        return made(batch.logits, batch.image, features, unlabelled=unlabelled)

    assert expected[1] == 0
    assert expected[0] > 0
    assert_same(loss(reduction="none"), expected, batch.logits)
    assert_same(loss(), expected.mean(), batch.logits)
    assert_same(loss(normalizer=6), expected.sum() / 6, batch.logits)
    assert ck.nn.TreeEnergyLoss().count(batch.logits).item() == 3


# ---- the global batch


def whole_gradient(batch: Batch, loss: nn.Module) -> Tensor:
    return gradient(loss(batch.logits, batch.labels, batch.image, **maps(batch)), batch.logits)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 1000))
def test_micro_batches_add_up_to_the_batch(cuts: list[int], seed: int) -> None:
    """However a batch of five is cut, into empty parts too."""
    batch = make_batch(5, size=12, seed=seed)
    loss = scribble_loss(class_weight=[1.0, 0.5, 2.0, 3.0])
    edges = [0, *sorted(cuts), 5]
    parts = [batch.part(slice(a, b)) for a, b in itertools.pairwise(edges)]
    counts = [loss.counts(p.labels, p.image, **maps(p)) for p in parts]
    normalizer = ck.nn.global_counts(counts)
    losses = [loss(p.logits, p.labels, p.image, **maps(p), normalizer=normalizer) for p in parts]
    total = torch.stack(losses).sum()
    # 1e-6: the counts are float32.
    expected = loss(batch.logits, batch.labels, batch.image, **maps(batch))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(total, batch.logits), whole_gradient(batch, loss), rtol=1e-5, atol=1e-10)


def test_normalizers_of_single_losses() -> None:
    batch = make_batch()
    ce = ck.nn.PartialCrossEntropyLoss()
    entropy = ck.nn.SoftEntropyLoss()
    color = ck.nn.ColorConstraintLoss(SUPERPIXELS)
    expected = separate(batch)
    counts = (
        ce.count(batch.labels, batch.mask),
        entropy.count(superpixels=batch.superpixels, mask=batch.mask),
        color.count(batch.image),
    )
    for factor in (1, 4):
        ce.normalizer, entropy.normalizer, color.normalizer = (factor * float(c) for c in counts)
        got = (
            ce(batch.logits, batch.labels, batch.mask),
            entropy(batch.logits, superpixels=batch.superpixels, mask=batch.mask),
            color(batch.logits, batch.image, batch.superpixels, batch.mask),
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(factor * a, b)
    # That of forward wins; 0 gives 0, with gradient 0.
    value = ce(batch.logits, batch.labels, batch.mask, normalizer=torch.zeros(()))
    assert value.item() == 0
    assert not gradient(value, batch.logits).any()
    assert ce(batch.logits, batch.labels, batch.mask, normalizer=2 * counts[0]).item() == pytest.approx(
        expected[0].item() / 2
    )


def test_global_count_in_one_process_is_a_copy() -> None:
    count = torch.tensor([3.0, 4.0])
    total = ck.nn.global_count(count)
    assert torch.equal(total, count)
    assert total.data_ptr() != count.data_ptr()


class Net(nn.Module):
    """A small network without batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, CLASSES, 3, 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.double() / 255)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def backward_of_parts(net: nn.Module, parts: list[Batch]) -> float:
    """One step: counts of all micro-batches, then one backward pass each. Returns the sum of the losses."""
    loss = scribble_loss()
    normalizer = ck.nn.global_counts([loss.counts(p.labels, p.image, **maps(p)) for p in parts])
    total = 0.0
    for i, p in enumerate(parts):
        last = i == len(parts) - 1
        distributed = isinstance(net, nn.parallel.DistributedDataParallel)
        with net.no_sync() if distributed and not last else torch.enable_grad():
            value = loss(net(p.image), p.labels, p.image, **maps(p), normalizer=normalizer)
            value.backward()
        total += value.item()
    return total


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    # The network is freed at the end of the call: a wrapper that outlives its group can wait for ever.
    save_gradients(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save_gradients(rank: int, folder: str) -> None:
    net = nn.parallel.DistributedDataParallel(make_net())
    batch = make_batch(6)
    # Uneven: the first image, on rank 0, has padding, and the last, on rank 1, has no label.
    cuts = ((0, 1), (1, 3)) if rank == 0 else ((3, 5), (5, 6))
    value = backward_of_parts(net, [batch.part(slice(*cut)) for cut in cuts])
    torch.save({"loss": value, "gradients": [p.grad for p in net.parameters()]}, f"{folder}/rank{rank}.pt")


def test_two_processes_and_accumulation_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    net = make_net()
    batch = make_batch(6)
    loss = scribble_loss()
    value = loss(net(batch.image), batch.labels, batch.image, **maps(batch))
    value.backward()
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    # The mean over the processes is the loss of the batch. 1e-6: the counts are float32.
    assert sum(f["loss"] for f in found) / 2 == pytest.approx(value.item(), rel=1e-6)
    for f in found:
        for got, parameter in zip(f["gradients"], net.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-6, atol=1e-9)


# ---- modules


def test_modules_are_modules() -> None:
    loss = ck.nn.ScribbleLoss(color=0, class_weight=torch.tensor([1.0, 2.0]))
    assert list(loss.state_dict()) == ["class_weight"]
    assert not list(loss.parameters())
    moved = copy.deepcopy(loss).double()
    assert moved.class_weight is not None
    assert moved.class_weight.dtype == torch.float64
    assert "color=0" in repr(loss)
    for name in (
        "PartialCrossEntropyLoss",
        "SoftEntropyLoss",
        "ColorConstraintLoss",
        "PottsLoss",
        "GatedCRFLoss",
        "TreeEnergyLoss",
    ):
        assert "reduction='mean'" in repr(getattr(ck.nn, name)())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ck.nn.PartialCrossEntropyLoss(reduction="avg"), ValueError, "reduction: got 'avg'"),
        (lambda: ck.nn.PartialCrossEntropyLoss(ignore_index="255"), TypeError, "ignore_index: got str"),
        (lambda: ck.nn.PartialCrossEntropyLoss(class_weight=[[1.0]]), ValueError, "class_weight"),
        (lambda: ck.nn.PartialCrossEntropyLoss(normalizer=-1), ValueError, "normalizer: got -1"),
        (lambda: ck.nn.PartialCrossEntropyLoss(normalizer=math.nan), ValueError, "normalizer: got nan"),
        (lambda: ck.nn.SoftEntropyLoss(normalizer=torch.ones(2)), ValueError, "normalizer: .* single count"),
        (lambda: ck.nn.SoftEntropyLoss(reduction="sum", normalizer=1), ValueError, "normalizer: .* 'sum'"),
        (lambda: ck.nn.ColorConstraintLoss(0), ValueError, "num_superpixels: got 0"),
        (lambda: ck.nn.ColorConstraintLoss(norm="max"), ValueError, "norm: got 'max'"),
        (lambda: ck.nn.ColorConstraintLoss(relaxation="cubic"), ValueError, "relaxation: got 'cubic'"),
        (lambda: ck.nn.PottsLoss(relaxation="cubic"), ValueError, "relaxation: got 'cubic'"),
        (lambda: ck.nn.TreeEnergyLoss(0), ValueError, "sigma: got 0"),
        (lambda: ck.nn.TreeEnergyLoss(detach=1), TypeError, "detach: got int"),
        (lambda: ck.nn.GatedCRFLoss(0), ValueError, "radius: got 0"),
        (lambda: ck.nn.GatedCRFLoss(sigma_rgb=0), ValueError, "sigma_rgb: got 0"),
        (lambda: ck.nn.ScribbleLoss(entropy=-1.0), ValueError, "entropy: got -1.0"),
        (lambda: ck.nn.ScribbleLoss(color=math.inf), ValueError, "color: got inf"),
        (lambda: ck.nn.ScribbleLoss(normalizer=3.0), TypeError, "normalizer: .* Counts"),
        (lambda: ck.nn.ScribbleLoss(normalizer=Counts(1, 1, -1)), ValueError, "normalizer: got -1"),
    ],
)
def test_wrong_options(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": torch.ones(3, 24, 24)}, TypeError, "mask: .* torch.bool"),
        ({"mask": torch.ones(3, 24, 23, dtype=torch.bool)}, ValueError, r"mask: .*\(3, 24, 24\)"),
        ({"image": torch.zeros(3, 3, 24, 23, dtype=torch.uint8)}, ValueError, r"image: .*\(3, 3, 24, 24\)"),
        ({"image": torch.zeros(3, 2, 24, 24, dtype=torch.uint8)}, ValueError, "image: .* 3 channels"),
        ({"image": torch.zeros(3, 3, 24, 24, dtype=torch.int32)}, TypeError, "image: .* uint8"),
        ({"image": torch.full((3, 3, 24, 24), -0.5)}, ValueError, r"image: got values from -0.5"),
        ({"image": torch.full((3, 3, 24, 24), math.nan)}, ValueError, r"image: .*expected \[0, 1\]"),
        (
            {"superpixels": torch.zeros(3, 24, 24, dtype=torch.uint8)},
            TypeError,
            "superpixels: .* torch.int32",
        ),
        ({"superpixels": torch.zeros(3, 24, 24)}, TypeError, "superpixels: .* torch.int32"),
        ({"superpixels": torch.zeros(3, 23, 24, dtype=torch.int32)}, ValueError, "superpixels: .* labels"),
        ({"superpixels": torch.full((3, 24, 24), 12)}, ValueError, "superpixels: got ids from 12"),
        ({"labels": torch.full((3, 24, 24), 4)}, ValueError, "labels: got 4 among"),
        ({"labels": torch.zeros(3, 24, 24)}, TypeError, "labels: .* torch.uint8"),
        ({"weight": torch.full((3, 24, 24), -1.0)}, ValueError, "weight: got values from -1.0"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch()
    inputs = {"labels": batch.labels, "image": batch.image, "superpixels": batch.superpixels, **changes}
    labels, image = inputs.pop("labels"), inputs.pop("image")
    with pytest.raises(error, match=message):
        scribble_loss()(batch.logits, labels, image, **inputs)


@pytest.mark.parametrize("ignore_index", [-100, -1, 256])
def test_ignore_index_outside_the_labels_dtype(ignore_index: int) -> None:
    """uint8 labels are compared as numbers: none of them is -1, and 0 is not 256."""
    logits = torch.randn(1, 3, 4, 4)
    labels = (torch.arange(16).reshape(1, 4, 4) % 3).to(torch.uint8)
    loss = ck.nn.PartialCrossEntropyLoss(ignore_index=ignore_index)
    assert loss.count(labels) == 16
    expected = F.cross_entropy(logits, labels.long())
    torch.testing.assert_close(loss(logits, labels, normalizer=loss.count(labels)), expected)
    wrong = labels.clone()
    wrong[0, 0, 0] = ignore_index % 256 if ignore_index < 0 else 255
    with pytest.raises(ValueError, match="labels"):
        loss(logits, wrong)
