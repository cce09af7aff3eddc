"""Augmentation, training and evaluation samples, and the order of training."""

from __future__ import annotations

import importlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cc4s.config import AugmentConfig, DataConfig
from cc4s.data import (
    EvaluationSet,
    StepSampler,
    TrainingSet,
    channel_statistics,
    normalize,
    open_dataset,
    worker_init,
    write_index_png,
)
from cc4s.data.augment import augment
from cc4s.errors import UserError

from .data_tools import config, make_folder, mask, png

PLAIN = AugmentConfig(crop=64, scale_min=1, scale_max=1, rotation_prob=0, blur_prob=0, flip_prob=0)
FULL = AugmentConfig(crop=33)


def coordinates(height: int, width: int, dtype: type = np.float32) -> np.ndarray:
    """An image whose pixels say where they come from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, rows * 0 + 7], axis=2).astype(dtype)


def view(image, label, options, seed, **extra):
    fill = np.full(image.shape[2], -1 if image.dtype != np.uint8 else 99, image.dtype)
    return augment(image, label, options, np.random.default_rng(seed), fill=fill, ignore=255, **extra)


@given(seed=st.integers(0, 10**6), height=st.integers(1, 90), width=st.integers(1, 90))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_plain_crop_is_a_window(seed, height, width):
    image = coordinates(height, width)
    label = (image[:, :, 0] * 3 + image[:, :, 1]).astype(np.uint8) % 200
    crop, taken, valid = view(image, label, replace(PLAIN, crop=40), seed)
    assert crop.shape == (40, 40, 3)
    assert valid.sum() == min(height, 40) * min(width, 40)
    rows, columns = crop[valid][:, 0].astype(int), crop[valid][:, 1].astype(int)
    # A window without gaps: each step in the crop is a step in the image.
    places = np.argwhere(valid)
    assert len(np.unique(rows - places[:, 0])) == len(np.unique(columns - places[:, 1])) == 1
    assert (taken[valid] == label[rows, columns]).all()
    assert (crop[~valid] == -1).all()
    assert (taken[~valid] == 255).all()


def test_crop_places_are_spread():
    image = coordinates(100, 20)
    tops = [int(view(image, np.zeros((100, 20), np.uint8), PLAIN, seed)[0][:, :, 0].max()) for seed in range(300)]
    assert min(tops) == 63  # the topmost window of 64 rows
    assert max(tops) == 99
    lefts = [
        int(np.flatnonzero(view(image, image[:, :, 0].astype(np.uint8), PLAIN, seed)[2][0])[0]) for seed in range(300)
    ]
    assert min(lefts) == 0
    assert max(lefts) == 44


def test_flip():
    image = coordinates(64, 64)
    label = image[:, :, 1].astype(np.uint8)
    crop, taken, valid = view(image, label, replace(PLAIN, flip_prob=1), 0)
    assert np.array_equal(crop, image[:, ::-1])
    assert np.array_equal(taken, label[:, ::-1])
    assert valid.all()


def test_probabilities():
    image = coordinates(64, 64)
    label = np.zeros((64, 64), np.uint8)
    flips = [view(image, label, replace(PLAIN, flip_prob=0.5), seed)[0][0, 0, 1] > 0 for seed in range(400)]
    # 400 draws of probability 0.5: four standard deviations are 40.
    assert abs(sum(flips) - 200) < 40
    turns = [not view(image, label, replace(PLAIN, rotation_prob=0.25), seed)[2].all() for seed in range(400)]
    assert abs(sum(turns) - 100) < 40


def test_rotation_moves_image_and_label_together():
    image = coordinates(64, 64)
    label = (image[:, :, 1] > 31).astype(np.uint8)
    crop, taken, valid = view(image, label, replace(PLAIN, rotation=180, rotation_prob=1), 5)
    assert 0.5 < valid.mean() < 1
    assert (taken[~valid] == 255).all()
    assert (crop[~valid] == -1).all()
    # The nearest label lies within one pixel of the interpolated place.
    sure = valid & (np.abs(crop[:, :, 1] - 31.5) > 1)
    assert (taken[sure] == (crop[:, :, 1] > 31.5)[sure]).all()
    # Nothing of the padding is mixed into the image.
    assert crop[valid].min() >= 0
    assert crop[valid][:, 2] == pytest.approx(7, abs=1e-4)


def test_blur_does_not_see_the_padding():
    image = np.full((30, 30, 3), 200, np.uint8)
    options = replace(PLAIN, rotation=45, rotation_prob=1, blur_prob=1)
    crop, _, valid = view(image, np.zeros((30, 30), np.uint8), options, 1)
    assert (crop[valid] == 200).all()
    assert (crop[~valid] == 99).all()


def test_blur_is_gaussian_of_five():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    crop, _, _ = view(image, np.zeros((64, 64), np.uint8), replace(PLAIN, blur_prob=1), 0)
    taps = np.array([1, 4, 6, 4, 1]) / 16  # the binomial kernel, variance 1
    windows = np.lib.stride_tricks.sliding_window_view(image, (5, 5), (0, 1))
    exact = np.einsum("abcij,i,j->abc", windows, taps, taps)
    # Rounded to whole grey levels.
    assert np.abs(crop[2:-2, 2:-2] - exact).max() <= 0.5 + 1e-9


def test_scale_and_long_side():
    image = coordinates(40, 80)
    label = np.zeros((40, 80), np.uint8)
    options = AugmentConfig(crop=400, scale_min=0.5, scale_max=2, rotation_prob=0, blur_prob=0, flip_prob=0)
    areas = [view(image, label, options, seed)[2].sum() for seed in range(200)]
    scales = np.sqrt(np.array(areas) / 3200)
    # Uniform between 0.5 and 2, to the rounding of the size; the mean deviates by 0.433 / sqrt(200) = 0.031.
    assert 0.48 < scales.min() < 0.6
    assert 1.9 < scales.max() < 2.02
    assert abs(scales.mean() - 1.25) < 0.125
    valid = view(image, label, replace(options, scale_min=1, scale_max=1), 0, long_side=200)[2]
    assert (valid.any(1).sum(), valid.any(0).sum()) == (100, 200)


def test_options_do_not_shift_each_other():
    image = coordinates(100, 100)
    label = np.zeros((100, 100), np.uint8)
    for seed in range(5):
        plain = view(image, label, PLAIN, seed)[0]
        flipped = view(image, label, replace(PLAIN, flip_prob=1), seed)[0]
        # The same window of the flipped image.
        assert np.array_equal(plain[:, :, 0], flipped[:, :, 0])
        assert np.array_equal(99 - plain[:, :, 1], flipped[:, :, 1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop", 0),
        ("scale_min", 0.0),
        ("scale_max", 0.1),
        ("rotation", -1.0),
        ("blur_prob", 2.0),
        ("flip_prob", -0.1),
    ],
)
def test_bad_augmentation(key, value):
    with pytest.raises(UserError, match=rf"augment\..*{key}"):
        TrainingSet([], DataConfig(), replace(FULL, **{key: value}), seed=0, labels="masks", num_classes=3)


@pytest.fixture
def opened(tmp_path):
    options = config(make_folder(tmp_path / "d"))
    return open_dataset(options, seed=0, work=None), options


def training(opened, augmentation=FULL, **extra):
    dataset, options = opened
    arguments = {"seed": 0, "labels": "scribbles", "num_classes": 3, **extra}
    return TrainingSet(dataset.train + dataset.eval, options, augmentation, **arguments)


def test_sample(opened):
    sample = training(opened)[3, 1]
    assert sample["name"] == "b"
    assert sample["index"] == 1
    described = {key: (value.dtype, tuple(value.shape)) for key, value in sample.items() if torch.is_tensor(value)}
    assert described == {
        "image": (torch.float32, (3, 33, 33)),
        "rgb": (torch.uint8, (3, 33, 33)),
        "label": (torch.uint8, (33, 33)),
        "valid": (torch.bool, (33, 33)),
    }
    mean, std = channel_statistics(opened[1])
    expected = (sample["rgb"].permute(1, 2, 0).numpy() / 255.0 - mean) / std
    valid = sample["valid"].numpy()
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0).numpy()[valid], expected[valid], atol=1e-5)  # float32


def test_padding(opened):
    sample = training(opened, replace(PLAIN, crop=100))[0, 0]
    valid = sample["valid"]
    assert valid.sum() == 40 * 56
    assert (sample["image"][:, ~valid] == 0).all()
    assert (sample["label"][~valid] == 255).all()
    # The mean colour, rounded: 0.485, 0.456, 0.406 of 255.
    assert torch.equal(sample["rgb"][:, ~valid].unique(dim=1)[:, 0], torch.tensor([124, 116, 104]).byte())


def test_kinds_of_labels(opened, tmp_path):
    dataset, _ = opened
    whole = replace(PLAIN, crop=56)
    scribble = training(opened, whole)[0, 0]["label"]
    dense = training(opened, whole, labels="masks")[0, 0]["label"]
    assert 0 < (scribble != 255).sum() < 60 < (dense != 255).sum()
    assert (scribble[scribble != 255] == dense[scribble != 255]).all()
    pseudo = np.full((40, 56), 2)
    write_index_png(tmp_path / "pseudo" / "a.png", pseudo)
    taken = training(opened, whole, labels=tmp_path / "pseudo")[0, 0]
    assert (taken["label"][taken["valid"]] == 2).all()
    with pytest.raises(UserError, match=r"pseudo/b\.png: cannot be read"):
        training(opened, whole, labels=tmp_path / "pseudo")[0, 1]
    with pytest.raises(ValueError, match="labels: 'pseudo'"):
        training(opened, labels="pseudo")
    bare = replace(dataset.train[0], label=None, scribble=None)
    for labels in ("masks", "scribbles"):
        with pytest.raises(UserError, match=r"a\.jpg: the image has no (mask|scribble)"):
            TrainingSet([bare], opened[1], FULL, seed=0, labels=labels, num_classes=3)[0, 0]


def same(first, second):
    assert first.keys() == second.keys()
    return all(
        torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key]
        for key, value in first.items()
    )


def test_a_sample_depends_on_seed_epoch_and_index_alone(opened):
    items = training(opened)
    order = [(0, 0), (5, 1), (0, 1), (2, 3)]
    once = [items[key] for key in order]
    # In another order, from another set, with other threads and other global random numbers.
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    again = [training(opened)[key] for key in reversed(order)][::-1]
    cv2.setNumThreads(threads)
    assert all(same(*pair) for pair in zip(once, again, strict=True))
    assert not same(items[0, 0], items[1, 0])
    assert not same(items[0, 0], training(opened, seed=1)[0, 0])


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_give_the_same_batches(opened, workers):
    items = training(opened)
    sampler = StepSampler(4, 3, seed=0, total_steps=4)
    plain = list(DataLoader(items, batch_sampler=sampler))
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers, worker_init_fn=worker_init)
    loaded = list(loader)
    assert len(loaded) == len(plain) == 4
    for first, second in zip(plain, loaded, strict=True):
        assert first["name"] == second["name"]
        assert same({k: v for k, v in first.items() if k != "name"}, {k: v for k, v in second.items() if k != "name"})
    assert plain[0]["image"].shape == (3, 3, 33, 33)


def test_superpixels_come_from_the_crop(opened, monkeypatch):
    kernels = importlib.import_module("cc4s_kernels")
    calls = []

    def slic(image, num_segments, *, compactness, mask):
        calls.append((image, num_segments, compactness, mask))
        return torch.where(mask, 0, -1).int()

    monkeypatch.setattr(kernels, "slic", slic, raising=False)
    sample = training(opened, replace(PLAIN, crop=60), superpixels=40, compactness=3.0)[0, 0]
    (image, number, compactness, valid) = calls[0]
    assert torch.equal(image[0], sample["rgb"])
    assert torch.equal(valid[0], sample["valid"])
    assert (number, compactness) == (40, 3.0)
    assert sample["superpixels"].dtype == torch.int32
    assert torch.equal(sample["superpixels"] == -1, ~sample["valid"])


def test_real_superpixels(opened):
    items = training(opened, replace(PLAIN, crop=60), superpixels=40)
    ids = items[0, 0]["superpixels"]
    assert ids.shape == (60, 60)
    assert torch.equal(ids == -1, ~items[0, 0]["valid"])
    assert 1 < ids.max() < 40
    assert torch.equal(ids, items[0, 0]["superpixels"])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(tmp_path, channels):
    root = make_folder(tmp_path / "d")
    values = np.random.default_rng(0).integers(0, 65536, (40, 56, channels), dtype=np.uint16)
    for path in list((root / "images").iterdir()):
        np.save(path.with_suffix(".npy"), values)
        path.unlink()
    options = config(root, channels=channels, mean=[0.5], std=[0.25])
    dataset = open_dataset(options, seed=0, work=None)
    sample = training((dataset, options), replace(FULL, blur_prob=1, rotation_prob=1))[0, 0]
    assert sample["image"].shape == (channels, 33, 33)
    assert sample["rgb"].shape == (3, 33, 33)
    whole = training((dataset, options), replace(PLAIN, crop=56))[0, 0]
    picked = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    expected = np.rint(values[:, :, picked] / 65535 * 255)
    assert np.array_equal(whole["rgb"][:, whole["valid"]].T.numpy(), expected.reshape(-1, 3))
    # float32 arithmetic on numbers up to 2.
    np.testing.assert_allclose(
        whole["image"][:, whole["valid"]].T.numpy(),
        ((values / 65535 - 0.5) / 0.25).reshape(-1, channels),
        atol=1e-5,
    )
    grey = EvaluationSet(dataset.eval, options, 3)[0]["image"]
    np.testing.assert_allclose(grey.permute(1, 2, 0).numpy(), values / 65535, atol=1e-6)


def test_more_than_255_classes(tmp_path):
    root = make_folder(tmp_path / "d")
    for folder in ("labels", "scribbles"):
        for path in (root / folder).iterdir():
            write_index_png(path, np.where(mask() == 2, 299, mask().astype(int)), num_classes=300)
    (root / "classes.json").unlink()
    options = config(root, num_classes=300)
    dataset = open_dataset(options, seed=0, work=None)
    sample = training((dataset, options), replace(FULL, crop=100), num_classes=300, labels="masks")[0, 0]
    assert sample["label"].dtype == torch.int64
    assert (sample["label"][~sample["valid"]] == 65535).all()
    assert set(sample["label"].unique().tolist()) <= {0, 1, 255, 299, 65535}
    assert EvaluationSet(dataset.eval, options, 300)[0]["label"].dtype == torch.int64


def test_evaluation_set(opened):
    dataset, options = opened
    items = EvaluationSet(dataset.eval, replace(options, long_side=20), 3)
    assert len(items) == 2
    sample = items[1]
    assert sample["name"] == "ü"
    assert sample["image"].shape == (3, 40, 56)
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    assert np.array_equal(sample["label"].numpy(), mask(3))
    assert EvaluationSet([replace(dataset.eval[0], label=None)], options, 3)[0]["label"] is None
    batches = list(DataLoader(items, batch_size=None, num_workers=0))
    assert [batch["name"] for batch in batches] == ["c d", "ü"]
    png(dataset.eval[0].label, mask(size=(41, 56)))
    with pytest.raises(UserError, match=r"c d\.png"):
        items[0]


def test_normalize(opened):
    options = opened[1]
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    mean = torch.tensor(options.mean).reshape(3, 1, 1)
    std = torch.tensor(options.std).reshape(3, 1, 1)
    # The statistics are float32.
    torch.testing.assert_close(normalize(image, options), (image - mean) / std, rtol=1e-6, atol=1e-6)
    assert normalize(image[0].half(), options).dtype == torch.float16
    with pytest.raises(ValueError, match=r"image: shape \(2, 4, 4, 5\), expected \(..., 3, height, width\)"):
        normalize(torch.rand(2, 4, 4, 5), options)


def flat(sampler):
    return [key for batch in sampler for key in batch]


@given(
    length=st.integers(1, 23),
    share=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world=st.integers(1, 3),
    start=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sampler(length, share, accumulate, world, start):
    total, size = 6, share * accumulate * world
    everything = flat(StepSampler(length, size, seed=3, total_steps=total))
    assert len(everything) == total * size
    # Each epoch is a permutation, epochs follow each other.
    for epoch in range(total * size // length + 1):
        part = everything[epoch * length : (epoch + 1) * length]
        assert {number for number, _ in part} <= {epoch}
        assert len({index for _, index in part}) == len(part)
        if len(part) == length:
            assert sorted(index for _, index in part) == list(range(length))
    # A resume gives the uninterrupted tail.
    tail = StepSampler(length, size, seed=3, start_step=start, total_steps=total)
    assert flat(tail) == everything[start * size :]
    # Processes and micro-batches cut the same steps.
    cut = [
        list(StepSampler(length, size, seed=3, total_steps=total, accumulate=accumulate, rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert all(len(batches) == total * accumulate for batches in cut)
    assert [key for batches in zip(*cut, strict=True) for batch in batches for key in batch] == everything


def test_sampler_seeds_and_length():
    sampler = StepSampler(10, 4, seed=0, start_step=2, total_steps=7, accumulate=2)
    assert len(sampler) == len(list(sampler)) == 10
    assert flat(sampler) == flat(sampler)
    assert flat(StepSampler(10, 10, seed=0, total_steps=1)) != flat(StepSampler(10, 10, seed=1, total_steps=1))


def test_sampler_errors():
    with pytest.raises(UserError, match=r"train\.batch_size: 6 is not divisible by .* = 2 \* 2"):
        StepSampler(10, 6, seed=0, total_steps=1, accumulate=2, world_size=2)
    with pytest.raises(UserError, match="the training list is empty"):
        StepSampler(0, 6, seed=0, total_steps=1)
    with pytest.raises(UserError, match=r"train\.batch_size, train\.accumulate: 0, 1"):
        StepSampler(3, 0, seed=0, total_steps=1)
    with pytest.raises(ValueError, match="rank: 2"):
        StepSampler(3, 4, seed=0, total_steps=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start_step: 3"):
        StepSampler(3, 4, seed=0, total_steps=1, start_step=3)
