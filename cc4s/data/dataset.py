"""The lists of a dataset: which image, mask and scribble belong together."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cc4s.config import DataConfig
from cc4s.data.images import IMAGE_SUFFIXES, WIDE_IGNORE, Array, voc_palette
from cc4s.data.strokes import SCRIBBLE_SUFFIXES
from cc4s.errors import UserError
from cc4s.progress import progress_bar

GENERATE = "generate"


@dataclass(frozen=True)
class Entry:
    """One image and what is known about it."""

    name: str
    image: Path
    # None where the file does not exist.
    label: Path | None = None
    scribble: Path | None = None
    # Class names, for scribbles that are stored as strokes (XML, JSON).
    classes: tuple[str, ...] = ()


@dataclass
class Dataset:
    """Classes and entries of a dataset, in the order of its lists."""

    classes: list[str]
    # Colours of the classes, (256, 3) uint8; 255 = ignore.
    palette: Array
    train: list[Entry]
    eval: list[Entry]
    # The name of the list that `eval` comes from: "test", "val", ...
    eval_name: str
    # Where masks and scribbles were looked for, for messages.
    label_folder: Path
    scribble_folder: Path

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def open_dataset(
    config: DataConfig,
    *,
    seed: int,
    work: Path | None,
    splits: Sequence[str] = ("train", "eval"),
    progress: bool = False,
) -> Dataset:
    """Opens a dataset: reads its lists and finds its files.

    With `scribbles: generate` the scribbles of the training images are drawn from their masks into
    `work/scribbles`; with `format: synthetic` the whole set is drawn into `work/synthetic`. Files that are
    there are not written again, and before the first is written all images and masks have been decoded
    without an error.

    Args:
        config: what to read; see the layouts in `cc4s.data.folder` and `cc4s.data.voc`.
        seed: of whatever is generated.
        work: the run's own folder; needed only where something is generated.
        splits: "train" and/or "eval"; the other list is not read and stays empty.
        progress: show progress bars.

    Raises:
        UserError: a missing folder, list or image, a bad list, a bad class description.
    """
    from cc4s.data import folder, synthetic, voc

    unknown = [split for split in splits if split not in ("train", "eval")]
    if unknown:
        raise ValueError(f"splits: {unknown[0]!r}; expected 'train' or 'eval'")
    for key in ("num_classes", "limit_train", "limit_eval", "long_side"):
        if getattr(config, key) < 0:
            raise UserError(f"data.{key}: {getattr(config, key)}; expected 0 or more")
    if config.channels < 1:
        raise UserError(f"data.channels: {config.channels}; expected 1 or more")
    channel_statistics(config)
    if config.format == "synthetic":
        if work is None:
            raise ValueError("work: a synthetic dataset needs a folder to be written to")
        return synthetic.open_synthetic(config, seed, work, splits, progress)
    if config.format == "folder":
        dataset = folder.open_folder(config, splits)
    elif config.format in ("voc", "pascal_context"):
        dataset = voc.open_voc(config, splits)
    else:
        raise UserError(f"data.format: '{config.format}'; expected folder, voc, pascal_context or synthetic")
    if config.scribbles == GENERATE and "train" in splits:
        if work is None:
            raise ValueError("work: generated scribbles need a folder to be written to")
        _generate_scribbles(dataset, config, seed, work, progress)
    return dataset


def _generate_scribbles(dataset: Dataset, config: DataConfig, seed: int, work: Path, progress: bool) -> None:
    from cc4s.data.check import check_dataset
    from cc4s.data.images import read_index_png, write_index_png
    from cc4s.data.scribbles import generate_scribbles, name_rng

    folder = work / "scribbles"
    check_stamp(work / "scribbles.json", {"generator": 1, "seed": seed}, write=False)
    dataset.scribble_folder = folder
    missing = [entry for entry in dataset.train if not (folder / f"{entry.name}.png").exists()]
    if missing:
        check_dataset(dataset, config, labels=True, scribbles=False, progress=progress)
        check_stamp(work / "scribbles.json", {"generator": 1, "seed": seed}, write=True)
    for entry in progress_bar(missing, "drawing scribbles", "image", show=progress and bool(missing)):
        assert entry.label is not None  # the check has seen to it
        mask = read_index_png(entry.label, dataset.num_classes)
        strokes = generate_scribbles(mask, rng=name_rng(seed, entry.name), num_classes=dataset.num_classes)
        write_index_png(folder / f"{entry.name}.png", strokes, dataset.palette, dataset.num_classes)
    dataset.train = [replace(entry, scribble=folder / f"{entry.name}.png") for entry in dataset.train]


def check_stamp(path: Path, settings: dict[str, int], *, write: bool) -> None:
    """Guards generated files: what made them stands in a small JSON file beside them.

    Raises:
        UserError: the files that are there were made with other settings.
    """
    from cc4s.files import atomic_write_json

    if path.exists():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable: {error}") from error
        if found != settings:
            raise UserError(f"{path}: generated with {found}, but this run asks for {settings}; choose another folder")
    elif write:
        atomic_write_json(path, settings)


def read_list(path: Path, key: str) -> list[str]:
    """The lines of a list file, without blank ones.

    Raises:
        UserError: missing, unreadable, not text, or nothing in it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such list ({key})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror} ({key})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; expected one image name per line ({key})") from error
    if "\0" in text:
        raise UserError(f"{path}: not a text file; expected one image name per line ({key})")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: the list is empty ({key})")
    return lines


def has_lines(path: Path) -> bool:
    """Whether a list exists and anything stands in it."""
    try:
        return bool(path.read_bytes().strip())
    except OSError:
        return False


