"""Scribbles made from masks, and scribbles made poorer: shorter strokes, fewer strokes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy import sparse
from scipy.ndimage import gaussian_filter1d
from scipy.sparse.csgraph import dijkstra

from cc4s.data.images import (
    IGNORE,
    Array,
    check_index_range,
    decode_index_png,
    encode_index_png,
    ignore_index,
    read_bytes,
    read_index_png,
    voc_palette,
)
from cc4s.data.strokes import SCRIBBLE_SUFFIXES, STROKE_WIDTH, draw_line, read_scribble
from cc4s.errors import UserError
from cc4s.files import TEMPORARY_PREFIX, atomic_write
from cc4s.progress import progress_bar

# Regions are traced on a grid of at most this many cells a side.
_GRID = 64
_DIAGONAL = math.sqrt(2.0)


def name_rng(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one image: a function of the seed and its name alone."""
    return np.random.default_rng((seed, zlib.crc32(name.encode("utf-8"))))


def generate_scribbles(
    label: Array,
    *,
    rng: np.random.Generator,
    num_classes: int = 0,
    width: int = 0,
    min_area: float = 0.001,
) -> Array:
    """Draws scribbles as a person would.

    Every region gets a stroke along its middle; a large branch off that stroke may get a second one.

    Args:
        label: (H, W) class indices with the ignore label; ignored pixels are never scribbled, and no stroke
            leaves the region of its class.
        rng: the source of all randomness.
        num_classes: above 255 the ignore label is 65535.
        width: of the strokes in pixels; 0 is 3, or 2 on images under about 200 pixels.
        min_area: regions (connected, of one class) below this share of the image, or below 30 pixels, get
            none.

    Returns:
        (H, W), same dtype: class indices on the strokes, the ignore label elsewhere.
    """
    ignore = ignore_index(num_classes)
    scribble = np.full_like(label, ignore)
    smallest = max(30.0, min_area * label.size)
    width = width or min(STROKE_WIDTH, max(2, round(min(label.shape) / 80)))
    for value in np.unique(label):
        if value == ignore:
            continue
        count, regions, boxes, _ = cv2.connectedComponentsWithStats((label == value).astype(np.uint8), connectivity=4)
        for region in range(1, count):
            left, top, box_width, box_height, area = (int(number) for number in boxes[region])
            if area < smallest:
                continue
            window = (slice(top, top + box_height), slice(left, left + box_width))
            inside = regions[window] == region
            scribble[window][_draw_region(inside, rng, width)] = value
    return scribble


def _draw_region(inside: Array, rng: np.random.Generator, width: int) -> Array:
    """Strokes in one region: bool (h, w) in, bool (h, w) within it out."""
    # Keep a hand's distance from the border where the region is wide enough.
    depth = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    far = depth > min(2.0, 0.5 * float(depth.max()))
    strokes = np.zeros_like(inside)
    for line in _trace(inside, rng):
        strokes |= draw_line(inside.shape, line[:, ::-1], width) & far
    if not strokes.any():
        deepest = np.argwhere(depth == depth.max())[0]
        strokes = draw_line(inside.shape, deepest[None, ::-1].astype(np.float64), width) & inside
    return strokes


