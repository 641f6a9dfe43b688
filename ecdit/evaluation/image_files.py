"""Finds and reads the image files of a folder."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ecdit.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Modes of 16 or 32 bits, which Pillow would clip at 255: a 16-bit grey image would be white, one of 0..1 black.
_CLIPPED_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def image_files(folder: Path, name: str) -> list[Path]:
    """Returns the image files in a folder and below it, sorted by path; of one that ecdit.sample filled, its samples.

    Raises:
      UserError: there are none, or ecdit.sample has not finished the folder; `name` is what the message calls it.
    """
    if not folder.is_dir():
        raise UserError(f"{name}={folder}: is no directory")
    check_finished(folder, name)
    if rows := _manifest(folder).get("images"):  # grids and maps of experts stand beside the samples
        return sorted(folder / row["file"] for row in rows)
    found = sorted(path for path in _below(folder) if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{name}={folder}: has no images; their names end in {', '.join(SUFFIXES)}")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Yields all files in a folder and below it, also in folders that are links; each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (Path(place, name) for name in files)


def check_finished(folder: Path, name: str) -> None:
    """Raises UserError if a manifest of ecdit.sample, in the folder or above it, says that images are missing."""
    manifest = _manifest(folder) or _manifest(folder.absolute().parent)
    if manifest and not manifest["finished"]:
        raise UserError(f"{name}={folder}: is not finished; run the same ecdit.sample again")


def _manifest(folder: Path) -> dict[str, Any]:
    """Returns ecdit.sample's manifest of a folder; {} if there is none, or only another program's."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or "finished" not in found or not isinstance(found.get("images"), list):
        return {}
    ours = all(isinstance(row, dict) and isinstance(row.get("file"), str) for row in found["images"])
    return found if ours else {}


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image as it is stored, in RGB; transparency is dropped.

    Raises:
      UserError: it cannot be read, or has more than eight bits a channel.
    """
    return np.asarray(_opened(path).convert("RGB"))


def read_upright(path: Path) -> Image.Image:
    """Returns an image in RGB, turned as its EXIF data says. Raises as `read_image`."""
    return ImageOps.exif_transpose(_opened(path)).convert("RGB")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            _check_mode(path, image)  # first: the raw mode is gone once the image is loaded
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise UserError(f"{path}: cannot be read as an image: {error}") from None
    return image


def _check_mode(path: Path, image: Image.Image) -> None:
    tile = getattr(image, "tile", None)  # of an image that is not loaded yet
    raw = str(tile[0][3]) if tile else ""  # such as RGB;16B, of which Pillow would drop the lower bytes
    if image.mode in _CLIPPED_MODES or ";16" in raw:
        raise UserError(f"{path}: has mode {raw or image.mode}, of more than 8 bits; convert it to 8 bits a channel")


def check_sizes(files: Sequence[Path], name: str) -> None:
    """Raises UserError unless all images have the same size and 8 bits a channel. Reads only headers."""
    first = None
    for path in files:
        try:
            with Image.open(path) as image:
                size = image.size
                _check_mode(path, image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image: {error}") from None
        first = first or (path, size)
        if size != first[1]:
            sizes = f"{path} is {size[0]} x {size[1]}, {first[0]} is {first[1][0]} x {first[1][1]}"
            raise UserError(f"{name}: images of several sizes: {sizes}; --mixed_sizes takes them nevertheless")
