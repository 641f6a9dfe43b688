"""Draws scenes of the `shapes` data: a row's coloured shapes, their boxes, and their ground.

A scene is a function of (config, seed, row). Positions and sizes are shares of the image's side, x to the right and y
down, so a row shows the same scene at every resolution. Boxes of two shapes never overlap.

Two kinds of combinations are held out: shapes with colours, and relations of shapes. Training rows contain neither;
every row of the split `held_out` has one, and its caption states it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from ecdit.config import require

T = TypeVar("T")
Color = tuple[int, int, int]  # red, green, blue, 0 to 255

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLORS: dict[str, Color] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (135, 50, 170),
    "white": (248, 248, 248),
    "black": (15, 15, 15),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags

HELD_OUT_COLORS = {
    "circle": "purple",
    "square": "yellow",
    "triangle": "blue",
    "diamond": "green",
    "star": "red",
    "cross": "orange",
    "ring": "white",
}
# "A left of B" is also "B right of A". Each pair of shapes has at most one, so that exchanging the two removes it.
HELD_OUT_RELATIONS = (
    ("circle", "left of", "square"),
    ("square", "above", "triangle"),
    ("triangle", "left of", "ring"),
    ("diamond", "above", "circle"),
    ("star", "above", "cross"),
    ("cross", "left of", "diamond"),
    ("ring", "above", "star"),
)
KINDS_HELD_OUT = ("counting", "colors", "position", "color_attr")  # their captions can state a held-out combination

MARGIN = 0.035  # between a box and its cell's edge; boxes are twice as far apart: 2.2 px of 32
SMALLEST, LARGEST = 0.15, 0.34  # limits of half a box's side
JITTER = 8  # levels by which every channel of a colour may differ
GROUND_LEVELS = (95, 165)  # limits of the ground's grey, far from every colour
TEXTURES = ("stripes", "checks", "clouds")
TEXTURE_CONTRAST = (5, 12)  # limits of the levels that a texture adds and subtracts
LATTICE = 5  # points per side of the lattice of random values that makes clouds

# Each purpose has its own random stream, apart from those of ecdit/data/loader.py: draws never change another stream.
_PURPOSES = {"scene": 16, "ground": 17, "caption": 18}


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """Says which scenes are drawn, and at which size."""

    image_size: int  # px, side of the square image
    ground: Literal["plain", "textured"]
    split: Literal["train", "held_out"]
    kinds: tuple[str, ...]  # kinds of captions from KINDS, equally often

    def __post_init__(self):
        require(32 <= self.image_size <= 512, "image_size", self.image_size, "must be between 32 and 512 px")
        allowed = KINDS if self.split == "train" else KINDS_HELD_OUT
        known = len(self.kinds) > 0 and len(set(self.kinds)) == len(self.kinds) and set(self.kinds) <= set(allowed)
        named = f"must be one or more of {', '.join(allowed)} for split = {self.split!r}, each once"
        require(known, "kinds", self.kinds, named)


@dataclasses.dataclass(frozen=True)
class Box:
    """A square, given by its centre and half its side as shares of the image's side."""

    x: float
    y: float
    half: float


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape of a scene. Every shape touches all four sides of its box."""

    shape: str
    color: str
    rgb: Color  # the colour with this object's jitter
    box: Box


@dataclasses.dataclass(frozen=True)
class Ground:
    """A ground: `rgb` plus `contrast` levels times a pattern between -1 and 1."""

    rgb: Color
    texture: str  # "plain" or one of TEXTURES
    contrast: int
    period: float  # period of stripes and checks, as a share of the image's side
    direction: tuple[int, int]  # direction across stripes: (1, 0) across, (0, 1) down, (1, 1) and (1, -1) diagonal
    phase: float
    lattice: tuple[float, ...]  # LATTICE x LATTICE values of clouds, row by row


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that a row shows, with the kind and the relation of its caption."""

    kind: str
    objects: tuple[Object, ...]
    ground: Ground
    states_colors: bool
    relation: str | None  # for kind position: objects[0] is `relation` objects[1]


