"""A small segmentation problem made from nothing: textured objects on textured ground.

Six classes. Texture tells them apart, colour only partly: the hues of striped and dotted objects overlap, and so do
those of checked and woven ones; one object in seven has any hue at all. Light falls off across the image, objects
hide each other, and there is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from cc4s.config import DataConfig
from cc4s.data.dataset import Dataset, check_stamp
from cc4s.data.folder import open_folder
from cc4s.data.images import Array, write_index_png
from cc4s.data.scribbles import generate_scribbles
from cc4s.errors import UserError
from cc4s.files import atomic_write, atomic_write_json, atomic_write_text
from cc4s.progress import progress_bar

CLASSES = ("ground", "striped", "dotted", "checked", "woven", "smooth")
# Mean and spread of the hue of each class, in turns of the colour circle.
_HUES = ((0.27, 0.05), (0.01, 0.05), (0.11, 0.05), (0.55, 0.05), (0.67, 0.05), (0.86, 0.05))
_ANY_HUE = 1 / 7


def draw_scene(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """One scene: image (size, size, 3) uint8 RGB and mask (size, size) uint8, classes as in `CLASSES`."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64)
    label = np.zeros((size, size), np.uint8)
    image = _paint(0, rows, columns, size, rng)
    # Objects start in different cells of a 3 x 3 grid, so that most of each stays in sight.
    cells = rng.permutation(9)[: int(rng.integers(3, 6))]
    kinds = rng.permutation(5)[: len(cells)] + 1
    for cell, kind in zip(cells, kinds, strict=True):
        centre = (np.array([cell // 3, cell % 3]) + rng.uniform(0.3, 0.7, 2)) * size / 3
        inside = _shape(rows - centre[0], columns - centre[1], size, rng)
        image[inside] = _paint(int(kind), rows, columns, size, rng)[inside]
        label[inside] = kind
    slope = rng.normal(0, 0.12, 2)
    light = 1 + slope[0] * (rows / size - 0.5) * 2 + slope[1] * (columns / size - 0.5) * 2
    image = cv2.GaussianBlur(image * light[:, :, None], (3, 3), 0.6)
    image += rng.normal(0, 0.03, image.shape)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), label


def _shape(rows: Array, columns: Array, size: int, rng: np.random.Generator) -> Array:
    """A round, long or angular outline around the origin."""
    turn = rng.uniform(0, np.pi)
    along = rows * np.cos(turn) + columns * np.sin(turn)
    across = columns * np.cos(turn) - rows * np.sin(turn)
    radius = size * rng.uniform(0.15, 0.22)
    stretch = rng.uniform(1.0, 1.5)
    angle = np.arctan2(along / stretch, across * stretch)
    reach = np.hypot(along / stretch, across * stretch)
    if rng.random() < 0.3:  # a polygon
        corners = int(rng.integers(3, 7))
        sector = 2 * np.pi / corners
        return reach * np.cos((angle + np.pi) % sector - sector / 2) < radius * 0.9
    bumps = sum(
        rng.normal(0, 0.22 / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi)) for order in range(2, 6)
    )
    return reach < radius * (1 + bumps)


def _paint(kind: int, rows: Array, columns: Array, size: int, rng: np.random.Generator) -> Array:
    """The whole picture in the texture and colours of one object, floats (size, size, 3) about [0, 1]."""
    mean, spread = _HUES[kind]
    hue = rng.random() if kind and rng.random() < _ANY_HUE else rng.normal(mean, spread)
    saturation, value = rng.uniform(0.35, 0.75), rng.uniform(0.55, 0.85)
    other = (hue + rng.normal(0, 0.03), saturation * rng.uniform(0.6, 1.1), value * rng.uniform(0.4, 0.6))
    turn = rng.uniform(0, np.pi)
    along = rows * np.cos(turn) + columns * np.sin(turn)
    across = columns * np.cos(turn) - rows * np.sin(turn)
    period = rng.uniform(5.5, 8.0)
    wave = 2 * np.pi / period
    clouds = gaussian_filter(rng.standard_normal((size, size)), size / 16, mode="wrap")
    clouds /= max(float(clouds.std()), 1e-9)
    if kind == 1:
        mix = _step(np.sin(wave * along + 0.4 * clouds))
    elif kind == 2:
        mix = _step(np.cos(wave * along) + np.cos(wave * across) - 0.7)
    elif kind == 3:
        mix = _step(2 * np.sin(wave * along * 0.7) * np.sin(wave * across * 0.7))
    elif kind == 4:
        over = np.sin(wave * 0.7 * along) > 0
        mix = np.where(over, _step(np.sin(wave * 1.4 * across)), _step(np.sin(wave * 1.4 * along)))
    elif kind == 5:
        mix = 0.35 + 0.2 * np.tanh(clouds)
    else:
        grain = gaussian_filter(rng.standard_normal((size, size)), 0.8)
        mix = np.clip(0.45 + 0.15 * clouds + 0.25 * grain / max(float(grain.std()), 1e-9), 0, 1)
    light, dark = _rgb(hue, saturation, value), _rgb(*other)
    return dark + (light - dark) * mix[:, :, None]


def _step(wave: Array) -> Array:
    """A soft edge where the wave changes its sign."""
    return 0.5 + 0.5 * np.tanh(3 * wave)


def _rgb(hue: float, saturation: float, value: float) -> Array:
    import colorsys

    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(1.0, saturation), min(1.0, value)))