def default_eval_list(candidates: Iterable[Path]) -> str:
    """The name of the first list that exists and is not empty.

    Raises:
        UserError: there is none.
    """
    paths = list(candidates)
    for path in paths:
        if has_lines(path):
            return path.stem
    tried = " or ".join(str(path) for path in paths)
    raise UserError(f"{tried}: no such list, or an empty one (data.eval_list)")


def check_duplicates(path: Path, names: Sequence[str]) -> None:
    """Raises `UserError` where a name stands in a list twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{path}: '{name}' is listed twice")
        seen.add(name)


def take_evenly(entries: list[Entry], limit: int) -> list[Entry]:
    """`limit` entries spread evenly over the list, in order; all where `limit` is 0 or too large."""
    if not 0 < limit < len(entries):
        return entries
    return [entries[index * len(entries) // limit] for index in range(limit)]


class Finder:
    """Finds files of a folder by name without ending; the folder is listed once."""

    def __init__(self, folder: Path, suffixes: tuple[str, ...], *, required: str = "") -> None:
        self.folder = folder
        self.suffixes = suffixes
        self.files: dict[str, list[Path]] = {}
        if not folder.is_dir():
            if required:
                raise UserError(f"{folder}: no such folder ({required})")
            return
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
        for path in paths:
            if path.suffix.lower() in suffixes:
                self.files.setdefault(_composed(path.stem), []).append(path)

    def find(self, name: str, suffix: str = "") -> Path | None:
        """The file `name` with any known ending, or with `suffix`; None where there is none.

        Raises:
            UserError: several files have that name.
        """
        found = self.files.get(_composed(name), [])
        if suffix:
            found = [path for path in found if path.suffix.lower() == suffix]
        if len(found) > 1:
            others = ", ".join(path.name for path in found)
            raise UserError(f"{self.folder}: '{name}' could be any of {others}; expected one file")
        return found[0] if found else None

    def tried(self, name: str) -> str:
        """The path that was looked for, for messages."""
        endings = " ".join(self.suffixes)
        return (
            f"{self.folder / name}{self.suffixes[0]}"
            if len(self.suffixes) == 1
            else f"{self.folder / name} ({endings})"
        )


def _composed(name: str) -> str:
    # macOS stores file names decomposed, lists are usually composed.
    return unicodedata.normalize("NFC", name)


def split_suffix(line: str) -> tuple[str, str]:
    """An image name of a list as name and ending; the ending is "" unless it is that of an image."""
    dot = line.rfind(".")
    suffix = line[dot:].lower() if dot > 0 else ""
    return (line[:dot], suffix) if suffix in IMAGE_SUFFIXES else (line, "")


def image_finder(folder: Path) -> Finder:
    return Finder(folder, IMAGE_SUFFIXES, required="images")


def scribble_finder(folder: Path) -> Finder:
    return Finder(folder, SCRIBBLE_SUFFIXES)


def class_names(config: DataConfig, path: Path, defaults: Sequence[str] = ()) -> list[str]:
    """The class names: from the configuration, else from classes.json, else `defaults`, else numbered.

    Raises:
        UserError: classes.json is no list of names; the number of names is not `data.num_classes`; no number
            is known.
    """
    names = list(config.classes)
    source = "data.classes"
    if not names and path.exists():
        source = str(path)
        try:
            content = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise UserError(f"{path}: expected a JSON list of class names")
        names = content
    if not names and config.num_classes in (0, len(defaults)):
        names = list(defaults)
    if not names:
        if not config.num_classes:
            raise UserError(f"{path}: no such file, and neither data.classes nor data.num_classes is given")
        names = [f"class {index}" for index in range(config.num_classes)]
    if config.num_classes and len(names) != config.num_classes:
        raise UserError(f"{source}: {len(names)} classes, but data.num_classes is {config.num_classes}")
    if not 2 <= len(names) <= WIDE_IGNORE:
        raise UserError(f"{source}: {len(names)} classes; expected at least 2 and at most {WIDE_IGNORE}")
    if len(set(names)) != len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"{source}: class '{twice}' is named twice")
    for index in config.exclude_from_mean:
        if not 0 <= index < len(names):
            raise UserError(f"data.exclude_from_mean: class {index}, but there are {len(names)} classes")
    return names


def data_root(config: DataConfig) -> Path:
    """The data folder, or a `UserError`."""
    if not config.root:
        raise UserError("data.root: empty; expected the data folder")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder (data.root)" if not root.exists() else f"{root}: not a folder (data.root)"
        )
    return root


def channel_statistics(config: DataConfig) -> tuple[Array, Array]:
    """Mean and standard deviation per channel, float32 (channels,) each.

    One value serves all channels; ImageNet's three, the default, are averaged where the images do not have
    three.

    Raises:
        UserError: another number of values, or a deviation that is not positive.
    """
    result = []
    default = DataConfig()
    for key in ("mean", "std"):
        values = [float(value) for value in getattr(config, key)]
        if len(values) != config.channels and values == getattr(default, key):
            values = [sum(values) / len(values)]
        if len(values) not in (1, config.channels):
            raise UserError(f"data.{key}: {len(values)} values for {config.channels} channels")
        if not np.isfinite(values).all() or (key == "std" and min(values) <= 0):
            raise UserError(f"data.{key}: {values}; expected {'positive' if key == 'std' else 'finite'} numbers")
        result.append(np.resize(np.array(values, np.float32), config.channels))
    return result[0], result[1]


def make_dataset(
    classes: list[str],
    train: list[Entry],
    evaluation: list[Entry],
    eval_name: str,
    labels: Path,
    scribbles: Path,
) -> Dataset:
    return Dataset(classes, voc_palette(), train, evaluation, eval_name, labels, scribbles)