def _trace(inside: Array, rng: np.random.Generator) -> list[Array]:
    """The lines of a region, each (n, 2) rows and columns in pixels; none where the region is too small."""
    factor = max(1, math.ceil(max(inside.shape) / _GRID))
    rows, columns = (math.ceil(side / factor) for side in inside.shape)
    padded = np.zeros((rows * factor, columns * factor), np.float32)
    padded[: inside.shape[0], : inside.shape[1]] = inside
    cells = padded.reshape(rows, factor, columns, factor).mean(axis=(1, 3)) >= 0.5
    count, parts, boxes, _ = cv2.connectedComponentsWithStats(cells.astype(np.uint8), connectivity=4)
    if count < 2:
        return []
    cells = parts == 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
    if cells.sum() < 4:
        return []
    depth = cv2.distanceTransform(np.pad(cells, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1][cells]
    places = np.argwhere(cells)
    plain = _graph(cells, np.ones(len(places)))
    # Paths that cost little far from the border run along the middle.
    middle = _graph(cells, (depth.max() / depth) ** 2)

    start = _farthest(plain, int(depth.argmax()))
    end = _farthest(plain, start)
    path = _path(middle, start, end)
    lines = [_hand(places, depth, _cut(path, rng.uniform(0.6, 0.85), rng), rng)]

    reach = dijkstra(plain, indices=path, min_only=True)
    tip = int(reach.argmax())
    if reach[tip] > max(12.0 / factor, 0.35 * len(path)) and rng.random() < 0.8:
        back = _path(middle, tip, int(path[len(path) // 2]))
        branch = np.array([node for node in back if reach[node] > 2], np.int64)
        if len(branch) > 3:
            lines.append(_hand(places, depth, _cut(branch, rng.uniform(0.5, 0.8), rng), rng))
    return [(line + 0.5) * factor - 0.5 for line in lines]


def _graph(cells: Array, cost: Array) -> sparse.csr_matrix:
    """The 8-connected graph of the True cells; an edge costs its length times the mean cost of its ends."""
    number = np.full(cells.shape, -1, np.int64)
    number[cells] = np.arange(cost.size)
    heads, tails, lengths = [], [], []
    height, width = cells.shape
    for down, right, length in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, _DIAGONAL), (1, -1, _DIAGONAL)):
        first = number[: height - down, max(0, -right) : width - max(0, right)]
        second = number[down:, max(0, right) : width + min(0, right)]
        both = (first >= 0) & (second >= 0)
        heads.append(first[both])
        tails.append(second[both])
        lengths.append(np.full(int(both.sum()), length))
    head, tail = np.concatenate(heads), np.concatenate(tails)
    weight = np.concatenate(lengths) * (cost[head] + cost[tail]) / 2
    graph = sparse.coo_matrix((weight, (head, tail)), shape=(cost.size, cost.size)).tocsr()
    return graph + graph.T


def _farthest(graph: sparse.csr_matrix, start: int) -> int:
    return int(dijkstra(graph, indices=start).argmax())


def _path(graph: sparse.csr_matrix, start: int, end: int) -> Array:
    _, before = dijkstra(graph, indices=start, return_predecessors=True)
    path = [end]
    while path[-1] != start:
        path.append(int(before[path[-1]]))
    return np.array(path[::-1], np.int64)


def _cut(path: Array, share: float, rng: np.random.Generator) -> Array:
    """A stretch of the path: people do not draw up to the end."""
    length = max(2, round(share * len(path)))
    first = round((len(path) - length) * rng.uniform(0.3, 0.7))
    return path[first : first + length]


def _hand(places: Array, depth: Array, path: Array, rng: np.random.Generator) -> Array:
    """A smooth line along the path that sways within the region."""
    line = gaussian_filter1d(places[path].astype(np.float64), 1.5, axis=0, mode="nearest")
    if len(line) < 4:
        return line
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(np.linalg.norm(along, axis=1), 1e-6)[:, None]
    sway = gaussian_filter1d(rng.standard_normal(len(line)), max(2.0, len(line) / 7), mode="reflect")
    sway /= max(float(np.abs(sway).max()), 1e-6)
    room = gaussian_filter1d(np.minimum(depth[path], 8.0), 2.0, mode="nearest")
    return line + across * (sway * room * rng.uniform(0.15, 0.45))[:, None]


def _strokes(scribble: Array, ignore: int) -> Iterator[tuple[int, Array, tuple[slice, slice]]]:
    """Every 8-connected stroke of one class: its class, its bool mask within a window, the window."""
    for value in np.unique(scribble):
        if value == ignore:
            continue
        count, parts, boxes, _ = cv2.connectedComponentsWithStats((scribble == value).astype(np.uint8), connectivity=8)
        for part in range(1, count):
            left, top, width, height = (int(number) for number in boxes[part, :4])
            window = (slice(top, top + height), slice(left, left + width))
            yield int(value), parts[window] == part, window


def check_ratio(ratio: float) -> None:
    """Raises `UserError` unless the ratio is in [0, 1]."""
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"ratio: {ratio}; expected a number from 0 to 1")


def shrink_scribbles(scribble: Array, ratio: float, *, ignore: int = IGNORE) -> Array:
    """Keeps the share `ratio` of every connected stroke, around its middle.

    The middle is the stroke's pixel with the smallest largest distance along the stroke; the kept pixels are
    those nearest to it along the stroke, so that a ring becomes one arc. At least a dot of about three pixels
    across stays; smaller ratios keep subsets of larger ones.

    Args:
        scribble: (H, W) class indices, `ignore` where there is no stroke.
        ratio: 0 (a dot per stroke) to 1 (unchanged).

    Raises:
        UserError: `ratio` is not in [0, 1].
    """
    check_ratio(ratio)
    if ratio == 1.0:
        return scribble.copy()
    shrunk = np.full_like(scribble, ignore)
    for value, stroke, window in _strokes(scribble, ignore):
        depth = cv2.distanceTransform(np.pad(stroke, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1][stroke]
        graph = _graph(stroke, np.ones(depth.size))
        first = _farthest(graph, 0)
        from_first = dijkstra(graph, indices=first)
        from_second = dijkstra(graph, indices=int(from_first.argmax()))
        # Of the pixels about as far from both ends, the one in the middle of the stroke's width.
        centre = int((np.maximum(from_first, from_second) - 0.75 * depth).argmin())
        distance = dijkstra(graph, indices=centre)
        kept = distance <= 1.5
        kept[np.argsort(distance, kind="stable")[: round(ratio * distance.size)]] = True
        rows, columns = np.nonzero(stroke)
        shrunk[window][rows[kept], columns[kept]] = value
    return shrunk


def drop_scribbles(scribble: Array, ratio: float, rng: np.random.Generator, *, ignore: int = IGNORE) -> Array:
    """Removes every connected stroke with probability `ratio`.

    One number is drawn per stroke whatever the ratio: with the same generator, more is dropped at a larger
    ratio and nothing comes back.

    Raises:
        UserError: `ratio` is not in [0, 1].
    """
    check_ratio(ratio)
    kept = np.full_like(scribble, ignore)
    for value, stroke, window in _strokes(scribble, ignore):
        if rng.random() >= ratio:
            kept[window][stroke] = value
    return kept


def generate_scribble_folder(
    labels: str | Path,
    out: str | Path,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    num_classes: int = 0,
    width: int = 0,
    progress: bool = False,
) -> int:
    """Writes `out/<name>.png` with scribbles for every mask `labels/<name>.png`.

    Args:
        labels: a folder of index PNGs, or a dataset folder with `labels/` in it.
        out: a new or empty folder, or one that this very call has written (partly) before.
        seed: with the name of the image it determines the strokes.
        names: only these images.
        num_classes: values in masks have to be below it; 0 takes it from the dataset's classes.json, or does
            not check.
        width: of strokes in pixels; 0 suits the image size.

    Returns:
        The number of files.

    Raises:
        UserError: no masks, a bad mask, or `out` holds anything else.
    """
    labels = Path(labels)
    if (labels / "images").is_dir() and not (labels / "labels").is_dir():
        raise UserError(f"{labels / 'labels'}: no such folder")
    if (labels / "labels").is_dir():
        num_classes = num_classes or len(_class_names(labels / "classes.json"))
        labels = labels / "labels"
    files = _list_files(labels, (".png",), "masks (.png)")
    if names is not None:
        by_name = {path.stem: path for path in files}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(f"{labels / (missing[0] + '.png')}: no such mask")
        files = [by_name[name] for name in names]

    def make(path: Path) -> bytes:
        mask = read_index_png(path, num_classes)
        count = num_classes or (0 if mask.dtype == np.uint8 else 65535)
        strokes = generate_scribbles(mask, rng=name_rng(seed, path.stem), num_classes=count, width=width)
        return encode_index_png(strokes, voc_palette(), count)

    return _write_folder(files, Path(out), make, "generating scribbles", progress)


def shrink_folder(
    scribbles: str | Path,
    out: str | Path,
    ratio: float,
    *,
    classes: Sequence[str] = (),
    progress: bool = False,
) -> int:
    """Writes the scribbles of a folder to `out`, every stroke shrunk; see `shrink_scribbles`.

    `scribbles` may also be a dataset folder with `scribbles/` in it. PNGs keep their palette. XML and JSON strokes
    become PNGs and need `classes`, or classes.json in the dataset folder. Arguments, result and errors otherwise as
    for `generate_scribble_folder`.
    """
    check_ratio(ratio)

    def make(path: Path) -> bytes:
        mask, palette = _read_strokes(path, classes)
        return encode_index_png(shrink_scribbles(mask, ratio, ignore=_ignore(mask)), palette)

    files, classes = _scribble_files(Path(scribbles), classes)
    return _write_folder(files, Path(out), make, "shrinking scribbles", progress)


def drop_folder(
    scribbles: str | Path,
    out: str | Path,
    ratio: float,
    seed: int = 0,
    *,
    classes: Sequence[str] = (),
    progress: bool = False,
) -> int:
    """Writes the scribbles of a folder to `out`, each stroke dropped with probability `ratio`.

    Which strokes go is a function of the seed and the image's name; see `drop_scribbles`. Otherwise as
    `shrink_folder`.
    """
    check_ratio(ratio)

    def make(path: Path) -> bytes:
        mask, palette = _read_strokes(path, classes)
        kept = drop_scribbles(mask, ratio, name_rng(seed, path.stem), ignore=_ignore(mask))
        return encode_index_png(kept, palette)

    files, classes = _scribble_files(Path(scribbles), classes)
    return _write_folder(files, Path(out), make, "dropping scribbles", progress)


def _scribble_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Sequence[str]]:
    """The scribbles of a folder, or of a dataset folder with `scribbles/` and classes.json in it."""
    classes = classes or _class_names(folder / "classes.json")
    if (folder / "scribbles").is_dir():
        folder = folder / "scribbles"
    elif (folder / "images").is_dir():
        raise UserError(f"{folder / 'scribbles'}: no such folder")
    return _list_files(folder, SCRIBBLE_SUFFIXES, "scribbles (.png, .xml, .json)"), classes


def _ignore(mask: Array) -> int:
    return IGNORE if mask.dtype == np.uint8 else ignore_index(65535)


def _class_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) else []


