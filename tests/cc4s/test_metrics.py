"""SegmentationMetrics against set arithmetic on boolean masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cc4s.engine.metrics import SegmentationMetrics
from cc4s.errors import UserError

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]


def random_images(seed: int, count: int = 6, classes: int = 4) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        shape = tuple(rng.integers(3, 12, 2))
        label = rng.integers(0, classes, shape).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.6, label, rng.integers(0, classes, shape))
        label[rng.random(shape) < 0.2] = 255
        images.append((f"patient{i // 2:03d}_slice_{i % 2}", prediction, label))
    return images


def naive_scores(pairs: list[tuple[np.ndarray, np.ndarray]], c: int) -> tuple[float, float, float]:
    """IoU, Dice and recall of class c over the pixels of some images, by sets of (image, row, column)."""
    predicted, labelled = set(), set()
    for i, (prediction, label) in enumerate(pairs):
        for y, x in np.ndindex(label.shape):
            if label[y, x] == 255:
                continue
            if prediction[y, x] == c:
                predicted.add((i, y, x))
            if label[y, x] == c:
                labelled.add((i, y, x))
    both, either = len(predicted & labelled), len(predicted | labelled)
    if either == 0:
        return float("nan"), float("nan"), float("nan")
    recall = both / len(labelled) if labelled else float("nan")
    return both / either, 2 * both / (len(predicted) + len(labelled)), recall


def test_pooled_numbers_against_sets() -> None:
    images = random_images(0)
    metrics = SegmentationMetrics(CLASSES, exclude=[0])
    for name, prediction, label in images:
        metrics.update(name, prediction, label)
    result = metrics.compute()
    pairs = [(p, y) for _, p, y in images]
    expected = [naive_scores(pairs, c) for c in range(4)]
    for c, name in enumerate(CLASSES):
        # One division of exact integers on both sides: equal to the last bit or two.
        assert result["per_class_iou"][name] == pytest.approx(expected[c][0], rel=1e-15)
        assert result["per_class_dice"][name] == pytest.approx(expected[c][1], rel=1e-15)
        assert result["per_class_accuracy"][name] == pytest.approx(expected[c][2], rel=1e-15)
    assert result["miou"] == pytest.approx(np.mean([e[0] for e in expected[1:]]), rel=1e-14)
    assert result["dice"] == pytest.approx(np.mean([e[1] for e in expected[1:]]), rel=1e-14)
    assert result["mean_accuracy"] == pytest.approx(np.mean([e[2] for e in expected[1:]]), rel=1e-14)
    hits = sum(int(((p == y) & (y != 255)).sum()) for p, y in pairs)
    pixels = sum(int((y != 255).sum()) for _, y in pairs)
    assert result["pixel_accuracy"] == pytest.approx(hits / pixels, rel=1e-15)
    assert result["classes_in_mean"] == CLASSES[1:]
    assert result["images"] == len(images)
    assert "volume_dice" not in result


def test_volume_numbers_against_sets() -> None:
    images = random_images(1, count=7)
    # Class 3 is nowhere in the first volume; the last name matches no volume.
    images = [
        (name, np.where(p == 3, 1, p) if i < 2 else p, np.where(y == 3, 1, y) if i < 2 else y)
        for i, (name, p, y) in enumerate(images)
    ]
    images[6] = ("loose", *images[6][1:])
    metrics = SegmentationMetrics(CLASSES, exclude=[0], volume_pattern=r"(patient\d+)_slice")
    for image in images:
        metrics.update(*image)
    result = metrics.compute()
    volumes = [images[0:2], images[2:4], images[4:6], images[6:7]]
    scores = np.array([[naive_scores([(p, y) for _, p, y in v], c)[:2] for c in range(4)] for v in volumes])
    assert np.isnan(scores[0, 3]).all()
    assert result["volumes"] == 4
    per_class = np.nanmean(scores, axis=0)
    for c, name in enumerate(CLASSES):
        assert result["per_class_volume_iou"][name] == pytest.approx(per_class[c, 0], rel=1e-14)
        assert result["per_class_volume_dice"][name] == pytest.approx(per_class[c, 1], rel=1e-14)
    assert result["volume_iou"] == pytest.approx(per_class[1:, 0].mean(), rel=1e-14)
    assert result["volume_dice"] == pytest.approx(per_class[1:, 1].mean(), rel=1e-14)
    # The per-volume mean is another number than the pooled one.
    assert result["volume_dice"] != pytest.approx(result["dice"], rel=1e-6)


def test_confusion_has_label_rows_and_exact_counts() -> None:
    metrics = SegmentationMetrics(["a", "b"])
    metrics.update("x", torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]], dtype=torch.uint8))
    assert metrics.confusion.tolist() == [[1, 1], [0, 0]]
    assert metrics.confusion.dtype == torch.int64
    result = metrics.compute()
    assert result["per_class_iou"] == {"a": 0.5, "b": 0.0}
    assert result["per_class_accuracy"] == {"a": 0.5, "b": None}
    assert result["pixel_accuracy"] == 0.5


def test_parts_merge_to_the_whole() -> None:
    images = random_images(2, count=9)
    options = {"exclude": [0], "volume_pattern": r"(patient\d+)"}
    whole = SegmentationMetrics(CLASSES, **options)
    parts = [SegmentationMetrics(CLASSES, **options) for _ in range(3)]
    for i, image in enumerate(images):
        whole.update(*image)
        # Neighbouring slices land in different processes: volumes are split.
        parts[i % 3].update(*image)
    merged = SegmentationMetrics(CLASSES, **options)
    for part in reversed(parts):
        merged.merge(part.state())
    assert merged.compute() == whole.compute()
    # A state is a copy: the counts of a part are its own.
    assert parts[0].compute() != whole.compute()
    assert parts[0].images == 3


def test_absent_and_excluded_classes_leave_the_mean() -> None:
    metrics = SegmentationMetrics(["a", "b", "absent"], exclude=[0])
    metrics.update("x", np.array([[0, 1]]), np.array([[0, 1]]))
    result = metrics.compute()
    assert result["per_class_iou"] == {"a": 1.0, "b": 1.0, "absent": None}
    assert result["classes_in_mean"] == ["b"]
    assert result["miou"] == result["dice"] == 1.0


@pytest.mark.parametrize("updates", [0, 1])
def test_nothing_labelled_gives_null_and_json(updates: int) -> None:
    metrics = SegmentationMetrics(["a", "b"], volume_pattern="(.*)")
    for _ in range(updates):
        metrics.update("x", np.zeros((2, 3), np.int64), np.full((2, 3), 255, np.uint8))
    result = json.loads(json.dumps(metrics.compute(), allow_nan=False))
    assert result["miou"] is None
    assert result["pixel_accuracy"] is None
    assert result["volume_dice"] is None
    assert result["per_class_volume_iou"] == {"a": None, "b": None}
    assert result["volumes"] == updates


def test_more_classes_than_a_byte_holds() -> None:
    metrics = SegmentationMetrics([f"c{i}" for i in range(300)], ignore_index=-1)
    metrics.update("x", np.array([[255, 299, 7]]), np.array([[255, 299, -1]]))
    assert metrics.compute()["miou"] == 1.0
    assert metrics.confusion.sum() == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_types(dtype: torch.dtype) -> None:
    metrics = SegmentationMetrics(["a", "b"])
    metrics.update("x", torch.tensor([[0, 1]], dtype=dtype), torch.tensor([[0, 255]], dtype=dtype))
    assert metrics.confusion.tolist() == [[1, 0], [0, 0]]


def test_wrong_values_are_named() -> None:
    metrics = SegmentationMetrics(["a", "b"])
    with pytest.raises(ValueError, match=r"pic: label 7 is not a class; expected 0 to 1"):
        metrics.update("pic", np.zeros((2, 2), int), np.full((2, 2), 7))
    with pytest.raises(ValueError, match=r"pic: prediction -1"):
        metrics.update("pic", np.full((2, 2), -1), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\)"):
        metrics.update("pic", np.zeros((2, 2), int), np.zeros((2, 3), int))
    assert metrics.images == 0
    assert metrics.confusion.sum() == 0
    with pytest.raises(UserError, match=r"data\.exclude_from_mean: 2"):
        SegmentationMetrics(["a", "b"], exclude=[2])
    with pytest.raises(UserError, match=r"data\.volume_pattern: '\(' is not"):
        SegmentationMetrics(["a", "b"], volume_pattern="(")
    with pytest.raises(UserError, match="has no"):
        SegmentationMetrics(["a", "b"], volume_pattern="patient")
    with pytest.raises(ValueError, match="different names"):
        SegmentationMetrics(["a", "a"])
    with pytest.raises(ValueError, match="is the class 'a'"):
        SegmentationMetrics(["a", "b"], ignore_index=0)
