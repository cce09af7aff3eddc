"""Small datasets for the tests of cc4s.data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cc4s.config import DataConfig

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NAMES = ("a", "b", "c d", "ü")


def shared(name: str) -> Path:
    """A folder of real data, or a skip."""
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"the data set {name} is not on this machine")
    return path


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 56), *, grey: bool = False) -> bytes:
    """A JPEG of random blocks; size is (height, width)."""
    shape = (size[0] // 8 + 1, size[1] // 8 + 1) + (() if grey else (3,))
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    pixels = blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def mask(seed: int = 0, size: tuple[int, int] = (40, 56), classes: int = 3) -> np.ndarray:
    """Vertical bands of classes with a rim of 255."""
    label = (np.arange(size[1]) * classes // size[1]).astype(np.uint8)
    label = np.roll(label, seed)[None].repeat(size[0], 0).copy()
    label[0] = 255
    return label


def png(path: Path, values: np.ndarray, mode: str = "P") -> None:
    """Writes values as a PNG of a mode, by Pillow alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    elif mode != image.mode:
        image = image.convert(mode)
    image.save(path)


def make_folder(root: Path, names: tuple[str, ...] = NAMES, classes: int = 3) -> Path:
    """A correct dataset in the plain layout; the names hold a blank and an umlaut."""
    (root / "images").mkdir(parents=True)
    for index, name in enumerate(names):
        (root / "images" / f"{name}.jpg").write_bytes(jpeg(index))
        label = mask(index, classes=classes)
        png(root / "labels" / f"{name}.png", label)
        scribble = np.full_like(label, 255)
        scribble[20, 5:50] = label[20, 5:50]
        png(root / "scribbles" / f"{name}.png", scribble)
    (root / "classes.json").write_text(str([f"k{index}" for index in range(classes)]).replace("'", '"'))
    half = len(names) // 2
    (root / "train.txt").write_text("\n".join(names[:half]) + "\n", "utf-8")
    (root / "val.txt").write_text("\n".join(names[half:]) + "\n", "utf-8")
    return root


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(root=str(root), **options)  # type: ignore[arg-type]
