"""Images, index PNGs and palettes.

Images keep the orientation of their pixels: EXIF rotation is not applied, as masks and scribbles are drawn on
the raw pixels (PASCAL VOC's are).
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cc4s.errors import UserError
from cc4s.files import atomic_write

Array = NDArray[Any]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".npy")
IGNORE = 255
# More than 255 classes need 16-bit label files, where 255 is a class.
WIDE_IGNORE = 65535

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def ignore_index(num_classes: int) -> int:
    """The label of unlabelled pixels: 255, or 65535 where there are more than 255 classes."""
    return IGNORE if num_classes <= IGNORE else WIDE_IGNORE


def voc_palette() -> Array:
    """The PASCAL VOC colours, (256, 3) uint8: index 0 black, 255 cream."""
    palette = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for bit in range(8):
        # Bits 0, 1, 2 of the index go to red, green, blue, from the top bit of the colour down.
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_bytes(path: Path) -> bytes:
    """The content of a file, or a `UserError` that says why there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    return data


def read_image(path: str | Path, channels: int = 3) -> Array:
    """Reads an image as (H, W, channels), RGB order.

    Files: JPEG, PNG, BMP and TIFF, 8- or 16-bit, grey, palette, RGB or with alpha (dropped); TIFF with one
    grey page per channel; `.npy` of shape (H, W) or (H, W, C). One channel is replicated to three and RGB
    becomes grey (ITU-R 601) where `channels` asks for it; any other difference is an error.

    Returns:
        uint8 for 8-bit files; float32 in [0, 1] for 16-bit files (divided by 65535) and for float files,
        which have to be in [0, 1] already.

    Raises:
        UserError: unreadable, empty, truncated or corrupt file, another number of channels, floats that are
            not finite or not in [0, 1].
    """
    path = Path(path)
    data = read_bytes(path)
    pixels = _decode_npy(path, data) if path.suffix.lower() == ".npy" else _decode_image(path, data)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise UserError(f"{path}: array of shape {pixels.shape}; expected (height, width) or (height, width, channels)")
    pixels = _to_unit(path, pixels)
    found = pixels.shape[2]
    if found == channels:
        return np.ascontiguousarray(pixels)
    if found == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if found == 3 and channels == 1:
        return _grey(pixels)
    raise UserError(f"{path}: {found} channels, but data.channels is {channels}")


def _decode_npy(path: Path, data: bytes) -> Array:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: not a readable .npy file: {_one_line(error)}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a .npy file")
    return array


def _decode_image(path: Path, data: bytes) -> Array:
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except _DECODE_ERRORS as error:
        if path.suffix.lower() in (".tif", ".tiff"):
            # Pillow opens no TIFF with more than four interleaved channels.
            return _decode_wide_tiff(path, data)
        raise UserError(f"{path}: not an image: {_one_line(error)}") from error
    try:
        if image.format == "PNG" and image.mode in ("RGB", "RGBA") and data[24] == 16:
            # Pillow cuts 16-bit colour PNGs to 8 bits.
            return _decode_deep(path, data)
        if image.format == "TIFF":
            pages = getattr(image, "n_frames", 1)
            if pages > 1:
                return _stack_pages(path, image, pages)
            # Pillow cuts 16-bit colour TIFFs to 8 bits as well; tag 258 is BitsPerSample.
            bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
            if image.mode in ("RGB", "RGBA") and max(bits) > 8:
                return _decode_deep(path, data)
        return _plain_array(image)
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: corrupt or truncated image: {_one_line(error)}") from error


def _plain_array(image: Image.Image) -> Array:
    image.load()
    mode = image.mode
    if mode in ("L", "RGB", "F", "I") or mode.startswith("I;16"):
        return np.array(image)
    if mode in ("1", "LA", "La"):
        return np.array(image.convert("L"))
    if mode == "P" and "transparency" in image.info:
        return np.array(image.convert("RGBA").convert("RGB"))
    return np.array(image.convert("RGB"))


def _decode_deep(path: Path, data: bytes) -> Array:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.ndim != 3:
        raise UserError(f"{path}: corrupt or truncated image")
    return decoded[:, :, 2::-1]  # BGR or BGRA to RGB


def _stack_pages(path: Path, image: Image.Image, pages: int) -> Array:
    stack = []
    for page in range(pages):
        image.seek(page)
        stack.append(_plain_array(image))
    shapes = {page.shape for page in stack}
    if len(shapes) != 1 or stack[0].ndim != 2:
        raise UserError(f"{path}: a TIFF with several pages has to hold one grey page of one size per channel")
    return np.stack(stack, axis=2)


def _decode_wide_tiff(path: Path, data: bytes) -> Array:
    try:
        import tifffile
    except ImportError:
        raise UserError(f"{path}: not a TIFF that Pillow reads; install tifffile, or save it as .npy") from None
    try:
        return np.asarray(tifffile.imread(io.BytesIO(data)))
    except Exception as error:
        raise UserError(f"{path}: not a readable TIFF: {_one_line(error)}") from error


