"""Parses scheduled HLO, the TPU compiler's `compiled.as_text()`, into plain records.

It keeps only what planning needs: computations in schedule order, each instruction's opcode, result, operands and
attributes, trip counts of loops, and the compiler's own estimate of an instruction's cycles.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0, "opaque": 0}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]T?(?:\([\d,]*\))?)\))? \{([^}]*)\}")


class HloError(ValueError):
    """This parser does not know the form of some HLO."""


class Shape(tuple):
    """The dimensions of an array, with its element type as `dtype`."""

    dtype: str

    def __new__(cls, dtype: str, dimensions: tuple[int, ...]) -> "Shape":
        """Makes the shape of an array; `dtype` is an HLO name."""
        shape = super().__new__(cls, dimensions)
        shape.dtype = dtype
        return shape

    @property
    def bytes(self) -> int:
        """Returns the bytes without the padding of tiles.

        Raises:
          HloError: the element type is unknown.
        """
        if self.dtype not in ITEM_BYTES:
            size = re.fullmatch(r"[a-z](\d+)\w*", self.dtype)  # f8e4m3fn, s4, ...
            if not size:
                raise HloError(f"element type {self.dtype!r}: its size is unknown")
            return math.ceil(math.prod(self) * int(size.group(1)) / 8)
        return math.prod(self) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    result: str  # its type, as text
    operands: tuple[str, ...]  # names
    attributes: str  # the text after the operands
    literal: str  # a constant's value or a parameter's number, which stands in the place of operands

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Returns the arrays of the result, which is one array or a tuple."""
        return tuple(array_shapes(self.result))

    @property
    def bytes(self) -> int:
        """Returns the bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, key: str) -> str | None:
        """Returns the name in an attribute such as calls=%name."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def called(self) -> str | None:
        """Returns the computation that a fusion, a call or an asynchronous call runs."""
        custom = re.search(r"\bcalled_computations=\{%?([\w.\-]+)\}", self.attributes)
        return self.attribute("calls") or self.attribute("to_apply") or (custom and custom.group(1))

    @property
    def branches(self) -> tuple[str, ...]:
        """Returns the computations of which a conditional runs one."""
        listed = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return tuple(_NAME.findall(listed.group(1)))
        return tuple(filter(None, (self.attribute("true_computation"), self.attribute("false_computation"))))

    @functools.cached_property
    def cycles(self) -> int | None:
        """Returns the compiler's own estimate, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return found and int(found.group(1))

    @functools.cached_property
    def kernel_flops(self) -> float:
        """Returns the FLOPs that a Pallas kernel declares; 0 for other instructions."""
        found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', self.attributes)
        return float(found.group(1)) if found else 0.0

    @functools.cached_property
    def op_name(self) -> str:
        """Returns the path of the operation in the traced program; "" for operations of the compiler."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, tuple[Instruction, ...]]  # in schedule order
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """Returns how often the body of a `while` runs, which is the bound of its condition on a counter from 0.

        Raises:
          HloError: the condition has another form.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.attribute("condition") or ""]
        bounds = [int(i.literal) for i in self.reachable(condition) if i.opcode == "constant" and _is_int(i)]
        compares = [i for i in self.reachable(condition) if i.opcode == "compare"]
        if len(bounds) != 1 or len(compares) != 1 or "direction=LT" not in compares[0].attributes:
            raise HloError(f"{loop.name}: cannot tell how often it runs: {[i.opcode for i in condition]}, {bounds}")
        return bounds[0]

    def reachable(self, computation: tuple[Instruction, ...]) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of its fusions and calls."""
        for instruction in computation:
            yield instruction
            if (called := instruction.called) is not None and called in self.computations:
                yield from self.reachable(self.computations[called])


def parse(text: str) -> Module:
    """Parses the text of `compiled.as_text()`.

    Raises:
      HloError: there is no entry computation, or a line cannot be read.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        header = _HEADER.match(line) if not line.startswith(" ") else None
        if header:
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name is not None and line.startswith("}"):
            computations[name], name = tuple(lines), None
        elif name is not None:
            lines.append(_instruction(line))
    if entry is None:
        raise HloError("no entry computation")
    return Module(computations, entry)


def array_shapes(text: str) -> Iterator[Shape]:
    """Yields the arrays in a type such as `(f32[2,3]{1,0}, s32[])`."""
    for dtype, dimensions in _ARRAY.findall(text):
        yield Shape(dtype, tuple(int(size) for size in dimensions.split(",") if size))


def replica_groups(instruction: Instruction) -> tuple[tuple[int, ...], ...] | None:
    """Returns the groups of partitions of a collective, or None for one group of all.

    Raises:
      HloError: the groups have an unknown form.
    """
    attributes = instruction.attributes
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return None
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return tuple(map(tuple, _iota(iota.group(1))))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if not listed:
        raise HloError(f"{instruction.name}: the replica groups have an unknown form")
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))


def source_target_pairs(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    """Returns the pairs of partitions of a collective-permute."""
    listed = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", listed.group(1) + "}")) if listed else ()


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of a mesh and the mesh axes that they join."""
    sizes = {key: int(size) for key, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape = tuple(sizes.values())
    ids = np.arange(math.prod(shape)) if device_ids is None else np.concatenate(_iota(device_ids))
    grid, names = np.asarray(ids).reshape(shape), list(sizes)
    joined = [names.index(axis) for axis in re.findall(r"'([^']+)'", over)]
    grid = np.moveaxis(grid, joined, range(grid.ndim - len(joined), grid.ndim))
    return tuple(map(tuple, grid.reshape(-1, math.prod(shape[i] for i in joined)).tolist()))


def _iota(text: str) -> list[list[int]]:
    """Expands lists in the form `[2,64]<=[128]`, `[2,64]<=[64,2]T(1,0)` or `[2,64]T(1,0)` (of the rows' own shape)."""
    pattern = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
    found = re.fullmatch(pattern, text)
    if found is None:
        raise HloError(f"list {text!r}: its form is unknown")
    shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
    grid = np.arange(math.prod(shape or ())).reshape(source or shape or ())
    grid = grid if order is None else grid.transpose(order)
    return grid.reshape(shape or () if source else grid.shape).tolist()


def _instruction(line: str) -> Instruction:
    """Parses a line such as `ROOT %name = type opcode(operands), attributes`."""
    name, separator, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not separator:
        raise HloError(f"not an instruction: {line[:200]}")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(_NAME.findall(inside))
    return Instruction(
        name.lstrip("%"), rest[:opening], result, operands, rest[closing + 1 :], "" if operands else inside
    )


_BRACKETS = re.compile(r"[()]")


def _closing(text: str, opening: int) -> int:
    """Returns where the parenthesis at `opening` closes."""
    depth = 0
    for found in _BRACKETS.finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise HloError(f"unbalanced parentheses: {text[:200]}")


def _is_int(constant: Instruction) -> bool:
    return constant.result.startswith(("s32[]", "u32[]", "s64[]"))
