"""PASCAL VOC 2012 and Pascal Context, laid out as they are distributed.

    JPEGImages/NAME.jpg
    SegmentationClassAug/NAME.png, else SegmentationClass/NAME.png   (voc: 21 classes, palette or grey)
    SegmentationClassContext/NAME.png                                (pascal_context: 0 = background, 1 to 59)
    ImageSets/SegmentationAug/LIST.txt, else ImageSets/Segmentation/LIST.txt      (voc)
    ImageSets/SegmentationContext/LIST.txt                                        (pascal_context)

`data.root` is the folder with JPEGImages in it (VOC2012, VOC2010), the VOCdevkit above it, or the parent of
that. A line of a list is a name, or a pair of paths "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png".
`train_aug` and `trainaug` mean the same list; an empty `data.train_list` is that one, or train.txt where there is
none. Scribbles are ScribbleSup XML or index PNGs in `data.scribbles`
under `data.root` or the VOC folder; the default name also finds ScribbleSup's own folders (pascal_2012,
pascal_context, scribble_annotation/...). Evaluation is on `data.eval_list`, else on val.txt: VOC's own
test.txt comes without masks.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger("cc4s")

VOC_CLASSES = tuple(
    [
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ]
)
CONTEXT_CLASSES = tuple(
    [
        "background",
        "aeroplane",
        "bag",
        "bed",
        "bedclothes",
        "bench",
        "bicycle",
        "bird",
        "boat",
        "book",
        "bottle",
        "building",
        "bus",
        "cabinet",
        "car",
        "cat",
        "ceiling",
        "chair",
        "cloth",
        "computer",
        "cow",
        "cup",
        "curtain",
        "dog",
        "door",
        "fence",
        "floor",
        "flower",
        "food",
        "grass",
        "ground",
        "horse",
        "keyboard",
        "light",
        "motorbike",
        "mountain",
        "mouse",
        "person",
        "plate",
        "platform",
        "pottedplant",
        "road",
        "rock",
        "sheep",
        "shelves",
        "sidewalk",
        "sign",
        "sky",
        "snow",
        "sofa",
        "table",
        "track",
        "train",
        "tree",
        "truck",
        "tvmonitor",
        "wall",
        "water",
        "window",
        "wood",
    ]
)

_IMAGES = "JPEGImages"


def open_voc(config: DataConfig, splits: Sequence[str]) -> Dataset:
    """Opens PASCAL VOC (`format: voc`) or Pascal Context (`pascal_context`); see `cc4s.data.open_dataset`."""
    context = config.format == "pascal_context"
    given = data_root(config)
    root = _find_root(given, context)
    classes = class_names(config, root / "classes.json", CONTEXT_CLASSES if context else VOC_CLASSES)
    label_names = ["SegmentationClassContext"] if context else ["SegmentationClassAug", "SegmentationClass"]
    list_names = ["SegmentationContext"] if context else ["SegmentationAug", "Segmentation"]
    images = image_finder(root / _IMAGES)
    labels = [Finder(root / name, (".png",)) for name in label_names]
    scribble_folder = _find_scribbles(config.scribbles, [root, given], context)
    scribbles = scribble_finder(scribble_folder)

    def list_paths(name: str) -> list[Path]:
        augmented = ["train_aug", "trainaug"]
        names = [*augmented, "train"] if not name else augmented if name in augmented else [name]
        return [root / "ImageSets" / folder / f"{item}.txt" for folder in list_names for item in names]

    def entries(name: str, key: str, limit: int) -> list[Entry]:
        paths = list_paths(name)
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"{' or '.join(str(item) for item in paths)}: no such list ({key})")
        if not name:
            logger.info("%s: %s", key, path)
        found = []
        for line in read_list(path, key):
            image, label = _read_line(path, line, root, images)
            if label is None:
                label = next((hit for finder in labels if (hit := finder.find(image.stem)) is not None), None)
            scribble = None if config.scribbles == GENERATE else scribbles.find(image.stem)
            found.append(Entry(image.stem, image, label, scribble, tuple(classes)))
        check_duplicates(path, [entry.name for entry in found])
        return take_evenly(found, limit)

    train, evaluation, eval_name = [], [], config.eval_list
    if "train" in splits:
        train = entries(config.train_list, "data.train_list", config.limit_train)
    if "eval" in splits:
        eval_name = eval_name or default_eval_list(list_paths("val"))
        evaluation = entries(eval_name, "data.eval_list", config.limit_eval)
    label_folder = next((finder.folder for finder in labels if finder.folder.is_dir()), labels[-1].folder)
    return make_dataset(classes, train, evaluation, eval_name, label_folder, scribble_folder)


def _find_root(given: Path, context: bool) -> Path:
    years = ("VOC2010", "VOC2012") if context else ("VOC2012",)
    candidates = [given]
    for year in years:
        candidates += [given / year, given / "VOCdevkit" / year]
    for candidate in candidates:
        if (candidate / _IMAGES).is_dir():
            return candidate
    raise UserError(f"{given / _IMAGES}: no such folder, nor in {', '.join(str(path) for path in candidates[1:])}")


def _find_scribbles(name: str, roots: Sequence[Path], context: bool) -> Path:
    names = [Path(name).expanduser()]
    if name == DataConfig().scribbles:
        own = "pascal_context" if context else "pascal_2012"
        names += [Path(own), Path("scribble_annotation") / own, Path("ScribbleAnnotation") / own]
    for item in names:
        for root in roots:
            if (root / item).is_dir():
                return root / item
    return roots[0] / names[0]


def _read_line(path: Path, line: str, root: Path, images: Finder) -> tuple[Path, Path | None]:
    """One line of a list as image and, for a pair of paths, label."""
    if "/" in line:
        # Paths hold no blanks in this form: they are VOC's own names.
        words = [word.lstrip("/") for word in line.split()]
        for word in words[:2]:
            if not (root / word).is_file() or ".." in Path(word).parts:
                raise UserError(f"{root / word}: no such file, but {path} lists it")
        return root / words[0], root / words[1] if len(words) > 1 else None
    name, suffix = split_suffix(line)
    image = images.find(name, suffix)
    if image is None:
        tried = str(root / _IMAGES / line) if suffix else f"{root / _IMAGES / line}.jpg"
        raise UserError(f"{tried}: no such image, but {path} lists it")
    return image, None