def _to_unit(path: Path, pixels: Array) -> Array:
    """8-bit as it is, everything else as float32 in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind in "iu":
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise UserError(f"{path}: values {low} to {high}; expected 8-bit, 16-bit, or floats in [0, 1]")
        return (pixels / 65535.0).astype(np.float32)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise UserError(f"{path}: holds values that are not finite")
        if pixels.min() < 0 or pixels.max() > 1:
            raise UserError(f"{path}: floats from {pixels.min():g} to {pixels.max():g}; expected floats in [0, 1]")
        return pixels.astype(np.float32)
    raise UserError(f"{path}: values of type {pixels.dtype}; expected 8-bit, 16-bit, or floats in [0, 1]")


def _grey(pixels: Array) -> Array:
    grey = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if pixels.dtype == np.uint8:
        grey = np.rint(grey)
    return grey.astype(pixels.dtype)[:, :, None]


def to_unit_float(pixels: Array) -> Array:
    """(H, W, C) uint8 or float in [0, 1] -> (H, W, C) float32 in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32)


def to_rgb(pixels: Array) -> Array:
    """(H, W, C) uint8 or float in [0, 1] -> (H, W, 3) uint8 for pictures and superpixels.

    Three or more channels give the first three, fewer the first one three times; floats are rounded.
    """
    pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else np.repeat(pixels[:, :, :1], 3, axis=2)
    if pixels.dtype != np.uint8:
        pixels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def read_index_png(path: str | Path, num_classes: int = 0) -> Array:
    """Reads a mask of class indices from a palette, 8-bit grey or 16-bit grey PNG.

    Args:
        path: the file.
        num_classes: values have to be below it, or the ignore label; 0 does not check.

    Returns:
        (H, W) uint8 with 255 = ignore. With more than 255 classes (H, W) uint16 with 65535 = ignore; 255 in
        an 8-bit file still means ignore. With `num_classes=0` whatever depth the file has.

    Raises:
        UserError: unreadable, empty or corrupt file, a colour image, a value that is no class.
    """
    path = Path(path)
    mask, _ = decode_index_png(path, read_bytes(path))
    return check_index_range(path, mask, num_classes)


def decode_index_png(path: Path, data: bytes) -> tuple[Array, Array | None]:
    """The indices of a PNG as they are stored, uint8 or uint16, and its palette (n, 3) where it has one."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        mode = image.mode
        if mode == "1":
            return np.asarray(image).astype(np.uint8), None
        if mode == "L":
            return np.array(image), None
        if mode == "P":
            colours = image.getpalette("RGB") or []
            return np.array(image), np.asarray(colours, np.uint8).reshape(-1, 3)
        if mode.startswith("I"):
            return np.asarray(image).astype(np.uint16), None
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: corrupt or truncated image: {_one_line(error)}") from error
    raise UserError(f"{path}: a colour image (mode {mode}) where a PNG of class indices (palette or grey) is expected")


def check_index_range(path: Path, mask: Array, num_classes: int) -> Array:
    """Checks decoded indices against the number of classes; widens them where there are more than 255."""
    if num_classes <= 0:
        return mask
    ignore = ignore_index(num_classes)
    if num_classes > IGNORE and mask.dtype == np.uint8:
        mask = np.where(mask == IGNORE, np.uint16(WIDE_IGNORE), mask.astype(np.uint16))
    wrong = (mask >= num_classes) & (mask != ignore)
    if wrong.any():
        raise UserError(
            f"{path}: label value {int(mask[wrong].max())}, but there are {num_classes} classes "
            f"(0 to {num_classes - 1}; {ignore} = ignore)"
        )
    return mask if num_classes > IGNORE else mask.astype(np.uint8, copy=False)


def encode_index_png(mask: Any, palette: Any | None = None, num_classes: int = 0) -> bytes:
    """(H, W) indices as a PNG: palette mode, or 16-bit grey for uint16 or large values.

    Args:
        mask: integer array (H, W).
        palette: (n, 3) uint8; None is `voc_palette()`. 16-bit files have none.
        num_classes: above 255 the file is 16-bit whatever the values.

    Raises:
        TypeError: `mask` is not of integers. ValueError: its shape or range.
    """
    mask = np.asarray(mask)
    if mask.dtype.kind not in "iu":
        raise TypeError(f"mask: dtype {mask.dtype}, expected integers")
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask: shape {mask.shape}, expected (height, width)")
    if mask.min() < 0 or mask.max() > WIDE_IGNORE:
        raise ValueError(f"mask: values {mask.min()} to {mask.max()}, expected 0 to {WIDE_IGNORE}")
    buffer = io.BytesIO()
    if mask.dtype == np.uint16 or mask.max() > IGNORE or num_classes > IGNORE:
        Image.fromarray(np.ascontiguousarray(mask.astype(np.uint16))).save(buffer, "PNG")
        return buffer.getvalue()
    colours = voc_palette()
    if palette is not None:
        given = np.asarray(palette, np.uint8).reshape(-1, 3)[:256]
        colours[: len(given)] = given
    image = Image.fromarray(np.ascontiguousarray(mask.astype(np.uint8)))
    image.putpalette(colours.tobytes())  # turns mode L into P
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_index_png(path: str | Path, mask: Any, palette: Any | None = None, num_classes: int = 0) -> None:
    """Writes (H, W) indices atomically; arguments and format as for `encode_index_png`."""
    atomic_write(path, encode_index_png(mask, palette, num_classes))


def verify_png(path: Path) -> None:
    """Checks the checksums of every chunk of a PNG, which decoding alone does not.

    Raises:
        UserError: a checksum is wrong.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            image.verify()
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: corrupt or truncated image: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # The buffer's address says nothing about the file.
    return "unknown format" if "cannot identify image file" in text else text
