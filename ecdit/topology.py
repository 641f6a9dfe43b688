"""Finds the chips, layout and hosts of TPU slices by name.

A slice has two spellings: Google Cloud's accelerator name (`v5p-256`) for the usual layout, and the generation with an
explicit layout (`v5p:4x4x8`), as in JAX's compile-only topologies. The number in an accelerator name counts TensorCores
of v4, v5p and TPU7x (two per chip), and chips of v5e and v6e. Layouts always count chips. Sources:
cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}, and github.com/AI-Hypercomputer/xpk for names of TPU7x.
"""

import dataclasses
import functools
import math

from ecdit.errors import UserError


class SliceError(UserError, ValueError):
    """No TPU slice has the given name."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs, with the limits of its slices."""

    chip: str  # `chips.Chip.name`
    prefix: str  # prefix of accelerator names
    cores: int  # number that an accelerator's name counts for one chip
    dimensions: int  # dimensions of the network between chips
    max_chips: int  # chips of the largest slice
    devices_per_chip: int = 1  # JAX devices per chip


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
PARTS_OF_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # smaller than the 4x4x4 cubes of larger slices
CUBE, MAX_SIDE = 4, 256  # chips along a side
HOST_CHIPS = 4  # chips of a host, unless the slice has fewer
LARGE_HOST_CHIPS = 8  # chips of the larger hosts of v5e and v6e, which are slices of one host


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips joined by their own network, and their hosts."""

    chip: str  # `chips.Chip.name`
    shape: tuple[int, ...]  # chips along each dimension
    chips_per_host: int

    @property
    def chips(self) -> int:
        """Returns the number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Returns the number of JAX devices on all hosts; a device is a chip, or one of the two dies of a TPU7x."""
        return self.chips * GENERATIONS[self.chip].devices_per_chip

    @property
    def devices_per_host(self) -> int:
        """Returns the number of JAX devices of one process."""
        return self.chips_per_host * GENERATIONS[self.chip].devices_per_chip

    @property
    def hosts(self) -> int:
        """Returns the number of hosts, each of which runs one process."""
        return self.chips // self.chips_per_host

    @property
    def topology(self) -> str:
        """Returns the layout in Google Cloud's spelling, such as 4x4x8."""
        return "x".join(map(str, self.shape))

    @property
    def accelerator(self) -> str:
        """Returns the accelerator's name, such as v5p-256, which slices of several layouts share."""
        generation = GENERATIONS[self.chip]
        return f"{generation.prefix}-{self.chips * generation.cores}"

    @property
    def is_usual(self) -> bool:
        """Returns whether the accelerator's name alone stands for this layout."""
        return usual_shapes(self.chip).get(self.chips) == self.shape

    def on_large_hosts(self) -> "Slice":
        """Returns the same chips on the fewest hosts, because one host can have eight chips of v5e or v6e."""
        if len(self.shape) == 2 and self.chips == LARGE_HOST_CHIPS:
            return dataclasses.replace(self, chips_per_host=LARGE_HOST_CHIPS)
        return self


def find_slice(name: str) -> Slice:
    """Returns the slice called `name`: `v5p-256`, or `v5p:4x4x8` for that layout (`v5e-16` is `v5litepod-16`).

    Raises:
      SliceError: no slice has the name; the message says which names exist.
    """
    head, separator, size = name.partition(":" if ":" in name else "-")
    found = [g for g in GENERATIONS.values() if head in (g.chip, g.prefix)]
    if not found or not size:
        number = " or ".join(f"{g.prefix}-N" for g in GENERATIONS.values())
        raise SliceError(
            f"accelerator {name!r}: must be {number} (N: TensorCores of v4, v5p and TPU7x, two per chip; else "
            f"chips), or a layout, such as v5p:4x4x8 or v6e:4x4"
        )
    shape = _shape_of_layout(name, found[0], size) if separator == ":" else _shape_of_size(name, found[0], size)
    return Slice(found[0].chip, shape, min(HOST_CHIPS, math.prod(shape)))


@functools.cache
def usual_shapes(chip: str) -> dict[int, tuple[int, ...]]:
    """Returns the usual layouts by number of chips, ascending: each is the layout closest to a cube."""
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
