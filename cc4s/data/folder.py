"""The plain layout: a folder of images, a folder of masks, a folder of scribbles, and lists.

    images/NAME.{jpg,jpeg,png,tif,tiff,bmp,npy}
    labels/NAME.png          class indices, 255 = ignore; needed for evaluation
    scribbles/NAME.png       class indices, 255 = unlabelled; or NAME.xml (ScribbleSup), NAME.json (LabelMe)
    train.txt, val.txt, test.txt    one NAME per line, with or without ending; blank lines do not count
    classes.json             a list of class names; optional where the configuration names them

Evaluation is on `data.eval_list`, else on test.txt, else (missing or empty) on val.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cc4s.config import DataConfig
from cc4s.data.dataset import (
    GENERATE,
    Dataset,
    Entry,
    Finder,
    check_duplicates,
    class_names,
    data_root,
    default_eval_list,
    image_finder,
    make_dataset,
    read_list,
    scribble_finder,
    split_suffix,
    take_evenly,
)
from cc4s.errors import UserError


def open_folder(config: DataConfig, splits: Sequence[str]) -> Dataset:
    """Opens a dataset in the plain layout; see `cc4s.data.open_dataset`."""
    root = data_root(config)
    classes = class_names(config, root / "classes.json")
    # An absolute path stands for itself.
    scribble_folder = root / ("scribbles" if config.scribbles == GENERATE else Path(config.scribbles).expanduser())
    images = image_finder(root / "images")
    labels = Finder(root / "labels", (".png",))
    scribbles = scribble_finder(scribble_folder)

    def entries(path: Path, key: str, limit: int) -> list[Entry]:
        found: list[Entry] = []
        for line in read_list(path, key):
            if "/" in line:
                raise UserError(f"{path}: '{line}' is a path; expected the name of a file in {root / 'images'}")
            name, suffix = split_suffix(line)
            image = images.find(name, suffix)
            if image is None and suffix:
                # A name may itself end like an image: "scan.npy" for scan.npy.jpg.
                image = images.find(line)
            if image is None:
                tried = str(root / "images" / line) if suffix else images.tried(line)
                raise UserError(f"{tried}: no such image, but {path} lists it")
            name = image.stem
            scribble = None if config.scribbles == GENERATE else scribbles.find(name)
            found.append(Entry(name, image, labels.find(name), scribble, tuple(classes)))
        check_duplicates(path, [entry.name for entry in found])
        return take_evenly(found, limit)

    train, evaluation, eval_name = [], [], config.eval_list
    if "train" in splits:
        train = entries(root / f"{config.train_list}.txt", "data.train_list", config.limit_train)
    if "eval" in splits:
        eval_name = eval_name or default_eval_list([root / "test.txt", root / "val.txt"])
        evaluation = entries(root / f"{eval_name}.txt", "data.eval_list", config.limit_eval)
    return make_dataset(classes, train, evaluation, eval_name, root / "labels", scribble_folder)
