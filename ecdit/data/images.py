"""Decodes and encodes images.

`decode` reads untrusted bytes of a source with every check, and returns uint8[H, W, 3] or raises the reason of the
rejection. `decode_stored` reads what `encode` wrote, fast, for the loader. Both ignore embedded colour profiles.
"""

import io
import struct
import warnings
from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from ecdit.data import DataError
from ecdit.data.reasons import entry

# Modes that `decode` converts to RGB. It rejects others as "colour mode": CMYK, YCCK and LAB need a profile, and 16-bit
# greyscale needs a range. Pillow itself reduces 16-bit colours to 8 bits.
CONVERTED_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # an EXIF tag; 1 is upright

Kind = Literal["png", "webp", "jpeg"]
Pixels = UInt8[np.ndarray, "H W 3"]


class ImageRejected(DataError):
    """An image that cannot be used; `reason` is one of `ecdit.data.reasons.REASONS`."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = entry(reason), detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def decode(data: bytes, background: str, max_pixels: int) -> Pixels:
    """Decodes a JPEG, PNG or WebP image from an untrusted source, by its content and not by its name.

    Not thread-safe: it changes the process's warning filters while it runs.

    Args:
      data: the file's bytes.
      background: the colour, as Pillow names it, under transparent pixels; "" rejects images that have any.
      max_pixels: largest height times width, checked before decoding. Pillow's own limit of about 179 million pixels
        applies too.

    Raises:
      ImageRejected: the image cannot be used; the error has the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # for example about damaged metadata
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is max_pixels
        if data.startswith(_PNG):
            _check_png(data)
        with _open(data) as file:
            _check_header(file, max_pixels)
            raw_mode = file.tile[0][3] if file.format == "PNG" and file.tile else ""
            try:
                file.load()
            except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to
                raise _undecodable(error) from error
            _check_orientation(file)
            _scale_transparent_grey(file, raw_mode)
            try:
                return _flat(file, background)
            except ImageRejected:
                raise
            except Exception as error:  # for example a palette that is missing
                raise _undecodable(error) from error


def fit_square(image: Pixels, side: int) -> tuple[UInt8[np.ndarray, "side side 3"], Int32[np.ndarray, "2"]]:
    """Resizes the shorter side to `side` px (Lanczos, antialiased) and crops the longer one to its centre.

    Returns:
      The square, and the crop's (top, left) in px of the resized image.

    Raises:
      ImageRejected: the image has no pixels.
    """
    height, width = image.shape[:2]
    if not height or not width:
        raise ImageRejected("zero-sized", f"{width} x {height} px")
    shorter = min(height, width)
    resized = [max(side, round(length * side / shorter)) for length in (height, width)]
    top, left = ((length - side) // 2 for length in resized)
    y, x = height / resized[0], width / resized[1]  # px of `image` per px of the resized image
    # Only the crop of the resized image is computed: a whole strip of 1 x 60 000 px would take gigabytes.
    box = (left * x, top * y, min((left + side) * x, width), min((top + side) * y, height))
    square = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS, box)
    return np.asarray(square), np.array([top, left], np.int32)


def encode(image: Pixels, kind: Kind, quality: int) -> bytes:
    """Encodes an image. One version of Pillow always encodes the same pixels as the same bytes.

    Args:
      image: the pixels.
      kind: png is lossless; webp is lossless with quality 100 and lossy below; jpeg is lossy, with colours at half
        resolution.
      quality: 1 to 100; png has none and ignores it.
    """
    file = io.BytesIO()
    if kind == "png":
        options: dict = {"compress_level": 6}
    elif kind == "webp":
        options = {"lossless": quality == 100, "quality": quality, "method": 4}
    else:
        options = {"quality": quality, "subsampling": "4:2:0"}
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def decode_stored(data: bytes) -> Pixels:
    """Decodes what `encode` wrote. Thread-safe; the caller checks the size. The array may be read-only.

    Raises:
      ImageRejected: the bytes are damaged.
    """
    if data.startswith(_JPEG):
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise _undecodable(error) from error
    with _open(data) as file:
        try:
            return np.asarray(file.convert("RGB"))
        except Exception as error:
            raise _undecodable(error) from error