def _read_strokes(path: Path, classes: Sequence[str]) -> tuple[Array, Array | None]:
    if path.suffix.lower() != ".png":
        return read_scribble(path, classes), None
    mask, palette = decode_index_png(path, read_bytes(path))
    return check_index_range(path, mask, len(classes)), palette


def _list_files(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    if not files:
        raise UserError(f"{folder}: no {what} in it")
    stems: dict[str, Path] = {}
    for path in files:
        if path.stem in stems:
            raise UserError(f"{path}: there is also {stems[path.stem].name}; expected one file per image")
        stems[path.stem] = path
    return files


def _write_folder(files: list[Path], out: Path, make: Callable[[Path], bytes], title: str, progress: bool) -> int:
    """Makes everything, compares it with what is in `out`, then writes what is missing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists and is no folder")
    try:
        there = {path.name for path in out.iterdir()} if out.exists() else set()
    except OSError as error:
        raise UserError(f"{out}: cannot be read: {error.strerror}") from error
    there = {name for name in there if not name.startswith(TEMPORARY_PREFIX)}
    foreign = there - {f"{path.stem}.png" for path in files}
    if foreign:
        raise UserError(f"{out}: the output folder holds other files ({min(foreign)}); choose an empty one")
    made = {f"{path.stem}.png": make(path) for path in progress_bar(files, title, "image", show=progress)}
    for name in sorted(there):
        if (out / name).read_bytes() != made[name]:
            raise UserError(f"{out / name}: exists with other content; choose an empty output folder")
    for name, data in made.items():
        if name not in there:
            atomic_write(out / name, data)
    return len(made)
