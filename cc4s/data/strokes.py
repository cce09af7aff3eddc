"""Strokes as vectors: ScribbleSup XML and LabelMe JSON, drawn into index masks.

ScribbleSup XML: `<annotation>` with `<size><width/><height/></size>` and one `<polygon>` per stroke, each
with `<tag>` (a class name) and `<point><X/><Y/></point>` items in pixels; a stroke is an open polyline.

LabelMe JSON: `imageWidth`, `imageHeight` and `shapes`, each with `label` (a class name or index), `points`
and `shape_type`: `linestrip`, `line` and `point` are strokes; `polygon`, `rectangle` and `circle` are filled.
The label `_background_` is class 0; `__ignore__` and `_ignore_` are unlabelled.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from cc4s.data.images import Array, check_index_range, decode_index_png, ignore_index, read_bytes
from cc4s.errors import UserError

STROKE_WIDTH = 3
SCRIBBLE_SUFFIXES = (".png", ".xml", ".json")

# Names that ScribbleSup and others use for VOC's classes.
_ALIASES = {
    "plane": "aeroplane",
    "airplane": "aeroplane",
    "bike": "bicycle",
    "table": "diningtable",
    "motor": "motorbike",
    "motorcycle": "motorbike",
    "people": "person",
    "plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
    "monitor": "tvmonitor",
    "bg": "background",
}


def draw_line(shape: tuple[int, ...], points: Array, width: int) -> Array:
    """A polyline as a bool mask of `shape`; points (n, 2) are x, y in pixels; one point gives a dot."""
    canvas = np.zeros(shape, np.uint8)
    fixed = np.rint(points * 8).astype(np.int32)  # three fractional bits
    cv2.polylines(canvas, [np.concatenate([fixed, fixed[-1:]])], False, 1, 1, shift=3)
    # OpenCV's own thick lines are up to two pixels too wide.
    return cv2.dilate(canvas, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))) > 0


class _Canvas:
    """A mask that strokes are drawn on; later strokes lie over earlier ones."""

    def __init__(self, path: Path, size: tuple[int, int], classes: Sequence[str]) -> None:
        self.path = path
        self.classes = classes
        self.names = {_plain(name): index for index, name in enumerate(classes)}
        self.ignore = ignore_index(len(classes))
        height, width = size
        if not (0 < height <= 65535 and 0 < width <= 65535):
            raise UserError(f"{path}: image size {width} x {height}; expected positive numbers")
        self.mask = np.full(size, self.ignore, np.uint8 if self.ignore <= 255 else np.uint16)

    def value(self, name: str) -> int:
        plain = _plain(name)
        for candidate in (plain, _ALIASES.get(plain, "")):
            if candidate in self.names:
                return self.names[candidate]
        if name.strip().isdigit() and int(name) < len(self.classes):
            return int(name)
        if name in ("__ignore__", "_ignore_"):
            return self.ignore
        if plain == "background":
            return 0
        known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        raise UserError(f"{self.path}: class '{name}' is none of the {len(self.classes)} classes ({known})")

    def stroke(self, points: Array, value: int) -> None:
        self._check(points)
        self.mask[draw_line(self.mask.shape, points, STROKE_WIDTH)] = value

    def area(self, points: Array, value: int) -> None:
        self._check(points)
        cv2.fillPoly(self.mask, [np.rint(points * 8).astype(np.int32)], value, shift=3)

    def disc(self, centre: Array, radius: float, value: int) -> None:
        self._check(centre[None])
        cv2.circle(self.mask, _pair(np.rint(centre * 8)), max(1, round(radius * 8)), value, cv2.FILLED, shift=3)

    def _check(self, points: Array) -> None:
        if not np.isfinite(points).all() or np.abs(points).max() > 1e6:
            raise UserError(f"{self.path}: a stroke with coordinates that are no pixels")


def _pair(point: Array) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def read_scribble(path: str | Path, classes: Sequence[str], num_classes: int = 0) -> Array:
    """Reads scribbles from an index PNG, ScribbleSup XML or LabelMe JSON.

    Returns:
        (H, W) class indices as `read_index_png` gives them, the ignore label where there is no stroke.

    Raises:
        UserError: an unreadable file, another format, an unknown class.
    """
    path = Path(path)
    data = read_bytes(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        mask, _ = decode_index_png(path, data)
        return check_index_range(path, mask, num_classes or len(classes))
    if suffix in (".xml", ".json") and not classes:
        raise UserError(f"{path}: strokes name their classes, but no class names are known (classes.json)")
    if suffix == ".xml":
        return _draw_xml(path, data, classes)
    if suffix == ".json":
        return _draw_labelme(path, data, classes)
    raise UserError(f"{path}: scribbles are .png, .xml (ScribbleSup) or .json (LabelMe) files")


def _draw_xml(path: Path, data: bytes, classes: Sequence[str]) -> Array:
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not XML: {error}") from error
    try:
        size = int(_text(root, ".//size/height")), int(_text(root, ".//size/width"))
        strokes = []
        for item in root.iter("polygon"):
            points = [(float(_text(point, "X")), float(_text(point, "Y"))) for point in item.iter("point")]
            strokes.append((_text(item, "tag"), np.array(points, np.float64).reshape(-1, 2)))
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: not a ScribbleSup annotation: {error}") from error
    canvas = _Canvas(path, size, classes)
    for tag, line in strokes:
        value = canvas.value(tag)
        if len(line):
            canvas.stroke(line, value)
    return canvas.mask


def _text(element: ElementTree.Element, name: str) -> str:
    found = element.findtext(name)
    if found is None or not found.strip():
        raise LookupError(f"<{element.tag}> has no {name.rsplit('/', 1)[-1]}")
    return found.strip()


def _draw_labelme(path: Path, data: bytes, classes: Sequence[str]) -> Array:
    try:
        content = json.loads(data.decode("utf-8-sig"))
        size = int(content["imageHeight"]), int(content["imageWidth"])
        shapes = [
            (
                str(shape["label"]),
                str(shape.get("shape_type") or "polygon"),
                np.array(shape["points"], np.float64).reshape(-1, 2),
            )
            for shape in content["shapes"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a LabelMe annotation: {type(error).__name__}: {error}") from error
    canvas = _Canvas(path, size, classes)
    for label, kind, points in shapes:
        value = canvas.value(label)
        if len(points) == 0:
            continue
        if kind in ("linestrip", "line", "point"):
            canvas.stroke(points, value)
        elif kind == "polygon":
            canvas.area(points, value)
        elif kind == "rectangle" and len(points) == 2:
            (left, top), (right, bottom) = points
            canvas.area(np.array([[left, top], [right, top], [right, bottom], [left, bottom]]), value)
        elif kind == "circle" and len(points) == 2:
            canvas.disc(points[0], float(np.linalg.norm(points[1] - points[0])), value)
        else:
            raise UserError(
                f"{path}: shape type '{kind}' with {len(points)} points; "
                "expected linestrip, line, point, polygon, rectangle or circle"
            )
    return canvas.mask
