"""Judges images of the `shapes` data from pixels alone: is a caption true of an image?

    image -> ground -> connected regions that differ from it -> colour, shape and box of each -> GenEval's rules

The judge knows the data's shapes and colours, never the scene that an image was made from. So samples of a model are
judged as rows of the data are. Its error rates, and how much blur, noise and shift it bears, are in docs/shapes.md.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ecdit.data.shape_rendering import coverage
from ecdit.data.shape_scenes import COLORS, SHAPES, Box, relations

_SMALLEST_AREA = 0.008  # share of the image; the smallest shape of the data, a star, has 0.026
_GROUND_RADIUS = 60  # levels from the median: textures are within, shapes not
_BLURS = (0, 1, 2, 4)  # how often a template is blurred: edges may be sharper or softer than the data's
_WORST_FIT = 0.7  # a region that fits no shape better is none


@dataclasses.dataclass(frozen=True)
class Found:
    """One shape that the judge sees."""

    shape: str
    color: str
    box: Box
    fit: float  # 1 where the region is exactly the shape


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says whether a caption is true of an image, and why not, one reason per line."""

    correct: bool
    reason: str


def judge(image: UInt8[np.ndarray, "H W 3"], metadata: Mapping[str, Any]) -> Verdict:
    """Returns the verdict on an image whose caption says what `metadata` does (see `shape_captions.metadata_of`)."""
    return verdict(find_objects(image), metadata)


def verdict(objects: list[Found], metadata: Mapping[str, Any]) -> Verdict:
    """Applies GenEval's rules to objects that were found.

    An item of `include` asks for `count` shapes of its class: of its colour, if it states one, and all of them in its
    relation to all shapes of its target. An item of `exclude` allows fewer than `count`. Different from GenEval, whose
    detections have no colour yet, a colour is asked of all shapes of the class and not of the `count` surest alone.
    """
    reasons: list[str] = []
    groups: list[list[Found]] = []  # by item of include; empty where it was not met
    for item in metadata["include"]:
        shape, count, color = item["class"], item["count"], item.get("color")
        of_shape = sorted((found for found in objects if found.shape == shape), key=lambda found: -found.fit)
        chosen = [found for found in of_shape if color in (None, found.color)][:count]
        groups.append(chosen if len(chosen) == count else [])
        if len(of_shape) < count:
            reasons.append(f"expected {shape}>={count}, found {len(of_shape)}")
        elif len(chosen) < count:
            seen = ", ".join(sorted(found.color for found in of_shape))
            reasons.append(f"expected {color} {shape}>={count}, found {seen}")
        elif "position" in item:
            reasons += _position_reasons(shape, chosen, item["position"][0], groups[item["position"][1]])
    for item in metadata.get("exclude", ()):
        found = sum(each.shape == item["class"] for each in objects)
        if found >= item["count"]:
            reasons.append(f"expected {item['class']}<{item['count']}, found {found}")
    return Verdict(not reasons, "\n".join(reasons))


def _position_reasons(shape: str, chosen: list[Found], relation: str, targets: list[Found]) -> list[str]:
    if not targets:
        return [f"no target for {shape} to be {relation}"]
    pairs = [relations(found.box, target.box) for found in chosen for target in targets]
    return [
        f"expected {shape} {relation} target, found {' and '.join(true) or 'neither'} target"
        for true in pairs
        if relation not in true
    ]


def find_objects(image: UInt8[np.ndarray, "H W 3"]) -> list[Found]:
    """Returns the shapes of a square image, largest region first."""
    pixels = image.astype(np.float64)
    ground = _ground(pixels)
    regions = _regions(_nearest(pixels, ground), _SMALLEST_AREA * pixels.shape[0] * pixels.shape[1])
    occupied = np.any(regions, axis=0) if regions else np.zeros(pixels.shape[:2], bool)
    found = []
    for region in regions:
        core = _core_color(pixels, region, ground)
        color, covered = _color(core, ground)
        direction = (core - ground) / covered
        share = np.minimum((pixels - ground[None, None]) @ direction / max(direction @ direction, 1), 1)
        free = ~_dilated(occupied)
        # By how much the free ground differs from its mean: no more than this of a pixel is no edge.
        texture = 1.1 * np.quantile(np.abs(share[free]), 0.9) if free.any() else 0.0
        around = _dilated(_dilated(region)) & ~(_dilated(occupied & ~region)) & (np.abs(share) > texture)
        shape, box, fit = _best_shape(np.where(around, share, 0))
        if fit >= _WORST_FIT:
            found.append(Found(shape, color, box, fit))
    return found


