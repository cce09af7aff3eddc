"""Layouts on disk, lists, and every message about bad input."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cc4s.config import DataConfig
from cc4s.data import check_dataset, open_dataset, read_index_png
from cc4s.data.dataset import channel_statistics
from cc4s.data.voc import CONTEXT_CLASSES, VOC_CLASSES
from cc4s.errors import UserError

from .data_tools import config, jpeg, make_folder, mask, png


def open_and_check(options: DataConfig, *, labels=False, scribbles=True, work=None):
    dataset = open_dataset(options, seed=0, work=work)
    check_dataset(dataset, options, labels=labels, scribbles=scribbles)
    return dataset


def names(entries):
    return [entry.name for entry in entries]


def test_folder(tmp_path):
    root = make_folder(tmp_path / "a data folder")
    dataset = open_and_check(config(root), labels=True)
    assert dataset.classes == ["k0", "k1", "k2"]
    assert dataset.num_classes == 3
    assert names(dataset.train) == ["a", "b"]
    assert names(dataset.eval) == ["c d", "ü"]
    assert dataset.eval_name == "val"
    assert dataset.palette.shape == (256, 3)
    entry = dataset.eval[1]
    assert (entry.image, entry.label) == (root / "images" / "ü.jpg", root / "labels" / "ü.png")
    assert dataset.train[0].scribble == root / "scribbles" / "a.png"


def test_lists_take_endings_blank_lines_and_windows_newlines(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "train.txt").write_bytes("\ufeffa.jpg\r\n\r\n  c d  \r\nü.jpg\r\n\n".encode())
    (root / "images" / "a.jpg").rename(root / "images" / "a.JPG")
    assert names(open_and_check(config(root)).train) == ["a", "c d", "ü"]


def test_decomposed_file_names_are_found(tmp_path):
    root = make_folder(tmp_path / "d", ("x", "u\u0308"))
    (root / "val.txt").write_text("\u00fc\n", "utf-8")
    assert open_and_check(config(root)).eval[0].label is not None


def test_names_that_look_like_files(tmp_path):
    root = make_folder(tmp_path / "d", ("scan.npy", "v1.2"))
    assert names(open_and_check(config(root)).train) == ["scan.npy"]
    assert names(open_and_check(config(root)).eval) == ["v1.2"]


def test_eval_list_is_test_then_val_unless_named(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "test.txt").write_text("a\n")
    (root / "other.txt").write_text("b\n")
    assert open_and_check(config(root)).eval_name == "test"
    assert names(open_and_check(config(root, eval_list="other")).eval) == ["b"]
    # An empty test list counts as none.
    (root / "test.txt").write_text("\n\n")
    assert open_and_check(config(root)).eval_name == "val"
    with pytest.raises(UserError, match=r"test\.txt: the list is empty \(data\.eval_list\)"):
        open_and_check(config(root, eval_list="test"))
    (root / "test.txt").unlink()
    (root / "val.txt").unlink()
    with pytest.raises(UserError, match=r"test\.txt or .*val\.txt: no such list, or an empty one"):
        open_and_check(config(root))


def test_limits_spread_evenly(tmp_path):
    root = make_folder(tmp_path / "d", tuple(f"n{index}" for index in range(10)))
    (root / "train.txt").write_text("\n".join(f"n{index}" for index in range(10)))
    assert names(open_and_check(config(root, limit_train=4)).train) == ["n0", "n2", "n5", "n7"]
    assert len(open_and_check(config(root, limit_train=10)).train) == 10
    assert len(open_and_check(config(root, limit_train=99, limit_eval=1)).train) == 10
    assert len(open_and_check(config(root, limit_eval=1)).eval) == 1
    with pytest.raises(UserError, match=r"data\.limit_train: -1; expected 0 or more"):
        open_and_check(config(root, limit_train=-1))


def test_only_one_split_needs_only_its_files(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "train.txt").unlink()
    shutil.rmtree(root / "scribbles")
    dataset = open_dataset(config(root), seed=0, work=None, splits=("eval",))
    check_dataset(dataset, config(root))
    assert dataset.train == []
    with pytest.raises(ValueError, match="splits: 'val'"):
        open_dataset(config(root), seed=0, work=None, splits=("val",))


def test_scribbles_from_another_folder(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "scribbles").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"scribbles/a\.png: no training scribble .* for image 'a'"):
        open_and_check(config(root))
    dataset = open_and_check(config(root, scribbles=str(tmp_path / "elsewhere")))
    assert dataset.train[0].scribble == tmp_path / "elsewhere" / "a.png"
    (tmp_path / "elsewhere").rename(root / "second")
    assert open_and_check(config(root, scribbles="second")).train[0].scribble == root / "second" / "a.png"


def test_class_names(tmp_path):
    root = make_folder(tmp_path / "d")
    assert open_and_check(config(root, classes=["x", "y", "z"])).classes == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"classes\.json: 3 classes, but data\.num_classes is 4"):
        open_and_check(config(root, num_classes=4))
    with pytest.raises(UserError, match="class 'x' is named twice"):
        open_and_check(config(root, classes=["x", "y", "x"]))
    with pytest.raises(UserError, match=r"data\.exclude_from_mean: class 3, but there are 3 classes"):
        open_and_check(config(root, exclude_from_mean=[3]))
    for content, message in [
        ("{", "not JSON"),
        ('{"a": 1}', "expected a JSON list"),
        ('["a"]', "at least 2"),
    ]:
        (root / "classes.json").write_text(content)
        with pytest.raises(UserError, match=rf"classes\.json: .*{message}"):
            open_and_check(config(root))
    (root / "classes.json").unlink()
    assert open_and_check(config(root, num_classes=3)).classes == ["class 0", "class 1", "class 2"]
    with pytest.raises(UserError, match=r"classes\.json: no such file, and neither data\.classes"):
        open_and_check(config(root))


def test_channel_statistics():
    mean, std = channel_statistics(DataConfig())
    np.testing.assert_allclose(mean, [0.485, 0.456, 0.406], rtol=1e-6)  # float32
    np.testing.assert_allclose(std, [0.229, 0.224, 0.225], rtol=1e-6)
    # ImageNet's own mean serves other numbers of channels by its average.
    np.testing.assert_allclose(channel_statistics(DataConfig(channels=5))[0], [0.449] * 5, rtol=1e-6)
    np.testing.assert_allclose(channel_statistics(DataConfig(channels=2, mean=[0.5], std=[0.1, 0.2]))[0], [0.5, 0.5])
    with pytest.raises(UserError, match=r"data\.mean: 2 values for 3 channels"):
        channel_statistics(DataConfig(mean=[0.1, 0.2]))
    with pytest.raises(UserError, match=r"data\.std: .* expected positive"):
        channel_statistics(DataConfig(std=[0.0]))


def bad_label_value(root):
    png(root / "labels" / "ü.png", mask(classes=7))


def break_image(root):
    path = root / "images" / "b.jpg"
    path.write_bytes(path.read_bytes()[:900])


def empty_scribbles(root):
    for path in (root / "scribbles").iterdir():
        png(path, np.full((40, 56), 255, np.uint8))


def empty_eval(root):
    for path in (root / "labels").iterdir():
        png(path, np.full((40, 56), 255, np.uint8))


def png_checksum(root):
    path = root / "scribbles" / "a.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 4 + 5] ^= 0xFF
    path.write_bytes(data)


BAD_INPUT = {
    "no images folder": (lambda r: shutil.rmtree(r / "images"), r"d/images: no such folder \(images\)"),
    "no labels folder": (lambda r: shutil.rmtree(r / "labels"), r"labels/c d\.png: no mask for image 'c d'"),
    "no scribbles folder": (
        lambda r: shutil.rmtree(r / "scribbles"),
        r"scribbles/a\.png: no training scribble",
    ),
    "no list": (lambda r: (r / "train.txt").unlink(), r"train\.txt: no such list \(data\.train_list\)"),
    "empty list": (
        lambda r: (r / "train.txt").write_text("\n \n"),
        r"train\.txt: the list is empty \(data\.train_list",
    ),
    "binary list": (lambda r: (r / "train.txt").write_bytes(jpeg()), r"train\.txt: not a text file"),
    "list with zeros": (lambda r: (r / "train.txt").write_bytes(b"a\0\n"), r"train\.txt: not a text file"),
    "list is a folder": (
        lambda r: ((r / "train.txt").unlink(), (r / "train.txt").mkdir()),
        r"train\.txt: cannot be read: Is a directory",
    ),
    "twice": (lambda r: (r / "train.txt").write_text("a\nb\na.jpg\n"), r"train\.txt: 'a' is listed twice"),
    "path in list": (
        lambda r: (r / "train.txt").write_text("images/a.jpg\n"),
        r"'images/a\.jpg' is a path; expected",
    ),
    "listed, not there": (
        lambda r: (r / "train.txt").write_text("a\nzz\n"),
        r"images/zz \(\.jpg .*\): no such image, but .*train\.txt lists it",
    ),
    "listed with ending, not there": (
        lambda r: (r / "train.txt").write_text("a.png\n"),
        r"images/a\.png: no such image, but .*train\.txt lists it",
    ),
    "two images of a name": (
        lambda r: (r / "images" / "a.png").write_bytes(b"x"),
        r"images: 'a' could be any of a\.jpg, a\.png; expected one file",
    ),
    "no mask": (lambda r: (r / "labels" / "ü.png").unlink(), r"labels/ü\.png: no mask for image 'ü'"),
    "no scribble": (
        lambda r: (r / "scribbles" / "b.png").unlink(),
        r"scribbles/b\.png: no training scribble",
    ),
    "mask size": (
        lambda r: png(r / "labels" / "ü.png", mask(size=(30, 20))),
        r"labels/ü\.png: 20 x 30 pixels, but .*images/ü\.jpg has 56 x 40 \(width x height\)",
    ),
    "scribble size": (
        lambda r: png(r / "scribbles" / "a.png", mask(size=(40, 57))),
        r"scribbles/a\.png: 57 x 40 pixels, but .*images/a\.jpg has 56 x 40",
    ),
    "mask value": (
        bad_label_value,
        r"labels/ü\.png: label value 6, but there are 3 classes \(0 to 2; 255 = ignore\)",
    ),
    "scribble value": (
        lambda r: png(r / "scribbles" / "b.png", mask(classes=5)),
        r"scribbles/b\.png: label value 4, but there are 3 classes",
    ),
    "rgb mask": (
        lambda r: png(r / "labels" / "ü.png", mask(), "RGB"),
        r"labels/ü\.png: a colour image \(mode RGB\) where a PNG of class indices",
    ),
    "cut jpeg": (break_image, r"images/b\.jpg: corrupt or truncated image"),
    "text jpeg": (lambda r: (r / "images" / "b.jpg").write_text("hello"), r"images/b\.jpg: not an image"),
    "empty jpeg": (
        lambda r: (r / "images" / "b.jpg").write_bytes(b""),
        r"images/b\.jpg: the file is empty \(0 bytes\)",
    ),
    "broken png": (png_checksum, r"scribbles/a\.png: corrupt or truncated image"),
    "nothing scribbled": (empty_scribbles, r"d/scribbles: no scribbled pixel in all 2 training images"),
    "nothing labelled": (empty_eval, r"d/labels: no labelled pixel in the masks of all 2 images of val\.txt"),
    "dangling link": (
        lambda r: ((r / "images" / "b.jpg").unlink(), os.symlink("nowhere", r / "images" / "b.jpg")),
        r"images/b\.jpg: cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path, case):
    spoil, message = BAD_INPUT[case]
    root = make_folder(tmp_path / "d")
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        open_and_check(config(root))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bad_input_in_training_masks_counts_only_where_they_are_used(tmp_path):
    root = make_folder(tmp_path / "d")
    png(root / "labels" / "a.png", mask(classes=9))
    open_and_check(config(root))
    with pytest.raises(UserError, match=r"labels/a\.png: label value 8"):
        open_and_check(config(root), labels=True)
    for name in "ab":
        png(root / "labels" / f"{name}.png", np.full((40, 56), 255, np.uint8))
    with pytest.raises(UserError, match="no labelled pixel in the masks of all 2 training images"):
        open_and_check(config(root), labels=True)
    shutil.rmtree(root / "scribbles")
    open_and_check(config(root), scribbles=False)


def test_the_first_bad_file_in_list_order_is_named(tmp_path):
    root = make_folder(tmp_path / "d", tuple(f"n{index}" for index in range(20)))
    for index in (8, 3, 5):
        (root / "images" / f"n{index}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"n3\.jpg"):
        open_and_check(config(root))


def test_a_single_image_without_scribbles_is_a_warning(tmp_path, caplog):
    root = make_folder(tmp_path / "d")
    png(root / "scribbles" / "b.png", np.full((40, 56), 255, np.uint8))
    with caplog.at_level(logging.WARNING, "cc4s"):
        open_and_check(config(root))
    assert "1 of 2 training images have no scribbled pixel (first: b)" in caplog.text


def test_bad_roots_and_formats(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: empty"):
        open_and_check(DataConfig())
    with pytest.raises(UserError, match=r"nowhere: no such folder \(data\.root\)"):
        open_and_check(config(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: not a folder \(data\.root\)"):
        open_and_check(config(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data\.format: 'coco'; expected folder, voc"):
        open_and_check(config(tmp_path, format="coco"))
    with pytest.raises(UserError, match=r"data\.channels: 0"):
        open_and_check(config(tmp_path, channels=0))


def test_wrong_channels(tmp_path):
    root = make_folder(tmp_path / "d")
    np.save(root / "images" / "b.npy", np.zeros((40, 56, 4), np.uint8))
    (root / "images" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"images/b\.npy: 4 channels, but data\.channels is 3"):
        open_and_check(config(root))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_short_work_is_silent_elsewhere(tmp_path, capsys, monkeypatch, terminal):
    root = make_folder(tmp_path / "d")
    dataset = open_dataset(config(root), seed=0, work=None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    check_dataset(dataset, config(root), labels=True, progress=True)
    assert ("checking data" in capsys.readouterr().err) == terminal


XML = """<annotation><filename>x1.jpg</filename>
<size><width>56</width><height>40</height><depth>3</depth></size>
<polygon><tag>background</tag><point><X>5</X><Y>5</Y></point><point><X>30</X><Y>5</Y></point></polygon>
<polygon><tag>plane</tag><point><X>10</X><Y>20</Y></point><point><X>10</X><Y>30</Y></point>
<point><X>40.4</X><Y>30</Y></point></polygon>
<polygon><tag>tvmonitor</tag><point><X>50</X><Y>35</Y></point></polygon>
<polygon><tag>person</tag></polygon></annotation>"""


def make_voc(root, *, labels="SegmentationClassAug", lists="Segmentation", mode="L"):
    for index in range(4):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages" / f"x{index}.jpg").write_bytes(jpeg(index))
        png(root / labels / f"x{index}.png", mask(index, classes=21), mode)
    folder = root / "ImageSets" / lists
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("x0\nx1\n")
    (folder / "val.txt").write_text("x2\nx3\n")
    (folder / "test.txt").write_text("y1\n")
    scribbles = root / "scribble_annotation" / "pascal_2012"
    scribbles.mkdir(parents=True)
    for index in range(2):
        (scribbles / f"x{index}.xml").write_text(XML)
    return root


@pytest.mark.parametrize("inner", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_any_parent(tmp_path, inner):
    root = make_voc(tmp_path / inner)
    dataset = open_and_check(config(tmp_path, format="voc"))
    assert dataset.classes == list(VOC_CLASSES)
    assert len(VOC_CLASSES) == 21
    # VOC's test list has no masks: evaluation is on val.
    assert (dataset.eval_name, names(dataset.eval)) == ("val", ["x2", "x3"])
    assert dataset.train[1].scribble == root / "scribble_annotation" / "pascal_2012" / "x1.xml"


def test_voc_original_masks_and_augmented_lists(tmp_path):
    root = make_voc(tmp_path, labels="SegmentationClass", mode="P")
    (root / "ImageSets" / "SegmentationAug").mkdir()
    (root / "ImageSets" / "SegmentationAug" / "trainaug.txt").write_text("x0\nx1\nx3\n")
    dataset = open_and_check(config(tmp_path, format="voc", train_list="train"), labels=True)
    assert dataset.train[0].label == root / "SegmentationClass" / "x0.png"
    options = config(tmp_path, format="voc", train_list="train_aug")
    assert len(open_dataset(options, seed=0, work=None).train) == 3
    # Masks of the augmented set win, the original ones fill in.
    png(root / "SegmentationClassAug" / "x0.png", mask(classes=21), "L")
    dataset = open_and_check(config(tmp_path, format="voc"), labels=True)
    assert [entry.label.parent.name for entry in dataset.train] == [
        "SegmentationClassAug",
        "SegmentationClass",
    ]


def test_voc_pairs_of_paths(tmp_path):
    root = make_voc(tmp_path)
    path = root / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("/JPEGImages/x0.jpg /SegmentationClassAug/x0.png\n/JPEGImages/x1.jpg\n")
    dataset = open_and_check(config(tmp_path, format="voc"), labels=True)
    assert names(dataset.train) == ["x0", "x1"]
    assert dataset.train[0].label == root / "SegmentationClassAug" / "x0.png"
    path.write_text("/JPEGImages/x0.jpg /SegmentationClassAug/x9.png\n")
    with pytest.raises(UserError, match=r"SegmentationClassAug/x9\.png: no such file, but .*train\.txt lists it"):
        open_and_check(config(tmp_path, format="voc"))


def test_scribblesup_strokes(tmp_path):
    make_voc(tmp_path)
    dataset = open_and_check(config(tmp_path, format="voc"))
    from cc4s.data import read_scribble

    drawn = read_scribble(dataset.train[1].scribble, dataset.classes)
    assert drawn.shape == (40, 56)
    assert set(np.unique(drawn)) == {0, 1, 20, 255}
    # Lines of three pixels along the given points.
    assert (drawn[4:7, 5:31] == 0).all()
    assert (drawn[[3, 7], 5:31] == 255).all()
    assert (drawn[20:31, 10] == 1).all()
    assert (drawn[30, 10:41] == 1).all()
    assert drawn[35, 50] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "not XML"),
        ("<annotation/>", "not a ScribbleSup annotation: .* has no height"),
        (XML.replace("<Y>5</Y>", "<Y>up</Y>"), "not a ScribbleSup annotation: could not convert"),
        (XML.replace("plane", "zeppelin"), "class 'zeppelin' is none of the 21 classes"),
        (XML.replace(">40<", ">41<"), r"56 x 41 pixels, but .*x1\.jpg has 56 x 40"),
        (XML.replace(">40<", ">0<"), "image size 56 x 0"),
        (XML.replace("40.4", "nan"), "a stroke with coordinates that are no pixels"),
    ],
)
def test_bad_scribblesup(tmp_path, content, message):
    make_voc(tmp_path)
    (tmp_path / "scribble_annotation" / "pascal_2012" / "x1.xml").write_text(content)
    with pytest.raises(UserError, match=rf"x1\.xml: {message}"):
        open_and_check(config(tmp_path, format="voc"))


def test_voc_png_scribbles(tmp_path):
    root = make_voc(tmp_path / "VOC2012")
    for index in range(2):
        png(tmp_path / "mine" / f"x{index}.png", mask(classes=21))
    dataset = open_and_check(config(tmp_path, format="voc", scribbles="mine"))
    assert dataset.train[0].scribble == tmp_path / "mine" / "x0.png"
    shutil.rmtree(root / "scribble_annotation")
    with pytest.raises(UserError, match=r"scribbles/x0\.png: no training scribble"):
        open_and_check(config(tmp_path, format="voc"))


def test_voc_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"JPEGImages: no such folder, nor in .*VOC2012"):
        open_and_check(config(tmp_path, format="voc"))
    root = make_voc(tmp_path)
    with pytest.raises(UserError, match=r"Segmentation/train_aug\.txt.*: no such list \(data\.train_list\)"):
        open_and_check(config(tmp_path, format="voc", train_list="train_aug"))
    with pytest.raises(UserError, match=r"JPEGImages/y1\.jpg: no such image, but .*test\.txt lists it"):
        open_and_check(config(tmp_path, format="voc", eval_list="test"))
    png(root / "SegmentationClassAug" / "x2.png", np.zeros((40, 56), np.uint8), "RGB")
    with pytest.raises(UserError, match=r"x2\.png: a colour image"):
        open_and_check(config(tmp_path, format="voc"))


def test_pascal_context(tmp_path):
    root = make_voc(tmp_path / "VOC2010", labels="SegmentationClassContext", lists="SegmentationContext")
    png(root / "SegmentationClassContext" / "x2.png", mask(classes=60))
    dataset = open_and_check(config(tmp_path, format="pascal_context", scribbles="generate"), work=tmp_path / "run")
    assert dataset.num_classes == len(CONTEXT_CLASSES) == 60
    assert dataset.eval[0].label == root / "SegmentationClassContext" / "x2.png"


def labelme(shapes, **fields):
    content = {"imageWidth": 56, "imageHeight": 40, "shapes": shapes, **fields}
    return json.dumps(content)


def shape(label, kind, *points):
    return {"label": label, "shape_type": kind, "points": [list(point) for point in points]}


def test_labelme_strokes(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "scribbles" / "a.png").unlink()
    path = root / "scribbles" / "a.json"
    path.write_text(
        labelme(
            [
                shape("k1", "linestrip", (5, 10), (20, 10), (20, 20)),
                shape("2", "rectangle", (30, 25), (40, 35)),
                shape("__ignore__", "line", (30, 30), (40, 30)),
                shape("_background_", "point", (50, 5)),
                shape("k2", "circle", (10, 33), (13, 33)),
            ]
        )
    )
    dataset = open_and_check(config(root))
    from cc4s.data import read_scribble

    drawn = read_scribble(dataset.train[0].scribble, dataset.train[0].classes, 3)
    assert (drawn[9:12, 5:21] == 1).all()
    assert (drawn[26:29, 31:40] == 2).all()
    assert (drawn[30, 31:40] == 255).all()
    assert drawn[5, 50] == 0
    assert (drawn == 0).sum() <= 9
    assert (drawn[33, 8:13] == 2).all()
    for shapes, message in [
        ([shape("cow", "line", (1, 1), (2, 2))], "class 'cow' is none of the 3 classes"),
        ([shape("k1", "mask", (1, 1))], "shape type 'mask'"),
        ([{"label": "k1"}], "not a LabelMe annotation: KeyError"),
    ]:
        path.write_text(labelme(shapes))
        with pytest.raises(UserError, match=rf"a\.json: {message}"):
            open_and_check(config(root))
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"a\.json: not a LabelMe annotation"):
        open_and_check(config(root))


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_generated_scribbles(tmp_path):
    root = make_folder(tmp_path / "d")
    shutil.rmtree(root / "scribbles")
    before = snapshot(root)
    options = config(root, scribbles="generate")
    dataset = open_and_check(options, work=tmp_path / "run")
    assert snapshot(root) == before
    for entry in dataset.train:
        assert entry.scribble == tmp_path / "run" / "scribbles" / f"{entry.name}.png"
        drawn, label = read_index_png(entry.scribble, 3), read_index_png(entry.label, 3)
        with Image.open(entry.scribble) as image:
            assert image.mode == "P"
        assert (drawn[drawn != 255] == label[drawn != 255]).all()
        assert set(np.unique(drawn)) == {0, 1, 2, 255}
    written = snapshot(tmp_path / "run")
    # A second run finds them, and redraws exactly what is gone.
    (tmp_path / "run" / "scribbles" / "b.png").unlink()
    open_and_check(options, work=tmp_path / "run")
    assert snapshot(tmp_path / "run") == written
    with pytest.raises(UserError, match=r"scribbles\.json: generated with .*'seed': 0.*'seed': 1"):
        open_dataset(options, seed=1, work=tmp_path / "run")
    assert snapshot(tmp_path / "run") == written
    with pytest.raises(ValueError, match="work: "):
        open_dataset(options, seed=0, work=None)


@pytest.mark.parametrize("case", ["no mask", "mask value", "cut jpeg", "no labels folder"])
def test_nothing_is_generated_from_bad_input(tmp_path, case):
    root = make_folder(tmp_path / "d")
    spoil, message = BAD_INPUT[case]
    spoil(root)
    if case == "no labels folder":
        message = r"labels/a\.png: no mask for image 'a'"
    with pytest.raises(UserError, match=message):
        open_dataset(config(root, scribbles="generate"), seed=0, work=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_synthetic(tmp_path):
    options = DataConfig(format="synthetic", synthetic_train=3, synthetic_eval=2, synthetic_size=64)
    dataset = open_and_check(options, labels=True, work=tmp_path / "one")
    assert (len(dataset.train), len(dataset.eval), dataset.num_classes) == (3, 2, 6)
    written = snapshot(tmp_path / "one")
    (tmp_path / "one" / "synthetic" / "labels" / "train_0001.png").unlink()
    open_and_check(options, work=tmp_path / "one")
    assert snapshot(tmp_path / "one") == written
    open_dataset(options, seed=0, work=tmp_path / "two")
    assert snapshot(tmp_path / "two") == written
    open_dataset(options, seed=1, work=tmp_path / "three")
    assert snapshot(tmp_path / "three") != written
    with pytest.raises(UserError, match=r"synthetic\.json: generated with"):
        open_dataset(options, seed=1, work=tmp_path / "one")
    assert snapshot(tmp_path / "one") == written
    with pytest.raises(UserError, match=r"data\.synthetic_size: 8"):
        open_dataset(DataConfig(format="synthetic", synthetic_size=8), seed=0, work=tmp_path / "four")


def test_synthetic_colour_helps_but_does_not_suffice():
    from cc4s.data.synthetic import CLASSES, draw_scene

    def pixels(seeds):
        scenes = [draw_scene(np.random.default_rng(seed), 64) for seed in seeds]
        colours = np.concatenate([(image // 32).reshape(-1, 3) @ np.array([64, 8, 1]) for image, _ in scenes])
        return colours, np.concatenate([label.ravel() for _, label in scenes])

    colours, labels = pixels(range(50))
    counts = np.zeros((512, len(CLASSES)))
    np.add.at(counts, (colours, labels), 1)
    share = np.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert (share[1:] > 0.03).all()
    assert 0.3 < share[0] < 0.75
    # The best rule on colour alone, every class counted alike.
    rule = (counts / counts.sum(0)).argmax(1)
    colours, labels = pixels(range(100, 125))
    recall = [(rule[colours[labels == index]] == index).mean() for index in range(len(CLASSES))]
    assert 1.5 / len(CLASSES) < np.mean(recall) < 0.7
