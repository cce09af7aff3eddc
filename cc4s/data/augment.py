"""Training augmentation: scale, rotation, blur, flip, crop (docs/method.md, section 9)."""

from __future__ import annotations

import cv2
import numpy as np

from cc4s.config import AugmentConfig
from cc4s.data.images import Array
from cc4s.errors import UserError

# Random numbers of one sample, drawn at once: no option shifts the draws of another.
DRAWS = 8


def check_augment(config: AugmentConfig) -> None:
    """Raises `UserError` for values that make no sense."""
    if config.crop < 1:
        raise UserError(f"augment.crop: {config.crop}; expected a positive number of pixels")
    if not 0 < config.scale_min <= config.scale_max < np.inf:
        raise UserError(
            f"augment.scale_min, augment.scale_max: {config.scale_min}, {config.scale_max}; expected 0 < min <= max"
        )
    if not 0 <= config.rotation <= 180:
        raise UserError(f"augment.rotation: {config.rotation}; expected degrees from 0 to 180")
    for key in ("rotation_prob", "blur_prob", "flip_prob"):
        if not 0 <= getattr(config, key) <= 1:
            raise UserError(f"augment.{key}: {getattr(config, key)}; expected a number from 0 to 1")


def scaled_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(height, width) with the long side `long_side`; unchanged where that is 0."""
    if not long_side:
        return size
    factor = long_side / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def augment(
    image: Array,
    label: Array,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    fill: Array,
    ignore: int,
    long_side: int = 0,
) -> tuple[Array, Array, Array]:
    """One random view of an image and its labels.

    In this order: size (`long_side` times the random scale, in one bilinear resize), rotation about the
    centre, 5 x 5 Gaussian blur, horizontal flip, a random crop of `crop` x `crop`. An image smaller than the
    crop lies at a random place in it. Labels are taken from the nearest pixel.

    Args:
        image: (H, W, C) uint8 or float32.
        label: (H, W) uint8 or uint16.
        rng: the source of all randomness; always asked for the same amount of numbers.
        fill: (C,) the value of pixels that come from outside the image, in the image's units.
        ignore: the label of such pixels.

    Returns:
        image (crop, crop, C), label (crop, crop), valid (crop, crop) bool: False outside the image and in the
        empty corners of a rotation.
    """
    at_scale, turned, angle, blurred, flipped, at_row, at_column, _ = rng.random(DRAWS)
    height, width = scaled_size(label.shape, long_side)
    scale = config.scale_min + at_scale * (config.scale_max - config.scale_min)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    if (height, width) != label.shape:
        image = _planes(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    valid = np.ones((height, width), np.uint8)
    if turned < config.rotation_prob:
        degrees = (2 * angle - 1) * config.rotation
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
        size = (width, height)
        # The border is replicated, so that neither rotation nor blur mixes padding into the image.
        image = _planes(cv2.warpAffine(image, turn, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
        label = cv2.warpAffine(label, turn, size, flags=cv2.INTER_NEAREST, borderValue=(ignore,))
        valid = cv2.warpAffine(valid, turn, size, flags=cv2.INTER_NEAREST, borderValue=(0,))
    if blurred < config.blur_prob:
        image = _planes(cv2.GaussianBlur(image, (5, 5), 0))
    if flipped < config.flip_prob:
        image, label, valid = image[:, ::-1], label[:, ::-1], valid[:, ::-1]

    side = config.crop
    top, left = _offset(height, side, at_row), _offset(width, side, at_column)
    source = (slice(max(0, top), top + side), slice(max(0, left), left + side))
    target = (
        slice(max(0, -top), max(0, -top) + min(height, side)),
        slice(max(0, -left), max(0, -left) + min(width, side)),
    )
    out_image = np.empty((side, side, image.shape[2]), image.dtype)
    out_image[:] = fill
    out_label = np.full((side, side), ignore, label.dtype)
    out_valid = np.zeros((side, side), np.bool_)
    out_valid[target] = valid[source] > 0
    out_image[target] = np.where(out_valid[target][:, :, None], image[source], out_image[target])
    # Nearest-neighbour rounding of labels and of validity may differ by a pixel at the rim of a rotation.
    out_label[target] = np.where(out_valid[target], label[source], np.asarray(ignore, label.dtype))
    return out_image, out_label, out_valid


def _planes(image: Array) -> Array:
    # OpenCV drops the channel axis of one-channel images.
    return image if image.ndim == 3 else image[:, :, None]


def _offset(size: int, side: int, at: float) -> int:
    """Where the crop starts in the image; negative where the image starts within the crop."""
    low, high = min(0, size - side), max(0, size - side)
    return low + min(high - low, int(at * (high - low + 1)))
