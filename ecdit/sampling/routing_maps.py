"""Draws how many experts took each token while images were sampled.

Axes: n images, P sparse layers, N tokens in raster order, g patches along a side.
"""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from ecdit.sampling.grids import CAPTION_LINES, CELL_WIDTH, LINE_HEIGHT

MAX_ROWS = 8
STAGES = {"early": 0.9, "middle": 0.5, "late": 0.1}  # noise times
# Ten colours of viridis (Smith and van der Walt, CC0), evenly spaced: equal steps in value look equally large.
VIRIDIS = np.array(
    [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142]]
    + [[31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]]
)
_GAP, _LEGEND = 8, (256, 14)  # pixels: between cells; width and height of the colour bar


def stage_steps(num_steps: int) -> dict[str, int]:
    """Returns the solver step that starts nearest to each of STAGES. Step i starts at time 1 - i / num_steps."""
    starts = 1 - np.arange(num_steps) / num_steps
    return {name: int(np.abs(starts - time).argmin()) for name, time in STAGES.items()}


def summaries(counts: Int[np.ndarray, "n steps P N"]) -> dict[str, Float[np.ndarray, "n N"]]:
    """Returns maps by label: each layer's mean over the solver steps, then the mean over layers at each stage."""
    num_steps, num_layers = counts.shape[1:3]
    layers = {f"layer {i + 1}\nall steps": counts[:, :, i].mean(axis=1) for i in range(num_layers)}
    stages = {
        f"all layers\n{name}, t = {1 - step / num_steps:.2f}": counts[:, step].mean(axis=1)
        for name, step in stage_steps(num_steps).items()
    }
    return layers | stages


def colour(values: Float[np.ndarray, "..."], top: float) -> UInt8[np.ndarray, "... 3"]:
    """Returns values of 0 .. top as colours, linear between those of VIRIDIS."""
    place = np.clip(values / top, 0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(place, np.arange(len(VIRIDIS)), VIRIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_maps(
    pictures: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], counts: Int[np.ndarray, "n steps P N"]
) -> Image.Image:
    """Draws a row for each image, at most MAX_ROWS: the image above its caption, then its maps.

    Args:
      images: square images.
      captions: of the images.
      counts: experts per token, as a sampler returns them.
    """
    chosen = np.linspace(0, len(pictures) - 1, min(len(pictures), MAX_ROWS)).round().astype(int)
    maps = summaries(counts[chosen])
    top = max(1.0, max(float(values.max()) for values in maps.values()))
    side, grid = pictures.shape[1], math.isqrt(counts.shape[-1])
    shown = max(side, CELL_WIDTH // side * side)
    step, header = shown + _GAP, 2 * LINE_HEIGHT + 6
    row_height = shown + CAPTION_LINES * LINE_HEIGHT + 6
    size = (_GAP + (1 + len(maps)) * step, header + len(chosen) * row_height + _LEGEND[1] + 2 * LINE_HEIGHT + _GAP)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    for column, label in enumerate(["sample", *maps]):
        draw.multiline_text((_GAP + column * step, 2), label, fill="black", font=font, spacing=1)
    for row, record in enumerate(chosen):
        y = header + row * row_height
        cells = [pictures[record]] + [colour(values[row].reshape(grid, grid), top) for values in maps.values()]
        for column, cell in enumerate(cells):
            enlarged = Image.fromarray(cell).resize((shown, shown), Image.Resampling.NEAREST)
            page.paste(enlarged, (_GAP + column * step, y))
        lines = textwrap.wrap(captions[int(record)], max(8, shown // 6))[:CAPTION_LINES]
        draw.multiline_text((_GAP, y + shown + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    _draw_legend(page, header + len(chosen) * row_height, top)
    return page


def _draw_legend(page: Image.Image, y: int, top: float) -> None:
    """Draws a colour bar with numbers under it, and what they count."""
    width, height = _LEGEND
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    bar = colour(np.linspace(0, top, width)[None].repeat(height, axis=0), top)
    page.paste(Image.fromarray(bar), (_GAP, y))
    for share in (0.0, 0.5, 1.0):
        x = _GAP + share * (width - 1)
        draw.line([(x, y + height), (x, y + height + 3)], fill="black")
        draw.text(
            (x, y + height + 3),
            f"{share * top:.3g}",
            fill="black",
            font=font,
            anchor=("la", "ma", "ra")[round(2 * share)],
        )
    draw.text((_GAP + width + _GAP, y), "experts per token", fill="black", font=font)