def _ground(pixels: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "3"]:
    """Returns the ground's mean colour, by the outermost pixels: shapes leave them free or cover fewer than half."""
    width = max(1, pixels.shape[0] // 32)
    edge = np.ones(pixels.shape[:2], bool)
    edge[width:-width, width:-width] = False
    median = np.median(pixels[edge], axis=0)  # one of the two colours of stripes
    near = np.linalg.norm(pixels[edge] - median[None], axis=1) < _GROUND_RADIUS
    return pixels[edge][near].mean(axis=0) if near.any() else median


def _nearest(pixels: Float[np.ndarray, "H W 3"], ground: Float[np.ndarray, "3"]) -> Bool[np.ndarray, "H W"]:
    """Returns whether pixels are nearer to one of COLORS than to the ground, so that a shape covers more than half."""
    colors = np.array([ground, *COLORS.values()])
    distance = np.square(pixels[:, :, None] - colors[None, None]).sum(axis=-1)
    return distance.argmin(axis=-1) > 0


def _regions(mask: Bool[np.ndarray, "H W"], smallest: float) -> list[Bool[np.ndarray, "H W"]]:
    """Returns the connected regions of a mask, diagonals included, of at least `smallest` pixels, largest first."""
    labels = _components(mask)
    names, counts = np.unique(labels[mask], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [labels == names[place] for place in order if counts[place] >= smallest]


def _components(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """Returns a number for each pixel, the same within a connected region: the least index of its pixels."""
    none = mask.size
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), none)
    while True:
        lowest = functools.reduce(np.minimum, _neighbours(labels, none))
        # A pixel's label is a pixel of its region: taking over that one's label makes long regions quick.
        lowest = np.where(mask, np.append(lowest.ravel(), none)[lowest], none)
        if (lowest == labels).all():
            return labels
        labels = lowest


def _neighbours(values: np.ndarray, outside: Any) -> list[np.ndarray]:
    """Returns `values` shifted by each of the nine offsets of up to one pixel."""
    height, width = values.shape
    padded = np.pad(values, 1, constant_values=outside)
    return [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]


def _dilated(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    return np.any(_neighbours(mask, False), axis=0)


def _core_color(
    pixels: Float[np.ndarray, "H W 3"], region: Bool[np.ndarray, "H W"], ground: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3"]:
    """Returns the colour of a region's inside, where no edge mixes it with the ground."""
    inside = np.all(_neighbours(region, False), axis=0)
    if inside.sum() < 4:  # a thin shape has no inside
        distance = np.where(region, np.square(pixels - ground[None, None]).sum(axis=-1), -1)
        inside = distance >= np.quantile(distance[region], 0.7)
    return np.median(pixels[inside], axis=0)


def _color(core: Float[np.ndarray, "3"], ground: Float[np.ndarray, "3"]) -> tuple[str, float]:
    """Returns which of COLORS a region's inside has, and its share there: blur mixes ground into thin shapes."""
    best = ("", 1.0, np.inf)
    for name, color in COLORS.items():
        direction = np.array(color) - ground
        share = float(np.clip((core - ground) @ direction / max(direction @ direction, 1), 0.5, 1))
        distance = float(np.linalg.norm(ground + share * direction - core))
        best = min(best, (name, share, distance), key=lambda candidate: candidate[2])
    return best[:2]


def _best_shape(share: Float[np.ndarray, "H W"]) -> tuple[str, Box, float]:
    """Returns the shape whose template fits best, drawn with the region's own area and centre of gravity.

    Both survive blur and noise, where a bounding box would not. Templates are antialiased, or have every pixel filled
    that the shape touches, as some rasterisers do.
    """
    size = share.shape[0]
    area = max(float(share.sum()), 1.0)
    centers = np.arange(size) + 0.5
    x, y = float(share.sum(axis=0) @ centers / area), float(share.sum(axis=1) @ centers / area)
    rows, columns = (_extent(share != 0, axis) for axis in (1, 0))
    best = (SHAPES[0], Box(0.5, 0.5, 0.5), -1.0)
    for shape, fills_touched in itertools.product(SHAPES, (False, True)):
        unit = _unit(shape)
        # Filling every pixel that an edge touches moves all edges out by half a pixel on average.
        grown = unit.perimeter * 0.5 if fills_touched else 0.0
        half = (math.sqrt(grown**2 + 4 * unit.area * area) - grown) / (2 * unit.area)
        box = Box(x / size, (y - unit.center * half) / size, half / size)
        whole = np.zeros_like(share)
        box_rows, box_columns, covered = coverage(shape, box, size)
        whole[box_rows, box_columns] = covered > 0 if fills_touched else covered
        template = whole[rows, columns]
        for times in range(max(_BLURS) + 1):
            if times in _BLURS:
                fit = float(1 - np.abs(share[rows, columns] - template).sum() / (2 * area))
                best = max(best, (shape, box, fit), key=lambda candidate: candidate[2])
            template = _blurred(template)
    return best


def _extent(mask: Bool[np.ndarray, "H W"], axis: int) -> slice:
    """Returns the rows (axis 1) or columns (axis 0) of a mask, with two more on either side."""
    places = np.flatnonzero(mask.any(axis=axis))
    return slice(max(int(places[0]) - 2, 0), int(places[-1]) + 3) if len(places) else slice(0, 0)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A shape in the box [-1, 1] x [-1, 1]."""

    area: float
    perimeter: float  # length in horizontal and vertical steps
    center: float  # how far its centre of gravity is below the middle


@functools.cache
def _unit(shape: str) -> _Unit:
    scale = 128  # px
    _, _, covered = coverage(shape, Box(0.5, 0.5, 0.5), 2 * scale)
    steps = sum(np.abs(np.diff(np.pad(covered, 1), axis=axis)).sum() for axis in (0, 1))
    y = (np.arange(2 * scale) + 0.5) / scale - 1
    return _Unit(
        area=float(covered.sum()) / scale**2,
        perimeter=float(steps) / scale,
        center=float(covered.sum(axis=1) @ y / covered.sum()),
    )


def _blurred(values: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Returns `values` after a 3 x 3 binomial filter, with zeros outside."""
    rows = values / 2
    rows[1:] += values[:-1] / 4
    rows[:-1] += values[1:] / 4
    blurred = rows / 2
    blurred[:, 1:] += rows[:, :-1] / 4
    blurred[:, :-1] += rows[:, 1:] / 4
    return blurred