class Draws:
    """Draws random numbers for one purpose and row.

    It uses Philox's raw words alone, because NumPy promises that these never change, and makes no such promise for the
    methods of `Generator`.
    """

    def __init__(self, seed: int, row: int, purpose: str):
        # Philox counts in the lowest of its four counter words. The row is in a higher one, so streams never overlap.
        key, counter = (np.array(words, np.uint64) for words in ([seed, _PURPOSES[purpose]], [0, row, 0, 0]))
        self._philox = np.random.Philox(key=key, counter=counter)

    def uniform(self, low: float, high: float) -> float:
        """Draws a number in [low, high)."""
        return low + (high - low) * ((int(self._philox.random_raw()) >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """Draws an integer from low to high, both included."""
        return low + ((int(self._philox.random_raw()) >> 32) * (high - low + 1) >> 32)

    def choice(self, options: Sequence[T]) -> T:
        """Draws one of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def jittered(self, color: Color) -> Color:
        """Draws a colour whose channels differ from `color` by up to JITTER levels."""
        red, green, blue = (min(max(level + self.integer(-JITTER, JITTER), 0), 255) for level in color)
        return red, green, blue


def scene_of(config: ShapesConfig, seed: int, row: int) -> Scene:
    """Returns the scene of a row in bounded time. It is the same at every `image_size` and on every host.

    Raises:
      ConfigError: a seed that is no uint32, or a row that is no uint64.
    """
    require(0 <= seed < 2**32, "seed", seed, "must be between 0 and 2**32 - 1")
    require(0 <= row < 2**64, "row", row, "must be between 0 and 2**64 - 1")
    draws = Draws(seed, row, "scene")
    kind = draws.choice(config.kinds)
    states_colors = kind in ("colors", "color_attr") or (
        kind in ("counting", "position") and draws.choice((True, False))
    )
    if config.split == "held_out" and kind == "counting":
        states_colors = True
    relation = None
    if kind == "position":
        shapes, relation = _related_shapes(draws, held_out=config.split == "held_out")
    elif kind == "counting":
        shapes = [draws.choice(SHAPES)] * draws.integer(2, 4)
    else:
        shapes = _distinct(draws, SHAPES, 1 if kind in ("single_object", "colors") else 2)
    colors = _colors(draws, kind, shapes, states_colors, held_out=config.split == "held_out")
    boxes = _related_boxes(draws, relation) if relation else _boxes(draws, len(shapes))
    objects = [
        Object(shape, color, draws.jittered(COLORS[color]), box)
        for shape, color, box in zip(shapes, colors, boxes, strict=True)
    ]
    if kind in ("two_object", "color_attr") and is_held_out_relation(objects):
        first, second = objects
        objects = [dataclasses.replace(first, box=second.box), dataclasses.replace(second, box=first.box)]
    return Scene(kind, tuple(objects), _ground(config, seed, row), states_colors, relation)


def relations(a: Box, b: Box) -> tuple[str, ...]:
    """Returns the RELATIONS in which box a stands to box b by GenEval's rule: none, one, or two on a diagonal.

    The offset of the centres is shortened, in each direction, by a tenth of the sum of the boxes' sides. A relation
    holds if the shortened offset in its direction is more than half of the whole offset's length.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    shortened = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * (2 * a.half + 2 * b.half), 0)
    if not shortened.any():
        return ()
    x, y = shortened / np.hypot(*offset)
    return tuple(name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds)


def is_held_out(shape: str, relation: str, other: str) -> bool:
    """Returns whether training never shows "a `shape` `relation` a `other`", as it stands or as its converse."""
    return bool({(shape, relation, other), (other, OPPOSITE[relation], shape)} & set(HELD_OUT_RELATIONS))


def is_held_out_relation(objects: Sequence[Object]) -> bool:
    """Returns whether two of `objects` stand in a held-out relation."""
    return any(
        is_held_out(a.shape, relation, b.shape)
        for a in objects
        for b in objects
        for relation in relations(a.box, b.box)
    )


def _distinct(draws: Draws, options: Sequence[str], count: int) -> list[str]:
    chosen: list[str] = []
    for _ in range(count):
        chosen.append(draws.choice([option for option in options if option not in chosen]))
    return chosen


def _related_shapes(draws: Draws, held_out: bool) -> tuple[list[str], str]:
    """Returns two shapes and the relation of the first to the second."""
    if held_out:
        shape, relation, other = draws.choice(HELD_OUT_RELATIONS)
        if draws.choice((True, False)):
            shape, relation, other = other, OPPOSITE[relation], shape
        return [shape, other], relation
    shape, other = _distinct(draws, SHAPES, 2)
    return [shape, other], draws.choice([name for name in RELATIONS if not is_held_out(shape, name, other)])


def _colors(draws: Draws, kind: str, shapes: Sequence[str], states_colors: bool, held_out: bool) -> list[str]:
    """Returns a colour for each shape. Counted shapes with a stated colour share it; those of color_attr differ."""
    allowed = {shape: [color for color in COLORS if color != HELD_OUT_COLORS[shape]] for shape in shapes}
    if held_out and kind != "position":
        chosen = draws.choice(shapes)
        allowed[chosen] = [HELD_OUT_COLORS[chosen]]
    if kind == "counting" and states_colors:
        return [draws.choice(allowed[shapes[0]])] * len(shapes)
    if kind != "color_attr":
        return [draws.choice(allowed[shape]) for shape in shapes]
    # The shape with the fewest colours draws first, so that the other one cannot take its only colour.
    order = sorted(shapes, key=lambda shape: len(allowed[shape]))
    colors = {order[0]: draws.choice(allowed[order[0]])}
    colors[order[1]] = draws.choice([color for color in allowed[order[1]] if color != colors[order[0]]])
    return [colors[shape] for shape in shapes]


def _boxes(draws: Draws, count: int) -> list[Box]:
    """Returns boxes of 1 to 4 shapes, each in its own cell. Cells come from halving the image at random places."""
    cells = [(0.0, 0.0, 1.0, 1.0)]  # left, top, right, bottom
    while len(cells) < count:
        left, top, right, bottom = cell = max(cells, key=lambda cell: (cell[2] - cell[0]) * (cell[3] - cell[1]))
        share = draws.uniform(0.46, 0.54)
        across = (
            draws.choice((True, False)) if (left, top, right, bottom) == (0, 0, 1, 1) else right - left > bottom - top
        )
        cells.remove(cell)
        if across:
            middle = left + share * (right - left)
            cells += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + share * (bottom - top)
            cells += [(left, top, right, middle), (left, middle, right, bottom)]
    # Cells are shuffled, because otherwise a caption's first shape would tend to be on the left.
    cells = [cells[int(place)] for place in _distinct(draws, [str(place) for place in range(count)], count)]
    return [_box_in(draws, *cell) for cell in cells]


def _box_in(draws: Draws, left: float, top: float, right: float, bottom: float) -> Box:
    half = draws.uniform(SMALLEST, min(LARGEST, min(right - left, bottom - top) / 2 - MARGIN))
    x = draws.uniform(left + MARGIN + half, right - MARGIN - half)
    y = draws.uniform(top + MARGIN + half, bottom - MARGIN - half)
    return Box(x, y, half)


def _related_boxes(draws: Draws, relation: str) -> list[Box]:
    """Returns two boxes that stand in `relation` and in no other."""
    middle = draws.uniform(0.46, 0.54)
    near, far = _box_in(draws, 0, 0, middle, 1), _box_in(draws, middle, 0, 1, 1)
    # The offset in y is limited, because a box far up or down beside the other would also be above or below it.
    y = near.y + draws.uniform(-0.25, 0.25) * (far.x - near.x)
    far = dataclasses.replace(far, y=min(max(y, MARGIN + far.half), 1 - MARGIN - far.half))
    if relation in ("above", "below"):
        near, far = (Box(box.y, box.x, box.half) for box in (near, far))
    return [near, far] if relation in ("left of", "above") else [far, near]


def _ground(config: ShapesConfig, seed: int, row: int) -> Ground:
    draws = Draws(seed, row, "ground")
    level = draws.integer(*GROUND_LEVELS)
    rgb = draws.jittered((level, level, level))
    texture = draws.choice(TEXTURES) if config.ground == "textured" else "plain"
    return Ground(
        rgb=rgb,
        texture=texture,
        contrast=draws.integer(*TEXTURE_CONTRAST),
        period=draws.uniform(0.15, 0.4),
        direction=draws.choice(((1, 0), (0, 1), (1, 1), (1, -1))),
        phase=draws.uniform(0, 1),
        lattice=tuple(draws.uniform(-1, 1) for _ in range(LATTICE**2)),
    )
