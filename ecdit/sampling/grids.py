"""Writes images as PNGs, and as a grid with captions."""

import functools
import io
import itertools
import math
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, features

from ecdit.files import replace_bytes

CELL_WIDTH = 128  # pixels of a grid cell
CAPTION_LINES = 2
LINE_HEIGHT = 13
FONT_SIZE = 11

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_png(image: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Writes one image."""
    write_png(Image.fromarray(image), path)


def write_png(image: Image.Image, path: Path) -> None:
    """Writes an image as a PNG, whole or not at all, to a disk or a bucket (PIL itself writes only to disks)."""
    data = io.BytesIO()
    image.save(data, "PNG")
    replace_bytes(path, data.getvalue())


def save_grid(images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], path: Path, columns: int = 0) -> None:
    """Writes images as one PNG, in rows, each above its caption. Enlarges small images without smoothing.

    Pillow's own font covers little more than ASCII. Other captions are drawn in a font of the system, if fontconfig
    finds one that covers them. If it does not, the cell has the caption's number, and a text file beside the PNG lists
    all captions.

    Args:
      images: square images.
      captions: their captions, in any script.
      path: the PNG file.
      columns: images in a row; 0 makes the grid about square.
    """
    side = images.shape[1]
    shown = max(side, CELL_WIDTH // side * side)
    cell_height = shown + CAPTION_LINES * LINE_HEIGHT + 6
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (shown + 8), rows * cell_height), "white")
    draw, listing, listed = ImageDraw.Draw(grid), path.with_suffix(".txt"), False
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * (shown + 8) + 4, i // columns * cell_height
        grid.paste(Image.fromarray(image).resize((shown, shown), Image.Resampling.NEAREST), (left, top))
        font = caption_font(caption)
        if font is None:
            caption, font, listed = f"caption {i + 1}: see {listing.name}", _pillow_font(), True
        lines = wrapped(caption, font, shown, CAPTION_LINES)
        draw.multiline_text((left, top + shown + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    write_png(grid, path)
    if listed:
        numbered = (f"{i}: {' '.join(caption.split())}\n" for i, caption in enumerate(captions, 1))
        replace_bytes(listing, "".join(numbered).encode())


def caption_font(caption: str) -> Font | None:
    """Returns a font with a glyph for every character of a caption, or None if there is none."""
    return _covering_font(frozenset(caption) - frozenset(" \t\n\r"))


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """Returns the first `most` lines of a text, at most `width` pixels wide. Breaks words that do not fit a line."""
    return list(itertools.islice(_lines(text, font, width), most))


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    """Yields all lines, one by one, because each is measured by character and a prompt may have thousands of them."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
            line = ""
        for character in word:
            if line and not _joins(character) and font.getlength(line + character) > width:
                yield line
                line = ""
            line += character
    yield line


def _joins(character: str) -> bool:
    """Returns whether a character belongs to the one before it, such as an accent or a joiner."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


@functools.lru_cache(maxsize=1024)
def _covering_font(characters: frozenset[str]) -> Font | None:
    """Returns Pillow's own font if it has all characters, else a font of the system that has them, or None."""
    if all(_has_glyph(_pillow_font(), character) for character in characters):
        return _pillow_font()
    # Only Raqm joins the letters of Arabic or Devanagari and draws from right to left.
    if not features.check("raqm"):
        return None
    font = _system_font(characters)
    visible = (character for character in characters if not _joins(character))
    return font if font is not None and all(_has_glyph(font, character) for character in visible) else None


@functools.cache
def _pillow_font() -> Font:
    return ImageFont.load_default(FONT_SIZE)


def _system_font(characters: frozenset[str]) -> Font | None:
    """Returns fontconfig's best match for some characters, or None without fontconfig or a usable font."""
    charset = " ".join(sorted(f"{ord(character):x}" for character in characters))
    command = ["fc-match", "--format=%{index} %{file}", f"sans:charset={charset}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        index, _, file = found.partition(" ")
        return ImageFont.truetype(file, FONT_SIZE, int(index))
    except (OSError, ValueError, subprocess.CalledProcessError):  # an OSError also for fonts of bitmaps in other sizes
        return None


def _has_glyph(font: Font, character: str) -> bool:
    """Returns whether a font draws a character otherwise than one that no font can have."""
    glyph: Any = font.getmask(character)  # of Pillow's own type, which has no type of a buffer
    missing: Any = font.getmask("\uffff")
    return glyph.size != missing.size or bytes(glyph) != bytes(missing)
