"""Real data sets, where they are on the machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cc4s.config import AugmentConfig
from cc4s.data import TrainingSet, check_dataset, open_dataset, read_index_png
from cc4s.errors import UserError

from .data_tools import config, shared


def test_acdc_with_real_scribbles():
    options = config(shared("acdc_scribble"), limit_train=30, limit_eval=20)
    dataset = open_dataset(options, seed=0, work=None)
    check_dataset(dataset, options, labels=True)
    assert dataset.classes == ["background", "right_ventricle", "myocardium", "left_ventricle"]
    assert (len(dataset.train), len(dataset.eval), dataset.eval_name) == (30, 20, "test")
    patients = {entry.name[:10] for entry in dataset.train}
    assert len(patients) > 20  # spread evenly over 70
    items = TrainingSet(dataset.train, options, AugmentConfig(crop=225), seed=0, labels="scribbles", num_classes=4)
    sample = items[0, 3]
    # Grey slices, three equal channels.
    assert torch.equal(sample["rgb"][0], sample["rgb"][2])
    assert set(sample["label"].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_all_lists_open():
    dataset = open_dataset(config(shared("acdc_scribble")), seed=0, work=None)
    assert (len(dataset.train), len(dataset.eval)) == (1324, 390)
    dataset = open_dataset(config(shared("msrc21")), seed=0, work=None)
    assert (len(dataset.train), len(dataset.eval), dataset.num_classes) == (276, 257, 21)


def test_msrc_with_generated_scribbles(tmp_path):
    options = config(shared("msrc21"), scribbles="generate", limit_train=12, limit_eval=4)
    dataset = open_dataset(options, seed=0, work=tmp_path)
    check_dataset(dataset, options)
    shares = []
    for entry in dataset.train:
        drawn, label = read_index_png(entry.scribble, 21), read_index_png(entry.label, 21)
        on = drawn != 255
        assert (drawn[on] == label[on]).all()
        shares.append(on.mean())
    # As sparse as what people draw.
    assert 0.005 < np.mean(shares) < 0.05
    assert len(list((tmp_path / "scribbles").iterdir())) == 12


def test_voc_images_with_clicks():
    options = config(shared("voc3"), scribbles="points")
    dataset = open_dataset(options, seed=0, work=None)
    check_dataset(dataset, options, labels=True)
    # test.txt is there, but empty.
    assert (len(dataset.train), dataset.eval_name, dataset.num_classes) == (3, "val", 21)
    with pytest.raises(UserError, match=r"scribbles/2011_000003\.png: no training scribble"):
        check_dataset(open_dataset(config(shared("voc3")), seed=0, work=None), options)


@pytest.mark.parametrize("scribbles", ["scribbles", "scribbles2"])
def test_grabcut_with_both_sets_of_scribbles(scribbles):
    options = config(shared("grabcut20"), scribbles=scribbles)
    dataset = open_dataset(options, seed=0, work=None)
    check_dataset(dataset, options, labels=True)
    assert (len(dataset.train), len(dataset.eval), dataset.classes) == (14, 6, ["background", "object"])
    assert dataset.train[0].scribble.parent.name == scribbles


@pytest.mark.parametrize("name", ["smoke_acdc", "smoke_msrc21"])
def test_smoke_sets(name, tmp_path):
    options = config(shared(name), scribbles="scribbles" if name == "smoke_acdc" else "generate")
    dataset = open_dataset(options, seed=0, work=tmp_path)
    check_dataset(dataset, options, labels=True)
    assert (len(dataset.train), len(dataset.eval), dataset.eval_name) == (8, 4, "val")
