"""Describes slices of TPUs by name: their chips, layout and hosts.

A slice has two spellings: Google Cloud's accelerator name (`v5p-256`), with the usual layout, and the generation with
an explicit layout (`v5p:4x4x8`), as JAX's compile-only topologies spell it. The number in a name counts TensorCores of
v4, v5p and TPU7x, two a chip, and chips of v5e and v6e. Layouts always count chips. Sources:
cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}; for names of TPU7x, github.com/AI-Hypercomputer/xpk.
"""

import dataclasses
import functools
import math

from ecdit.errors import UserError


class SliceError(UserError, ValueError):
    """No TPU slice has this name."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs, and the slices that it comes in."""

    chip: str  # as `chips.Chip.name`
    prefix: str  # of accelerator names
    cores: int  # what the number in an accelerator's name counts of a chip
    dimensions: int  # of the network between chips
    max_chips: int  # of a slice
    devices_per_chip: int = 1  # as JAX lists them


GENERATIONS = {
    generation.chip: generation
    for generation in (
        Generation("v4", "v4", cores=2, dimensions=3, max_chips=4096),
        Generation("v5p", "v5p", cores=2, dimensions=3, max_chips=6144),
        Generation("v5e", "v5litepod", cores=1, dimensions=2, max_chips=256),
        Generation("v6e", "v6e", cores=1, dimensions=2, max_chips=256),
        Generation("tpu7x", "tpu7x", cores=2, dimensions=3, max_chips=9216, devices_per_chip=2),
    )
}
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
PARTS_OF_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # below 4x4x4, of which larger slices are made
CUBE, MAX_SIDE = 4, 256  # chips along a side
HOST_CHIPS = 4  # of a host, where a slice has so many
LARGE_HOST_CHIPS = 8  # the hosts that v5e and v6e also come with, alone


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined by their own network, and the hosts they are in."""

    chip: str  # as `chips.Chip.name`
    shape: tuple[int, ...]  # chips along each dimension
    chips_per_host: int

    @property
    def chips(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What JAX lists on all hosts, and meshes are made of: a chip, or one of the two dies of a TPU7x."""
        return self.chips * GENERATIONS[self.chip].devices_per_chip

    @property
    def devices_per_host(self) -> int:
        """What JAX lists as one process's own."""
        return self.chips_per_host * GENERATIONS[self.chip].devices_per_chip

    @property
    def hosts(self) -> int:
        """Hosts, each with one process."""
        return self.chips // self.chips_per_host

    @property
    def topology(self) -> str:
        """The layout as Google Cloud spells it, such as 4x4x8."""
        return "x".join(map(str, self.shape))

    @property
    def accelerator(self) -> str:
        """The accelerator's name, such as v5p-256; slices of several layouts share it."""
        generation = GENERATIONS[self.chip]
        return f"{generation.prefix}-{self.chips * generation.cores}"

    @property
    def is_usual(self) -> bool:
        """Whether the accelerator's name alone gives this layout."""
        return usual_shapes(self.chip).get(self.chips) == self.shape

    def on_large_hosts(self) -> "Slice":
        """The same chips in as few hosts as there can be: eight of v5e or v6e can be in one."""
        if len(self.shape) == 2 and self.chips == LARGE_HOST_CHIPS:
            return dataclasses.replace(self, chips_per_host=LARGE_HOST_CHIPS)
        return self


def find_slice(name: str) -> Slice:
    """The slice called `name`: `v5p-256`, or `v5p:4x4x8` for that layout (`v5e-16` is `v5litepod-16`).

    Raises:
      SliceError: there is none; the message says which there are.
    """
    head, separator, size = name.partition(":" if ":" in name else "-")
    found = [g for g in GENERATIONS.values() if head in (g.chip, g.prefix)]
    if not found or not size:
        number = " or ".join(f"{g.prefix}-N" for g in GENERATIONS.values())
        raise SliceError(
            f"accelerator {name!r}: must be {number} (N: TensorCores of v4, v5p and TPU7x, two a chip; else "
            f"chips), or a layout, such as v5p:4x4x8 or v6e:4x4"
        )
    shape = _shape_of_layout(name, found[0], size) if separator == ":" else _shape_of_size(name, found[0], size)
    return Slice(found[0].chip, shape, min(HOST_CHIPS, math.prod(shape)))


@functools.cache
def usual_shapes(chip: str) -> dict[int, tuple[int, ...]]:
    """By chips, ascending: the layout of a slice where none is asked for, which is the one most like a cube."""
    generation = GENERATIONS[chip]
    if generation.dimensions == 2:
        return {math.prod(shape): shape for shape in FLAT}
    shapes = {math.prod(shape): shape for shape in PARTS_OF_CUBE}
    for cubes in range(1, generation.max_chips // CUBE**3 + 1):
        sides = [
            (a, b, cubes // (a * b))
            for a in range(1, round(cubes ** (1 / 3)) + 1)
            for b in range(a, math.isqrt(cubes // a) + 1)
            if cubes % (a * b) == 0 and CUBE * cubes // (a * b) <= MAX_SIDE
        ]
        if sides:
            a, b, c = min(sides, key=sum)
            shapes[cubes * CUBE**3] = CUBE * a, CUBE * b, CUBE * c
    return shapes


def _shape_of_size(name: str, generation: Generation, size: str) -> tuple[int, ...]:
    shapes = usual_shapes(generation.chip)
    number = int(size) if size.isdecimal() else 0
    chips, rest = divmod(number, generation.cores)
    if rest == 0 and chips in shapes:
        return shapes[chips]
    names = [f"{generation.prefix}-{chips * generation.cores}" for chips in shapes]
    below = [known for known, chips in zip(names, shapes, strict=True) if chips * generation.cores < number]
    above = names[len(below) :]
    nearest = " and ".join([*below[-1:], *above[:1]])
    raise SliceError(f"accelerator {name!r}: slices go from {names[0]} to {names[-1]}; the nearest: {nearest}")


def _shape_of_layout(name: str, generation: Generation, layout: str) -> tuple[int, ...]:
    sides = layout.split("x")
    shape = tuple(int(side) for side in sides if side.isdecimal())
    if generation.dimensions == 2:
        allowed, fits = ", ".join("x".join(map(str, known)) for known in FLAT), shape in FLAT
    else:
        parts = ", ".join("x".join(map(str, known)) for known in PARTS_OF_CUBE)
        allowed = f"{parts}, or multiples of {CUBE}, ascending, of at most {generation.max_chips} chips in all"
        whole = len(shape) == 3 and all(side >= CUBE and side % CUBE == 0 for side in shape)
        small = math.prod(shape) <= generation.max_chips and max(shape, default=0) <= MAX_SIDE
        fits = shape in PARTS_OF_CUBE or (whole and small and shape == tuple(sorted(shape)))
    if len(shape) != len(sides) or not fits:
        raise SliceError(f"accelerator {name!r}: layouts of {generation.chip} are {allowed}")
    return shape
