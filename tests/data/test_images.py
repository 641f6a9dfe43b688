"""Tests decoding, resizing and encoding of images."""

import io
import pickle
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ecdit.data import images
from ecdit.data.images import ImageRejected, decode, decode_stored, encode, fit_square
from tests.data.broken import animated, encoded, noise, png_of, rotated, with_size

MANY = 1 << 20


def reason(data, background="", max_pixels=MANY):
    with pytest.raises(ImageRejected) as caught:
        decode(data, background, max_pixels)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def colours():
    """2 x 1 px: red and blue."""
    return Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_lossless_images_decode_to_their_pixels(kind, options):
    assert (decode(encoded(noise(5, 7), kind, **options), "", MANY) == noise(5, 7)).all()


def test_a_jpeg_decodes_as_pillow_decodes_it():
    data = encoded(noise(9, 7))
    with Image.open(io.BytesIO(data)) as file:
        assert (decode(data, "", MANY) == np.asarray(file)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_without_colours_or_with_a_palette_become_rgb(mode):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert decode(encoded(image, "png"), "", MANY).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_pixels_that_are_transparent_are_composited_on_the_background():
    alpha = np.array([[255, 0]], np.uint8)
    image = colours()
    image.putalpha(Image.fromarray(alpha))
    assert decode(encoded(image, "png"), "white", MANY).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert decode(encoded(image, "webp", lossless=True), "black", MANY).tolist() == [[[255, 0, 0], [0, 0, 0]]]
    assert reason(encoded(image, "png")) == "transparency"


def test_a_palette_with_transparency_is_composited_as_well():
    image = colours().quantize(2)
    blue = image.getpixel((1, 0))
    data = encoded(image, "png", transparency=blue)
    assert decode(data, "white", MANY).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert reason(data) == "transparency"


@pytest.mark.parametrize(("mode", "transparent"), [("RGB", (0, 0, 255)), ("L", 29)])
def test_a_colour_that_means_transparent_is_transparent(mode, transparent):
    data = encoded(colours().convert(mode), "png", transparency=transparent)
    assert decode(data, "lime", MANY)[0, 1].tolist() == [0, 255, 0]
    assert reason(data) == "transparency"


def small_png(width, depth, colour, row, *more):
    """A PNG of one row, of any bit depth and colour type."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    return png_of([(b"IHDR", header), *more, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")])


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\x40", 1, [0, 255, 0]),  # 0 1 0, and 1 would be white anyway
        (1, b"\x40", 0, [255, 255, 255]),
        (2, b"\x18", 2, [0, 85, 255]),  # 0 1 2: a step is 85
        (2, b"\x18", 1, [0, 255, 170]),
        (2, b"\x18", 0x0102, [0, 85, 255]),  # only the lowest two bits count
        (4, b"\x1e\xf0", 14, [17, 255, 255]),  # 1 14 15: a step is 17
        (4, b"\x1e\xf0", 1, [255, 238, 255]),
        (8, b"\x01\x02\x03", 2, [1, 255, 3]),
    ],
)
def test_a_transparent_grey_of_few_bits_is_that_of_its_pixels(depth, row, transparent, expected):
    data = small_png(3, depth, 0, row, (b"tRNS", struct.pack(">H", transparent)))
    assert decode(data, "white", MANY)[0, :, 0].tolist() == expected
    assert reason(data) == "transparency"


def test_a_transparent_colour_of_16_bits_is_rejected_because_8_bits_cannot_tell_it():
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1299, 0x5699, 0x9A99)  # the same colours in 8 bits
    assert decode(small_png(2, 16, 2, row), "", MANY).tolist() == [[[0x12, 0x56, 0x9A]] * 2]
    coloured = small_png(2, 16, 2, row, (b"tRNS", row[:6]))
    assert reason(coloured, "white") == reason(coloured) == "colour mode"


def test_an_alpha_channel_without_transparent_pixels_needs_no_background():
    image = colours()
    image.putalpha(255)
    assert decode(encoded(image, "png"), "", MANY).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("mode", ["CMYK"])
def test_cmyk_is_rejected(mode):
    assert reason(encoded(Image.fromarray(noise()).convert(mode))) == "colour mode"


def test_greyscale_of_16_bits_is_rejected():
    assert reason(encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "png")) == "colour mode"


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_animations_are_rejected(kind):
    assert reason(animated(kind)) == "animated"


def test_a_camera_jpeg_with_a_preview_is_its_first_image():
    first, second = (Image.fromarray(noise(seed=seed)) for seed in (0, 1))
    data = encoded(first, "mpo", save_all=True, append_images=[second])
    assert (decode(data, "", MANY) == decode(encoded(first), "", MANY)).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_rotated_images_are_rejected(kind):
    assert reason(rotated(kind, 6)) == "orientation"
    assert decode(rotated(kind, 1), "", MANY).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_that_cannot_be_read_is_rejected(kind):
    broken = b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(5)  # warnings are errors: none is left
    assert reason(encoded(kind=kind, exif=broken)) == "orientation"


def test_the_limit_of_pixels_holds_before_decoding():
    large = with_size(encoded(kind="png"), 1024, 1025)  # its data are those of 8 x 8 px: decoding would fail
    assert reason(large, max_pixels=1024 * 1025 - 1) == "too many pixels"
    assert reason(large, max_pixels=1024 * 1025) == "truncated"
    assert reason(with_size(encoded(kind="png"), 1 << 20, 1 << 20), max_pixels=1 << 62) == "too many pixels"


def test_pillows_warning_of_bombs_is_no_limit_of_its_own():
    huge = with_size(encoded(kind="png"), 10_000, 10_000)  # above 89 and below 179 million pixels
    assert reason(huge, max_pixels=99_999_999) == "too many pixels"


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_images_without_pixels_are_rejected(size):
    assert reason(with_size(encoded(kind="png"), *size)) == "zero-sized"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_images_that_end_early_are_rejected(kind):
    data = encoded(noise(64, 64), kind)
    assert reason(data[: len(data) // 2]) in ("truncated", "undecodable")
    assert reason(data[:14]) in ("truncated", "undecodable")


def test_a_jpeg_that_ends_early_is_called_so():
    assert reason(encoded(noise(64, 64))[:-500]) == "truncated"


def test_a_png_with_a_wrong_checksum_is_rejected_though_it_decodes():
    data = bytearray(encoded(kind="png"))
    place = data.index(b"IDAT") - 4
    length = int.from_bytes(data[place : place + 4], "big")
    data[place + 8 + length] ^= 1
    assert reason(bytes(data)) == "undecodable"


@pytest.mark.parametrize("data", [b"", b"hello", encoded(kind="gif"), encoded(kind="bmp"), b"RIFF1234WAVE"])
def test_other_formats_are_unknown(data):
    assert reason(data) == "unknown format"


def test_a_rejection_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageRejected("animated", "3 frames")))
    assert (error.reason, error.detail) == ("animated", "3 frames")
    with pytest.raises(ValueError, match="not in"):
        ImageRejected("ugly", "")


def test_decode_leaves_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    decode(encoded(), "", MANY)
    assert warnings.filters == before


def test_square_images_are_put_on_white_and_resized_whole(tmp_path):
    image = Image.fromarray(noise(72, 72, 4))
    image.save(tmp_path / "a.png")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    expected = np.asarray(flat.resize((32, 32), Image.Resampling.LANCZOS))
    new, crop = fit_square(decode((tmp_path / "a.png").read_bytes(), "white", MANY), 32)
    assert (new == expected).all()
    assert crop.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("height", "width", "side", "crop"),
    [(100, 173, 32, (0, 11)), (64, 200, 32, (0, 34)), (173, 100, 50, (18, 0)), (5, 3, 7, (2, 0)), (9, 9, 9, (0, 0))],
)
def test_the_crop_is_the_centre_of_the_resized_image(height, width, side, crop):
    rows, columns, _ = np.meshgrid(range(height), range(width), range(3), indexing="ij")
    image = (128 + 60 * np.sin(rows / 2) + 60 * np.sin(columns / 2)).astype(np.uint8)  # one px further differs by 25
    square, found = fit_square(image, side)
    assert tuple(found) == crop
    shorter = min(height, width)
    size = tuple(side if length == shorter else round(length * side / shorter) for length in (width, height))
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)).astype(int)
    top, left = crop
    assert np.abs(whole[top : top + side, left : left + side] - square).max() <= 2


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    square, _ = fit_square(stripes, 8)
    assert np.abs(square.astype(int) - 127.5).max() < 16


def test_a_long_strip_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square, crop = fit_square(noise(1, 60_000), 256)  # resized, it would have 11.8 GB
    assert square.shape == (256, 256, 3)
    assert crop.tolist() == [0, 60_000 * 256 // 2 - 128]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_an_array_without_pixels_cannot_be_fitted():
    with pytest.raises(ImageRejected, match="zero-sized"):
        fit_square(np.zeros((0, 4, 3), np.uint8), 8)


@pytest.mark.parametrize(("kind", "quality"), [("png", 1), ("webp", 100)])
def test_lossless_encodings_return_the_pixels(kind, quality):
    assert (decode_stored(encode(noise(), kind, quality)) == noise()).all()


@pytest.mark.parametrize(("kind", "quality"), [("webp", 80), ("jpeg", 90)])
def test_lossy_encodings_return_about_the_pixels(kind, quality):
    smooth = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None], (64, 64, 3)).copy()
    found = decode_stored(encode(smooth, kind, quality)).astype(int)
    assert np.abs(found - smooth).mean() < 3
    assert found.shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_encoding_is_deterministic_and_decoded_as_pillow_does(kind):
    data = encode(noise(32, 48), kind, 90)
    assert data == encode(noise(32, 48), kind, 90)
    assert (decode_stored(data) == images.decode(data, "", MANY)).all()


def test_quality_decides_the_size():
    for kind in ("webp", "jpeg"):
        assert len(encode(noise(64, 64), kind, 30)) < len(encode(noise(64, 64), kind, 95))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_damaged_stored_images_are_refused(kind):
    data = encode(noise(64, 64), kind, 90)
    with pytest.raises(ImageRejected):
        decode_stored(data[: len(data) // 2])
    with pytest.raises(ImageRejected, match="unknown format"):
        decode_stored(b"nothing")


def test_a_palette_png_without_its_palette_is_rejected():
    """All checksums are right. Pillow opens and loads it, and fails where the colours are asked for."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)  # 2 x 1 px, 8 bits, with a palette
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\0\1")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert reason(data, "white") == "undecodable"
