"""Draws scenes of the `shapes` data, in NumPy alone.

A pixel is computed by comparisons, sums and products in a fixed order, so that all hosts draw the same image. Sines, or
sums in an order that a library chooses, would differ in their last bits.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ecdit.data.shape_scenes import LATTICE, Box, Ground, Scene

SAMPLES = 4  # points per side of a pixel; its coverage is the share of SAMPLES x SAMPLES points inside the shape

Coordinate = Float[np.ndarray, "..."]


def _star(x: Coordinate, y: Coordinate) -> Bool[np.ndarray, "..."]:
    """Returns whether points are in a pentagram, that is, on the inner side of at least four of its five lines."""
    inner = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.int64)
    for i, (x0, y0) in enumerate(STAR_TIPS):
        x1, y1 = STAR_TIPS[(i + 2) % 5]
        inner += (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inner >= 4


# Corners of a regular pentagon, clockwise from the top, stretched to touch all four sides of the box.
STAR_TIPS = ((0.0, -1.0), (1.0, -0.236068), (0.618034, 1.0), (-0.618034, 1.0), (-1.0, -0.236068))
RING_HOLE = 0.5  # radius
CROSS_ARM = 0.3  # half an arm's width

# Functions that return whether points of the box [-1, 1] x [-1, 1], y down, are inside the shape.
INSIDE: dict[str, Callable[[Coordinate, Coordinate], Bool[np.ndarray, "..."]]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1),
    "triangle": lambda x, y: (y <= 1) & (2 * abs(x) <= y + 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "star": _star,
    "cross": lambda x, y: ((abs(x) <= CROSS_ARM) & (abs(y) <= 1)) | ((abs(y) <= CROSS_ARM) & (abs(x) <= 1)),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= RING_HOLE * RING_HOLE),
}


def render(scene: Scene, image_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the image of a scene, square, with antialiased edges."""
    image = _ground(scene.ground, image_size)
    for placed in scene.objects:
        rows, columns, share = coverage(placed.shape, placed.box, image_size)
        region = image[rows, columns]
        region += share[..., None] * (np.array(placed.rgb, np.float64)[None, None] - region)
    return np.rint(image).astype(np.uint8)


def coverage(shape: str, box: Box, image_size: int) -> tuple[slice, slice, Float[np.ndarray, "h w"]]:
    """Returns the rows and columns of pixels that a shape in `box` touches, and the share of each that it covers."""
    columns, x = _samples(box.x, box.half, image_size)
    rows, y = _samples(box.y, box.half, image_size)
    inside = INSIDE[shape](x[None, :], y[:, None])
    counts = inside.reshape(len(y) // SAMPLES, SAMPLES, len(x) // SAMPLES, SAMPLES).sum(axis=(1, 3))
    return rows, columns, counts / SAMPLES**2


def _samples(center: float, half: float, image_size: int) -> tuple[slice, Float[np.ndarray, " n"]]:
    """Returns the pixels that [center - half, center + half] touches, and their sample points in units of the box."""
    first = max(int(np.floor((center - half) * image_size)), 0)
    last = min(int(np.ceil((center + half) * image_size)), image_size)
    pixels = slice(first, max(last, first))
    points = (np.arange(pixels.start * SAMPLES, pixels.stop * SAMPLES) + 0.5) / (SAMPLES * image_size)
    return pixels, (points - center) / half


def _ground(ground: Ground, image_size: int) -> Float[np.ndarray, "H W 3"]:
    pattern = _pattern(ground, (np.arange(image_size) + 0.5) / image_size)
    return np.array(ground.rgb, np.float64)[None, None] + ground.contrast * pattern[..., None]


def _pattern(ground: Ground, centers: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
    """Returns the ground's pattern, between -1 and 1, at the centres of pixels."""
    x, y = centers[None, :], centers[:, None]
    if ground.texture == "stripes":
        across, down = ground.direction
        return 1 - 2 * (np.floor(2 * ((across * x + down * y) / ground.period + ground.phase)) % 2)
    if ground.texture == "checks":
        parity = np.floor(2 * (x / ground.period + ground.phase)) + np.floor(2 * (y / ground.period + ground.phase))
        return 1 - 2 * (parity % 2)
    if ground.texture == "clouds":
        values = np.array(ground.lattice).reshape(LATTICE, LATTICE)
        place = centers * (LATTICE - 1)
        left = np.minimum(place.astype(np.int64), LATTICE - 2)
        right_share = place - left
        rows = values[left] + right_share[:, None] * (values[left + 1] - values[left])
        return rows[:, left] + right_share[None, :] * (rows[:, left + 1] - rows[:, left])
    return np.zeros((len(centers), len(centers)))
