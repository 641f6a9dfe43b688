"""Draws how many experts took each token while images were sampled.

`draw_maps` shows several images at a glance, `draw_layers` one image by layer and time.

Axes: n images, P sparse layers, N tokens in raster order, g patches along a side.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from ecdit.sampling.grids import CAPTION_LINES, CELL_WIDTH, LINE_HEIGHT, caption_font, wrapped

MAX_ROWS = 8
STAGES = {"early": 0.9, "middle": 0.5, "late": 0.1}  # noise times
# Ten colours of viridis (Smith and van der Walt, CC0), evenly spaced: equal steps in value look equally large.
VIRIDIS = np.array(
    [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142]]
    + [[31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]]
)
_GAP, _LEGEND = 8, (256, 14)  # pixels: between cells; width and height of the colour bar
_TIME_WIDTH = 52  # pixels: of a row's time


def stage_steps(times: Float[np.ndarray, " steps"]) -> dict[str, int]:
    """Returns the solver step whose time is nearest to each of STAGES."""
    return {name: int(np.abs(times - time).argmin()) for name, time in STAGES.items()}


def spread_steps(num_steps: int, count: int) -> list[int]:
    """Returns `count` solver steps, evenly spread from the first to the last, or all if there are fewer."""
    return np.linspace(0, num_steps - 1, min(num_steps, count)).round().astype(int).tolist()


def summaries(
    counts: Int[np.ndarray, "n steps P N"], times: Float[np.ndarray, " steps"]
) -> dict[str, Float[np.ndarray, "n N"]]:
    """Returns maps by label: each layer's mean over the solver steps, then the mean over layers at each stage."""
    layers = {f"layer {i + 1}\nall steps": counts[:, :, i].mean(axis=1) for i in range(counts.shape[2])}
    stages = {
        f"all layers\n{name}, t = {times[step]:.2f}": counts[:, step].mean(axis=1)
        for name, step in stage_steps(times).items()
    }
    return layers | stages


def colour(values: Float[np.ndarray, "..."], top: float) -> UInt8[np.ndarray, "... 3"]:
    """Returns values of 0 .. top as colours, linear between those of VIRIDIS."""
    place = np.clip(values / top, 0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(place, np.arange(len(VIRIDIS)), VIRIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_maps(
    images: UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    counts: Int[np.ndarray, "n steps P N"],
    times: Float[np.ndarray, " steps"],
) -> Image.Image:
    """Draws a row for each image, at most MAX_ROWS: the image above its caption, then its maps.

    Args:
      images: square images.
      captions: of the images.
      counts: experts per token, as a sampler returns them.
      times: at which each solver step calls the network (see `solvers.call_times`).
    """
    chosen = np.linspace(0, len(images) - 1, min(len(images), MAX_ROWS)).round().astype(int)
    maps = summaries(counts[chosen], times)
    top = max(1.0, max(float(values.max()) for values in maps.values()))
    side, grid = images.shape[1], math.isqrt(counts.shape[-1])
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
        cells = [images[record]] + [colour(values[row].reshape(grid, grid), top) for values in maps.values()]
        for column, cell in enumerate(cells):
            enlarged = Image.fromarray(cell).resize((shown, shown), Image.Resampling.NEAREST)
            page.paste(enlarged, (_GAP + column * step, y))
        _draw_caption(draw, (_GAP, y + shown + 1), captions[int(record)], shown)
    _draw_legend(page, header + len(chosen) * row_height, top)
    return page


def draw_layers(
    image: UInt8[np.ndarray, "h w 3"],
    caption: str,
    counts: Int[np.ndarray, "steps P N"],
    times: Float[np.ndarray, " steps"],
) -> Image.Image:
    """Draws one image above its caption, and beside it a map for each layer (a column) and time (a row).

    There is a row for each solver step, or for MAX_ROWS of them that are evenly spread. This is how the paper
    (arXiv 2410.02098) shows where experts go.
    """
    steps = spread_steps(len(counts), MAX_ROWS)
    top, num_layers = max(1.0, float(counts[steps].max())), counts.shape[1]
    side, grid = len(image), math.isqrt(counts.shape[2])
    shown = max(side, CELL_WIDTH // side * side)
    cell = max(grid, shown // 2 // grid * grid)
    header, left = LINE_HEIGHT + 6, _GAP + shown + _GAP + _TIME_WIDTH
    below = header + max(len(steps) * (cell + _GAP), shown + CAPTION_LINES * LINE_HEIGHT)
    width = max(left + num_layers * (cell + _GAP), 2 * _GAP + _LEGEND[0] + 120)
    page = Image.new("RGB", (width, below + _LEGEND[1] + 2 * LINE_HEIGHT + _GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    page.paste(Image.fromarray(image).resize((shown, shown), Image.Resampling.NEAREST), (_GAP, header))
    _draw_caption(draw, (_GAP, header + shown + 1), caption, shown)
    for column in range(num_layers):
        draw.text((left + column * (cell + _GAP), 2), f"layer {column + 1}", fill="black", font=font)
    for row, step in enumerate(steps):
        y = header + row * (cell + _GAP)
        draw.text((left - _TIME_WIDTH, y), f"t = {times[step]:.2f}", fill="black", font=font)
        for column in range(num_layers):
            colours = Image.fromarray(colour(counts[step, column].reshape(grid, grid).astype(float), top))
            page.paste(colours.resize((cell, cell), Image.Resampling.NEAREST), (left + column * (cell + _GAP), y))
    _draw_legend(page, below, top)
    return page


def _draw_caption(draw: ImageDraw.ImageDraw, place: tuple[int, int], caption: str, width: int) -> None:
    """Draws a caption in a font that has its letters; without one it says so."""
    font = caption_font(caption)
    if font is None:
        caption, font = "(no font has this caption's letters)", ImageFont.load_default(11)
    lines = wrapped(caption, font, width, CAPTION_LINES)
    draw.multiline_text(place, "\n".join(lines), fill="black", font=font, spacing=1)


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
