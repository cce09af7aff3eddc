"""Pictures of masks, scribbles and eigenvectors, as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.integer[Any]]

# Captions of the pictures of an image, in the order of the method.
CAPTIONS = ("image", "scribble", "pseudo-label", "prediction", "ground truth")


@dataclass
class ReportImage:
    """What is shown of one image; masks are (H,W) class indices with 255 = none.

    `eigenvectors` are real, (num,h,w) on the feature grid; `eigenvalues` (num,) may be complex.
    """

    name: str
    image: Picture
    scribble: Mask | None = None
    pseudo_label: Mask | None = None
    prediction: Mask | None = None
    label: Mask | None = None
    eigenvectors: npt.NDArray[np.floating[Any]] | None = None
    eigenvalues: npt.NDArray[Any] | Sequence[complex] | None = None


def overlay(image: Picture, mask: Mask, palette: Picture, alpha: float = 0.5, ignore_index: int = 255) -> Picture:
    """An image under the colours of its classes, with the borders between classes drawn solid.

    Args:
        image: (H,W,3) uint8.
        mask: (H,W) class indices.
        palette: (256,3) uint8, the colour of each class.
        alpha: opacity of the colours, 0 to 1.
        ignore_index: pixels with this index show the image as it is.

    Returns:
        (H,W,3) uint8: round((1 - alpha) image + alpha colour); the colour itself on pixels with a 4-neighbour
        of another index (both sides of a border, the image's edge is none).

    Raises:
        ValueError: the sizes differ, or alpha is outside [0, 1].
    """
    _check_size(image, mask)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    colors = _colors(mask, palette)
    opacity = np.where(_borders(mask), 1.0, alpha)
    opacity[mask == ignore_index] = 0.0
    return _blend(image, colors, opacity)


def draw_scribble(
    image: Picture, scribble: Mask, palette: Picture, radius: float | None = None, ignore_index: int = 255
) -> Picture:
    """An image with its scribbles as thick strokes with a white rim.

    Args:
        image: (H,W,3) uint8.
        scribble: (H,W) class indices, `ignore_index` where nothing is drawn.
        palette: (256,3) uint8.
        radius: pixels by which strokes grow; by default 1/160 of the long side. A grown pixel takes the class
            of the nearest scribbled one.
        ignore_index: index of pixels without scribble.
    """
    _check_size(image, scribble)
    drawn = scribble != ignore_index
    if not drawn.any():
        return image.copy()
    if radius is None:
        radius = max(image.shape[:2]) / 160
    distance, nearest = ndimage.distance_transform_edt(~drawn, return_indices=True)
    colors = _colors(scribble[tuple(nearest)], palette)
    result = image.copy()
    result[distance <= radius + max(1.0, radius / 2)] = 255
    stroke = distance <= radius
    result[stroke] = colors[stroke]
    return result


def _check_size(image: Picture, mask: Mask) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask: expected the image's size {image.shape[:2]}, got {mask.shape}")


def _colors(mask: Mask, palette: Picture) -> Picture:
    return np.asarray(palette[mask.astype(np.int64) % len(palette)], np.uint8)


def hex_color(color: Picture) -> str:
    """An RGB colour as #rrggbb."""
    return "#" + "".join(f"{int(channel):02x}" for channel in color)


def _borders(mask: Mask) -> npt.NDArray[np.bool_]:
    border = np.zeros(mask.shape, bool)
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    border[1:] |= down
    border[:-1] |= down
    border[:, 1:] |= right
    border[:, :-1] |= right
    return border


def _blend(image: Picture, colors: Picture, opacity: npt.NDArray[np.floating[Any]]) -> Picture:
    weight = opacity[..., None]
    return np.rint((1.0 - weight) * image + weight * colors).astype(np.uint8)


def fit_size(height: int, width: int, low: int = 280, high: int = 560) -> tuple[int, int]:
    """The (height, width) to show a picture at: small ones grow by a whole factor, large ones shrink."""
    side = max(height, width)
    if side > high:
        return max(1, round(height * high / side)), max(1, round(width * high / side))
    factor = max(1, math.ceil(low / side))
    return height * factor, width * factor


def resize_image(image: Picture, size: tuple[int, int]) -> Picture:
    """An image at another (height, width)."""
    if image.shape[:2] == size:
        return image
    method = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size[::-1], interpolation=method), np.uint8)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """A mask at another (height, width), by nearest neighbour."""
    rows = (2 * np.arange(size[0]) + 1) * mask.shape[0] // (2 * size[0])
    columns = (2 * np.arange(size[1]) + 1) * mask.shape[1] // (2 * size[1])
    return mask[rows[:, None], columns]


def resize_scribble(scribble: Mask, size: tuple[int, int], ignore_index: int = 255) -> Mask:
    """A scribble at another (height, width): every scribbled pixel is kept when it shrinks."""
    if size[0] >= scribble.shape[0]:
        return resize_mask(scribble, size)
    result = np.full(size, ignore_index, scribble.dtype)
    ys, xs = np.nonzero(scribble != ignore_index)
    result[ys * size[0] // scribble.shape[0], xs * size[1] // scribble.shape[1]] = scribble[ys, xs]
    return result


def eigenvector_picture(vector: npt.NDArray[np.floating[Any]], size: tuple[int, int]) -> Picture:
    """One eigenvector as a picture: blue below zero, white at zero, red above.

    The sign of an eigenvector is free: it is chosen so that the entries sum to no less than zero.

    Args:
        vector: (h,w) real values on the feature grid; values that are not finite show as zero.
        size: (height, width) of the picture; the grid's corners lie on the picture's.
    """
    values = np.nan_to_num(np.asarray(vector, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if values.sum() < 0:
        values = -values
    height, width = size
    ys = np.linspace(0, values.shape[0] - 1, height)
    xs = np.linspace(0, values.shape[1] - 1, width)
    values = ndimage.map_coordinates(values, np.meshgrid(ys, xs, indexing="ij"), order=1, mode="nearest")
    largest = np.abs(values).max(initial=0.0)
    position = 0.5 + 0.5 * values / largest if largest > 0 else np.full(size, 0.5)
    colored = matplotlib.colormaps["RdBu_r"](position, bytes=True)
    return np.asarray(colored[..., :3], np.uint8)


def eigenvalue_caption(value: complex) -> str:
    """An eigenvalue for reading; the imaginary part is left out where it rounds to nothing."""
    value = complex(value)
    if not (math.isfinite(value.real) and math.isfinite(value.imag)):
        return "λ = ?"
    text = f"λ = {value.real:.3f}"
    if abs(value.imag) >= 5e-4:
        text += f" {'+' if value.imag > 0 else '−'} {abs(value.imag):.3f}i"
    return text


def pictures(image: ReportImage, palette: Picture) -> dict[str, Picture]:
    """The image and what is laid over it, by caption, at the size at which they are shown."""
    size = fit_size(image.image.shape[0], image.image.shape[1])
    base = resize_image(image.image, size)
    result = {"image": base}
    if image.scribble is not None:
        result["scribble"] = draw_scribble(base, resize_scribble(image.scribble, size), palette)
    masks = (image.pseudo_label, image.prediction, image.label)
    for title, mask in zip(CAPTIONS[2:], masks, strict=True):
        if mask is not None:
            result[title] = overlay(base, resize_mask(mask, size), palette)
    return result


def present_classes(image: ReportImage) -> set[int]:
    """Class indices that occur in any mask of the image."""
    masks = (image.scribble, image.pseudo_label, image.prediction, image.label)
    found = {int(i) for mask in masks if mask is not None for i in np.unique(mask)}
    return found - {255}