def open_synthetic(config: DataConfig, seed: int, work: Path, splits: Sequence[str], progress: bool) -> Dataset:
    """Draws the set into `work/synthetic` (files that are there stay) and opens it in the plain layout."""
    if config.synthetic_train < 1 or config.synthetic_eval < 1:
        raise UserError("data.synthetic_train, data.synthetic_eval: expected at least one image each")
    if not 32 <= config.synthetic_size <= 4096:
        raise UserError(f"data.synthetic_size: {config.synthetic_size}; expected 32 to 4096 pixels")
    if config.channels not in (1, 3):
        raise UserError(f"data.channels: {config.channels}; synthetic images have 3, or 1 as grey")
    root = work / "synthetic"
    settings = {
        "generator": 1,
        "seed": seed,
        "train": config.synthetic_train,
        "eval": config.synthetic_eval,
        "size": config.synthetic_size,
    }
    check_stamp(root / "synthetic.json", settings, write=True)
    lists = {"train": config.synthetic_train, "test": config.synthetic_eval}
    jobs = [(split, index) for split, count in lists.items() for index in range(count)]
    jobs = [job for job in jobs if not (root / "labels" / f"{_name(*job)}.png").exists()]
    for split, index in progress_bar(jobs, "drawing scenes", "image", show=progress and bool(jobs)):
        _write_scene(root, _name(split, index), (seed, int(split == "test"), index), config.synthetic_size)
    for split, count in lists.items():
        text = "".join(f"{_name(split, index)}\n" for index in range(count))
        if not (root / f"{split}.txt").exists():
            atomic_write_text(root / f"{split}.txt", text)
    if not (root / "classes.json").exists():
        atomic_write_json(root / "classes.json", list(CLASSES))
    return open_folder(replace(config, root=str(root), scribbles="scribbles"), splits)


def _name(split: str, index: int) -> str:
    return f"{split}_{index:04d}"


def _write_scene(root: Path, name: str, key: tuple[int, ...], size: int) -> None:
    import io

    image, label = draw_scene(np.random.default_rng(key), size)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    atomic_write(root / "images" / f"{name}.png", buffer.getvalue())
    strokes = generate_scribbles(label, rng=np.random.default_rng((*key, 1)))
    write_index_png(root / "scribbles" / f"{name}.png", strokes)
    # Last: a mask on disk says that the scene is complete.
    write_index_png(root / "labels" / f"{name}.png", label)
