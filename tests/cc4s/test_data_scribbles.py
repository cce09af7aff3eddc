"""Scribbles from masks, shrunk and dropped scribbles, and the folders of them."""

from __future__ import annotations

import os

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from cc4s.data import (
    drop_folder,
    drop_scribbles,
    generate_scribble_folder,
    generate_scribbles,
    read_index_png,
    shrink_folder,
    shrink_scribbles,
)
from cc4s.errors import UserError

from .data_tools import make_folder, mask, png

EIGHT = np.ones((3, 3))


def scene(seed: int, size: tuple[int, int] = (90, 120), classes: int = 5) -> np.ndarray:
    """Random blobs of classes with a rim of 255 around each."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal(size), 10) for _ in range(classes)])
    label = fields.argmax(0).astype(np.uint8)
    rim = ndimage.maximum_filter(label, 3) != ndimage.minimum_filter(label, 3)
    return np.where(rim, 255, label).astype(np.uint8)


def strokes(width: int = 3) -> np.ndarray:
    """A straight line, a bent line, a ring and a second class that touches the straight line."""
    drawn = np.full((120, 160), 255, np.uint8)
    drawn[10 : 10 + width, 10:110] = 1
    drawn[10 : 10 + width, 110:150] = 2
    drawn[30:80, 20 : 20 + width] = 0
    drawn[80 : 80 + width, 20:70] = 0
    cv2.circle(drawn, (120, 75), 25, 3, width)
    return drawn


@given(seed=st.integers(0, 1000), classes=st.integers(2, 8))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_generated_strokes_stay_in_their_class(seed, classes):
    label = scene(seed, classes=classes)
    drawn = generate_scribbles(label, rng=np.random.default_rng(seed))
    assert drawn.dtype == label.dtype
    on = drawn != 255
    assert (drawn[on] == label[on]).all()
    # A few percent of the pixels, as people draw.
    assert 0.002 < on.mean() < 0.15
    for value in np.unique(label[label != 255]):
        regions, count = ndimage.label(label == value)
        for region in range(1, count + 1):
            inside = regions == region
            if inside.sum() >= 30:
                assert (on & inside).any()
            elif inside.sum() < 11:  # below 0.1 % of the image as well
                assert not (on & inside).any()


def test_generation_is_a_function_of_the_generator():
    label = scene(3)
    first, again, other = (generate_scribbles(label, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("label", [np.full((50, 60), 255), np.zeros((1, 1)), np.zeros((40, 1)), np.ones((5, 90))])
def test_generation_on_odd_masks(label):
    label = label.astype(np.uint8)
    drawn = generate_scribbles(label, rng=np.random.default_rng(0))
    assert (drawn[drawn != 255] == label[drawn != 255]).all()
    assert (drawn != 255).any() == ((label != 255).sum() >= 30)


def test_generation_with_many_classes():
    label = scene(0).astype(np.uint16)
    label[label == 4] = 299
    label[label == 255] = 65535
    label[:20, :20] = 255  # a class here
    drawn = generate_scribbles(label, rng=np.random.default_rng(0), num_classes=300)
    assert {255, 299, 65535} <= set(np.unique(drawn))
    assert (drawn[drawn != 65535] == label[drawn != 65535]).all()


def test_a_stroke_runs_along_its_region():
    label = np.full((100, 300), 255, np.uint8)
    label[30:70, 20:280] = 1
    for seed in range(5):
        drawn = generate_scribbles(label, rng=np.random.default_rng(seed)) == 1
        _, count = ndimage.label(drawn, EIGHT)
        assert count == 1
        columns = np.flatnonzero(drawn.any(0))
        # Between 0.6 and 0.85 of the region's 260 columns, less what smoothing takes off the ends.
        assert 0.5 * 260 < columns[-1] - columns[0] < 0.9 * 260
        # About three pixels thick, sloping parts a little more.
        assert 2 <= drawn.sum() / len(columns) <= 5


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_shrunk_strokes_keep_their_share_around_the_middle(ratio):
    drawn = strokes()
    shrunk = shrink_scribbles(drawn, ratio)
    assert ((shrunk == drawn) | (shrunk == 255)).all()
    for value in range(4):
        before, after = drawn == value, shrunk == value
        _, count = ndimage.label(after, EIGHT)
        assert count == 1
        # A dot of at most nine pixels, or the share to one pixel.
        assert max(1, ratio * before.sum() - 1) <= after.sum() <= max(9, ratio * before.sum() + 1)
    # The straight line has columns 10 to 109: its middle is 59.5, to the width of the stroke.
    columns = np.flatnonzero((shrunk == 1).any(0))
    assert abs((columns[0] + columns[-1]) / 2 - 59.5) <= 2
    assert abs(columns[-1] - columns[0] + 1 - max(3, ratio * 100)) <= 3
    if ratio == 1:
        assert np.array_equal(shrunk, drawn)


def test_the_middle_of_a_bent_stroke_is_its_bend():
    # 50 down and 50 right: half way is the corner at (81, 21).
    rows, columns = np.nonzero(shrink_scribbles(strokes(), 0.0) == 0)
    assert abs(rows.mean() - 81) <= 3
    assert abs(columns.mean() - 21) <= 3


@given(seed=st.integers(0, 500), ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_less_is_part_of_more(seed, ratios):
    less, more = sorted(ratios)
    drawn = generate_scribbles(scene(seed), rng=np.random.default_rng(seed))
    small, large = shrink_scribbles(drawn, less), shrink_scribbles(drawn, more)
    assert ((small == large) | (small == 255)).all()
    few, many = (drop_scribbles(drawn, ratio, np.random.default_rng(seed)) for ratio in (more, less))
    assert ((few == many) | (few == 255)).all()
    # As many strokes as before: shrinking loses none.
    for value in np.unique(drawn[drawn != 255]):
        assert ndimage.label(small == value, EIGHT)[1] >= ndimage.label(drawn == value, EIGHT)[1]


def test_dropping_takes_whole_strokes():
    drawn = np.full((200, 200), 255, np.uint8)
    for index in range(400):
        drawn[10 * (index // 20) : 10 * (index // 20) + 2, 10 * (index % 20) : 10 * (index % 20) + 7] = index % 5
    kept = drop_scribbles(drawn, 0.3, np.random.default_rng(0))
    assert ((kept == drawn) | (kept == 255)).all()
    sizes = np.bincount(ndimage.label(kept != 255)[0].ravel())[1:]
    assert (sizes == 14).all()
    # 400 draws of probability 0.7: four standard deviations are 37.
    assert abs(len(sizes) - 280) < 37
    assert (drop_scribbles(drawn, 1.0, np.random.default_rng(0)) == 255).all()
    assert np.array_equal(drop_scribbles(drawn, 0.0, np.random.default_rng(0)), drawn)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_ratios(tmp_path, ratio):
    drawn = strokes()
    with pytest.raises(UserError, match=r"ratio: .* expected a number from 0 to 1"):
        shrink_scribbles(drawn, ratio)
    with pytest.raises(UserError, match="ratio: "):
        drop_scribbles(drawn, ratio, np.random.default_rng(0))
    with pytest.raises(UserError, match="ratio: "):
        shrink_folder(tmp_path, tmp_path / "out", ratio)
    with pytest.raises(UserError, match="ratio: "):
        drop_folder(tmp_path, tmp_path / "out", ratio)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folders(tmp_path):
    root = make_folder(tmp_path / "d")
    out = tmp_path / "new" / "scribbles"
    assert generate_scribble_folder(root, out, 0) == 4
    assert sorted(contents(out)) == ["a.png", "b.png", "c d.png", "ü.png"]
    # The folder of masks itself does as well; the seed and the name decide.
    assert generate_scribble_folder(root / "labels", tmp_path / "same", 0, names=["b"]) == 1
    assert (tmp_path / "same" / "b.png").read_bytes() == (out / "b.png").read_bytes()
    generate_scribble_folder(root, tmp_path / "seed1", 1)
    assert contents(tmp_path / "seed1") != contents(out)

    assert shrink_folder(out, tmp_path / "half", 0.5) == 4
    assert drop_folder(out, tmp_path / "fewer", 0.5, 3) == 4
    assert drop_folder(out, tmp_path / "fewer again", 0.5, 3) == 4
    assert contents(tmp_path / "fewer") == contents(tmp_path / "fewer again")
    for name in contents(out):
        before = read_index_png(out / name, 3)
        assert np.array_equal(read_index_png(tmp_path / "half" / name, 3), shrink_scribbles(before, 0.5))
        after = read_index_png(tmp_path / "fewer" / name, 3)
        assert ((after == before) | (after == 255)).all()


def test_palettes_are_kept(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes()
    image = Image.fromarray(strokes())
    image.putpalette(colours)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "x.png")
    shrink_folder(tmp_path / "in", tmp_path / "short", 0.5)
    drop_folder(tmp_path / "in", tmp_path / "few", 0.5)
    for folder in ("short", "few"):
        with Image.open(tmp_path / folder / "x.png") as written:
            assert written.mode == "P"
            assert bytes(written.getpalette()) == colours


def test_nothing_is_overwritten(tmp_path):
    root = make_folder(tmp_path / "d")
    scribbles, out = root / "scribbles", tmp_path / "out"
    shrink_folder(scribbles, out, 0.5)
    written = contents(out)
    # The same call again finds its own work, also where it was interrupted.
    (out / "b.png").unlink()
    (out / ".partial-0123").write_bytes(b"left by a killed process")
    shrink_folder(scribbles, out, 0.5)
    (out / ".partial-0123").unlink()
    assert contents(out) == written
    with pytest.raises(UserError, match=r"out/a\.png: exists with other content; choose an empty output folder"):
        shrink_folder(scribbles, out, 0.25)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out: the output folder holds other files \(notes\.txt\)"):
        shrink_folder(scribbles, out, 0.5)
    (out / "notes.txt").unlink()
    assert contents(out) == written
    before = contents(scribbles)
    with pytest.raises(UserError, match="exists with other content"):
        shrink_folder(scribbles, scribbles, 0.5)
    assert contents(scribbles) == before
    with pytest.raises(UserError, match=r"classes\.json: exists and is no folder"):
        shrink_folder(scribbles, root / "classes.json", 0.5)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        generate_scribble_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no masks \(\.png\) in it"):
        generate_scribble_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match=r"empty: no scribbles"):
        drop_folder(tmp_path / "empty", tmp_path / "out", 0.5)
    root = make_folder(tmp_path / "d")
    with pytest.raises(UserError, match=r"labels/zz\.png: no such mask"):
        generate_scribble_folder(root, tmp_path / "out", names=["zz"])
    png(root / "labels" / "b.png", mask(classes=9))
    with pytest.raises(UserError, match=r"labels/b\.png: label value 8, but there are 3 classes"):
        generate_scribble_folder(root, tmp_path / "out")
    png(root / "labels" / "b.png", mask(), "RGB")
    with pytest.raises(UserError, match=r"labels/b\.png: a colour image"):
        generate_scribble_folder(root, tmp_path / "out")
    png(root / "scribbles" / "b.png", mask(), "RGB")
    with pytest.raises(UserError, match=r"scribbles/b\.png: a colour image"):
        shrink_folder(root / "scribbles", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_vector_strokes_need_class_names(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.xml").write_text(
        "<annotation><size><width>60</width><height>40</height></size><polygon><tag>cow</tag>"
        "<point><X>5</X><Y>20</Y></point><point><X>54</X><Y>20</Y></point></polygon></annotation>"
    )
    with pytest.raises(UserError, match=r"x\.xml: strokes name their classes"):
        shrink_folder(tmp_path / "in", tmp_path / "out", 0.5)
    assert shrink_folder(tmp_path / "in", tmp_path / "out", 0.5, classes=["sky", "cow"]) == 1
    assert os.listdir(tmp_path / "out") == ["x.png"]
    drawn = read_index_png(tmp_path / "out" / "x.png", 2)
    columns = np.flatnonzero((drawn == 1).any(0))
    # Half of about 50 columns around 29.5.
    assert abs(len(columns) - 26) <= 3
    assert abs(columns.mean() - 29.5) <= 2
