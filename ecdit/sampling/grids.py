"""Writes images as PNGs, and as a grid with captions."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH = 128  # pixels of a grid cell
CAPTION_LINES = 2
LINE_HEIGHT = 13


def save_png(image: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Writes one image."""
    write_png(Image.fromarray(image), path)


def write_png(image: Image.Image, path: Path) -> None:
    """Writes an image as a PNG, to a disk or a bucket (PIL itself writes only to disks)."""
    data = io.BytesIO()
    image.save(data, "PNG")
    path.write_bytes(data.getvalue())


def save_grid(images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], path: Path, columns: int = 0) -> None:
    """Writes images as one PNG, in rows, each above its caption. Small ones are enlarged without smoothing.

    With `columns` 0 the grid is about square.
    """
    side = images.shape[1]
    shown = max(side, CELL_WIDTH // side * side)
    cell_height = shown + CAPTION_LINES * LINE_HEIGHT + 6
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (shown + 8), rows * cell_height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * (shown + 8) + 4, i // columns * cell_height
        grid.paste(Image.fromarray(image).resize((shown, shown), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(caption, max(8, shown // 6))[:CAPTION_LINES]
        draw.multiline_text((left, top + shown + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    write_png(grid, path)
