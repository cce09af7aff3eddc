"""Reading images and reading and writing index PNGs."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cc4s.data import images
from cc4s.data.images import read_image, read_index_png, to_rgb, to_unit_float, voc_palette, write_index_png
from cc4s.errors import UserError

from .data_tools import jpeg, mask, png

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0].copy()
DEEP = RNG.integers(0, 65536, (7, 9), dtype=np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (7, 9, 3), dtype=np.uint16)


def test_voc_palette_is_the_published_one():
    palette = voc_palette()
    # From the VOC development kit: aeroplane, bicycle, person, tvmonitor, void.
    for index, colour in {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }.items():
        assert tuple(palette[index]) == colour
    assert tuple(palette[255]) == (224, 224, 192)
    assert palette.shape == (256, 3)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_lossless_rgb_and_grey(tmp_path, suffix):
    Image.fromarray(RGB).save(tmp_path / f"rgb{suffix}")
    Image.fromarray(GREY).save(tmp_path / f"grey{suffix}")
    assert np.array_equal(read_image(tmp_path / f"rgb{suffix}", 3), RGB)
    assert np.array_equal(read_image(tmp_path / f"grey{suffix}", 3), GREY[:, :, None].repeat(3, 2))
    assert np.array_equal(read_image(tmp_path / f"grey{suffix}", 1), GREY[:, :, None])
    weighted = 0.299 * RGB[:, :, 0] + 0.587 * RGB[:, :, 1] + 0.114 * RGB[:, :, 2]
    # Rounded to whole grey levels.
    assert np.abs(read_image(tmp_path / f"rgb{suffix}", 1)[:, :, 0] - weighted).max() <= 0.5 + 1e-9


def test_jpeg_equals_pillow(tmp_path):
    (tmp_path / "x.JPG").write_bytes(jpeg())
    assert np.array_equal(read_image(tmp_path / "x.JPG"), np.asarray(Image.open(io.BytesIO(jpeg()))))
    (tmp_path / "g.jpg").write_bytes(jpeg(grey=True))
    assert read_image(tmp_path / "g.jpg", 3).shape == (40, 56, 3)


def test_alpha_and_palette(tmp_path):
    alpha = np.dstack([RGB, GREY])
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), RGB)
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY)]).save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png", 1)[:, :, 0], GREY)
    few = RGB // 128 * 255
    Image.fromarray(few).quantize(16).save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), few)
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "bits.png", 1)[:, :, 0], (GREY > 100) * np.uint8(255))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter
    Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (7, 9, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    Image.fromarray(DEEP).save(tmp_path / f"x{suffix}")
    pixels = read_image(tmp_path / f"x{suffix}", 1)
    assert pixels.dtype == np.float32
    # One float32 rounding of a number up to 1.
    np.testing.assert_allclose(pixels[:, :, 0], DEEP / 65535.0, atol=1e-7)
    cv2.imwrite(str(tmp_path / f"c{suffix}"), DEEP_RGB[:, :, ::-1])
    np.testing.assert_allclose(read_image(tmp_path / f"c{suffix}", 3), DEEP_RGB / 65535.0, atol=1e-7)


def test_many_channels(tmp_path):
    values = RNG.integers(0, 256, (7, 9, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(read_image(tmp_path / "x.npy", 5), values)
    np.save(tmp_path / "f.npy", values / 255.0)
    np.testing.assert_allclose(read_image(tmp_path / "f.npy", 5), values / 255.0, atol=1e-7)
    np.save(tmp_path / "flat.npy", GREY)
    assert read_image(tmp_path / "flat.npy", 3).shape == (7, 9, 3)
    pages = [Image.fromarray(values[:, :, channel].copy()) for channel in range(5)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(tmp_path / "pages.tif", 5), values)


def test_interleaved_tiff_of_many_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(0, 65536, (7, 9, 6), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", planarconfig="contig")
    np.testing.assert_allclose(read_image(tmp_path / "x.tif", 6), values / 65535.0, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 6), np.uint8), "6 channels, but data.channels is 3"),
        (np.zeros((4,), np.uint8), r"shape \(4,\); expected \(height, width\)"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (np.full((4, 5, 3), 1.5), r"floats from 1.5 to 1.5; expected floats in \[0, 1\]"),
        (np.full((4, 5, 3), np.nan), "not finite"),
        (np.full((4, 5, 3), -3), "values -3 to -3"),
        (np.full((4, 5, 3), 70000), "values 70000 to 70000"),
        (np.zeros((4, 5, 3), np.complex64), "values of type complex64"),
        (np.array([{}]), "not a readable .npy file"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "x.npy", 3)
    assert str(caught.value).startswith(str(tmp_path / "x.npy"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".npy"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"x{suffix}"
    large = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if suffix == ".npy":
        np.save(path, large)
    else:
        Image.fromarray(large).save(path)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"no image at all", "empty": b""}[damage])
    with pytest.raises(UserError) as caught:
        read_image(path, 3)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg: cannot be read: No such file"):
        read_image(tmp_path / "x.jpg")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(UserError, match=r"d\.png: cannot be read: Is a directory"):
        read_index_png(tmp_path / "d.png")


def test_conversions():
    assert np.array_equal(to_unit_float(GREY[:, :, None])[:, :, 0], GREY / np.float32(255))
    assert np.array_equal(to_rgb(GREY[:, :, None]), GREY[:, :, None].repeat(3, 2))
    assert np.array_equal(to_rgb(np.dstack([RGB, GREY])), RGB)
    floats = (RGB / 255).astype(np.float32)
    assert np.array_equal(to_rgb(floats), RGB)
    assert np.array_equal(to_rgb(floats[:, :, :2]), RGB[:, :, :1].repeat(3, 2))


@pytest.mark.parametrize("mode", ["P", "L"])
def test_index_png_modes(tmp_path, mode):
    label = mask()
    png(tmp_path / "x.png", label, mode)
    read = read_index_png(tmp_path / "x.png", 3)
    assert np.array_equal(read, label)
    assert read.dtype == np.uint8


def test_index_png_round_trip(tmp_path):
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    write_index_png(tmp_path / "x.png", mask().astype(np.int64), colours)
    assert np.array_equal(read_index_png(tmp_path / "x.png", 3), mask())
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P"
        palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(palette[:4], colours)
    assert tuple(palette[255]) == (224, 224, 192)


def test_more_than_255_classes(tmp_path):
    label = np.array([[0, 255, 256, 299, 65535]])
    write_index_png(tmp_path / "x.png", label, num_classes=300)
    read = read_index_png(tmp_path / "x.png", 300)
    assert np.array_equal(read, label)
    assert images.ignore_index(300) == 65535
    assert images.ignore_index(255) == 255
    # A class map without a large value stays 16-bit, so that 255 stays a class.
    write_index_png(tmp_path / "y.png", np.array([[0, 255]]), num_classes=300)
    assert np.array_equal(read_index_png(tmp_path / "y.png", 300), [[0, 255]])
    # In an 8-bit file 255 means ignore.
    png(tmp_path / "z.png", np.array([[3, 255]], np.uint8))
    assert np.array_equal(read_index_png(tmp_path / "z.png", 300), [[3, 65535]])
    with pytest.raises(UserError, match=r"label value 299, but there are 290 classes \(0 to 289; 65535 = ignore\)"):
        read_index_png(tmp_path / "x.png", 290)


def test_index_png_errors(tmp_path):
    png(tmp_path / "rgb.png", RGB, "RGB")
    with pytest.raises(UserError, match=r"rgb\.png: a colour image \(mode RGB\) where a PNG of class indices"):
        read_index_png(tmp_path / "rgb.png", 3)
    png(tmp_path / "x.png", mask(classes=5))
    with pytest.raises(UserError, match=r"x\.png: label value 4, but there are 4 classes \(0 to 3; 255 = ignore\)"):
        read_index_png(tmp_path / "x.png", 4)
    assert read_index_png(tmp_path / "x.png").max() == 255


def test_write_index_png_arguments(tmp_path):
    with pytest.raises(TypeError, match="mask: dtype float64, expected integers"):
        write_index_png(tmp_path / "x.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mask: shape \(2,\)"):
        write_index_png(tmp_path / "x.png", np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="mask: values -1 to 0"):
        write_index_png(tmp_path / "x.png", np.array([[0, -1]]))
    assert not (tmp_path / "x.png").exists()


def test_wrong_checksum_is_found(tmp_path):
    path = tmp_path / "x.png"
    png(path, mask())
    images.verify_png(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    assert zlib.crc32(data[start : start + 4 + length]) == struct.unpack_from(">I", data, start + 4 + length)[0]
    data[start + 4 + length] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.png: corrupt"):
        images.verify_png(path)