def _open(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_JPEG) or data.startswith(_PNG) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
            raise ImageRejected("undecodable", "the header cannot be read") from None
        raise ImageRejected("unknown format", f"begins with {data[:12].hex(' ')}") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected("too many pixels", str(error)) from None
    except Exception as error:
        if "EXIF" in str(error):  # Pillow reads a JPEG's EXIF on opening; the pixels may still be valid
            raise ImageRejected("orientation", f"EXIF cannot be read: {_described(error)}") from None
        raise _undecodable(error) from error


def _check_png(data: bytes) -> None:
    """Rejects a PNG without pixels, which Pillow calls unknown, or with a wrong checksum, which it does not check."""
    width, height = struct.unpack(">II", data[16:24].ljust(8, b"\xff"))
    if data[12:16] == b"IHDR" and not (width and height):
        raise ImageRejected("zero-sized", f"{width} x {height} px")
    with _open(data) as file:  # a separate file, because `verify` makes it undecodable
        try:
            file.verify()
        except Exception as error:
            raise _undecodable(error) from error


def _check_header(file: Image.Image, max_pixels: int) -> None:
    """Rejects an image by its header, before its pixels are decoded."""
    if file.width * file.height > max_pixels:
        raise ImageRejected("too many pixels", f"{file.width} x {file.height} px, more than {max_pixels}")
    # Many cameras write MPO, a JPEG whose further frames are previews and depth maps of the first.
    if file.format in ("PNG", "WEBP") and getattr(file, "n_frames", 1) > 1:
        raise ImageRejected("animated", f"{getattr(file, 'n_frames', 1)} frames")
    if file.mode not in CONVERTED_MODES:
        raise ImageRejected("colour mode", f"{file.mode}; converted are {', '.join(CONVERTED_MODES)}")


def _check_orientation(file: Image.Image) -> None:
    """Rejects rotated and mirrored images. Call it after loading pixels, because a PNG's EXIF may follow them."""
    try:
        orientation = file.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        raise ImageRejected("orientation", f"EXIF cannot be read: {_described(error)}") from None
    if orientation != 1:
        raise ImageRejected("orientation", f"EXIF orientation {orientation}")


def _scale_transparent_grey(file: Image.Image, raw_mode: object) -> None:
    """Scales the transparent grey of a PNG of 2 or 4 bits to 8, as Pillow scales the pixels, but not this grey.

    Args:
      file: the image, loaded.
      raw_mode: how Pillow names the pixels of a PNG's file.

    Raises:
      ImageRejected: colours of 16 bits of which one is transparent. Pillow compares it with 8 bits of the pixels.
    """
    if "transparency" not in file.info:
        return
    if raw_mode == "RGB;16B":
        raise ImageRejected("colour mode", "RGB of 16 bits with a transparent colour")
    if largest := {"L;2": 3, "L;4": 15}.get(str(raw_mode)):
        file.info["transparency"] = (file.info["transparency"] & largest) * (255 // largest)


def _flat(file: Image.Image, background: str) -> Pixels:
    """Returns the pixels, transparent ones on `background`."""
    if not file.has_transparency_data:
        return np.asarray(file.convert("RGB"))
    image = file.convert("RGBA")
    lowest, _ = image.getchannel("A").getextrema()
    if lowest == 255:
        return np.asarray(image.convert("RGB"))
    if not background:
        raise ImageRejected("transparency", f"{file.mode} with transparent pixels")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB"))


def _undecodable(error: Exception) -> ImageRejected:
    detail = _described(error)
    early = isinstance(error, EOFError) or any(word in detail.lower() for word in ("truncated", "premature"))
    return ImageRejected("truncated" if early else "undecodable", detail)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
