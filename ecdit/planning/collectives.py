"""Computes the bytes sent and the seconds of collectives on a torus of chips with one or two devices each.

Rings follow "How to Scale Your Model" (jax-ml.github.io/scaling-book/sharding): a bidirectional ring of n chips gathers
or scatters S bytes in S (n - 1) / n / (links x bandwidth) with links = 2, and takes at least a microsecond per hop. An
all-reduce scatters and gathers. The links across the middle of the group limit an all-to-all. The hosts' network limits
collectives between slices.

Each of the two devices of a chip (the dies of a TPU7x) has half of its links, whatever the other sends. A group with
both devices gathers in two steps: each device its half of the array over the links, then the rest from the other die.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from ecdit.chips import Chip
from ecdit.planning.hlo import HloError, Instruction, replica_groups, source_target_pairs

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "permute"]
KINDS: tuple[Kind, ...] = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "permute")
_TRANSFERS: dict[str, Kind] = {kind: kind for kind in KINDS}
HOP_SECONDS = 1e-6  # least time from a chip to its neighbour

_OPCODES: dict[str, Kind] = {
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}


@dataclasses.dataclass(frozen=True)
class DevicePosition:
    """The position of a device."""

    coords: tuple[int, ...]  # coordinates of its chip in the torus of its slice
    slice: int
    mesh: tuple[int, ...]  # index in the mesh
    die: int = 0  # its number in the chip


@dataclasses.dataclass(frozen=True)
class Torus:
    """The devices of a program; `places[i]` is the position of partition i."""

    chip: Chip
    shape: tuple[int, ...]  # chips of one slice, by dimension
    places: Sequence[DevicePosition]
    axes: tuple[str, ...]  # names of the mesh axes


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as one device sees it."""

    kind: Kind
    axis: str  # the mesh axes of its group, such as "fsdp+expert"
    bytes_sent: float  # bytes that a device sends inside its slice
    dcn_bytes: float  # bytes that a device sends to other slices
    seconds: float
    channel: str  # shared by all instructions of the collective; "" without one


def collective_of(instruction: Instruction, torus: Torus, scattered: bool = False) -> Collective | None:
    """Returns the cost of a collective instruction, or None for other instructions.

    Args:
      instruction: an instruction, with any replica groups among its attributes.
      torus: the devices.
      scattered: whether an all-reduce is in fact a reduce-scatter, because each device keeps only its part.

    Raises:
      HloError: the replica groups cannot be read.
    """
    kind = _OPCODES.get(instruction.opcode.removesuffix("-start"))
    if kind is None:
        return None
    kind = "reduce_scatter" if scattered else kind
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and len(shapes) > 1:  # (operands, results, the runtime's u32[])
        arrays = [shape for shape in shapes if shape.dtype != "u32" or len(shape)]
        shapes = arrays[len(arrays) // 2 :]
    size = sum(shape.bytes for shape in shapes)
    if kind == "permute":
        pairs = source_target_pairs(instruction) or ((0, 0),)
        return max((_permute(a, b, size, instruction, torus) for a, b in pairs), key=lambda one: one.seconds)
    groups = replica_groups(instruction) or (tuple(range(len(torus.places))),)
    if max(max(group) for group in groups) >= len(torus.places):
        raise HloError(f"{instruction.name}: replica groups of more than {len(torus.places)} devices")
    group = [torus.places[i] for i in groups[0]]
    if kind == "reduce_scatter" and not scattered:
        size *= len(group)  # its result is only a part of the array
    slices = len({place.slice for place in group})
    inner = [place for place in group if place.slice == group[0].slice]
    sent, dcn = _bytes(kind, size, len(inner)), _bytes(kind, size / len(inner), slices)
    seconds = _seconds(kind, sent, inner, _colors(instruction), torus) + dcn / torus.chip.dcn_bandwidth
    return Collective(kind, _axes(group, torus), sent, dcn, seconds, _channel(instruction))


def between_slices(send: Instruction, torus: Torus) -> Collective:
    """Returns the cost of a `send`, a device's part of a collective over all slices."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    name = found.group(1).lower() if found else ""
    kind = _TRANSFERS.get(name, "permute")
    slices, size = len({place.slice for place in torus.places}), float(send.shapes[0].bytes)
    dcn = size if kind == "permute" else _bytes(kind, size, slices)
    return Collective(kind, "slices", 0.0, dcn, dcn / torus.chip.dcn_bandwidth, rendezvous(send))


def rendezvous(transfer: Instruction) -> str:
    """Returns the name that the `send` and the `recv` of one collective between slices share."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', transfer.attributes)
    return found.group(1) if found else transfer.name


def bytes_sent_by_kind(collectives: Mapping[Collective, float]) -> dict[str, float]:
    """Returns the bytes that a device sends inside its slice in a step, for each of the five kinds."""
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for one, times in collectives.items():
        total[one.kind] += one.bytes_sent * times
    return total


def _bytes(kind: Kind, size: float, members: int) -> float:
    """Returns the bytes that each of `members` devices sends; `size` is the bytes of the whole array."""
    share = (members - 1) / members
    return 2 * share * size if kind == "all_reduce" else share * size


def _seconds(kind: Kind, sent: float, group: Sequence[DevicePosition], colors: int | None, torus: Torus) -> float:
    members = len(group)
    if members == 1:
        return 0.0
    chips = len({place.coords for place in group})
    passes = 2 if kind == "all_reduce" else 1
    # Bytes sent to the other die of the same chip.
    nearby = sent * (members - chips) / (members - 1)
    between_dies = max(nearby / torus.chip.die_bandwidth, passes * HOP_SECONDS) if nearby else 0.0
    if chips == 1:
        return between_dies
    links, stride, extent = _ring(group, torus)
    if kind == "all_to_all":  # bytes for the other die travel at the same time and take less
        return max(sent / torus.chip.link_bandwidth * _cut(group, torus), extent * HOP_SECONDS)
    # An algorithm over several dimensions at once states its number of one-way rings as colors.
    links = max(links, colors) if colors else links
    hops = passes * (chips - 1) * (0.5 if links > 1 else 1.0)
    far = (sent - nearby) * stride / (links * torus.chip.link_bandwidth)
    return max(far, hops * HOP_SECONDS) + between_dies


def _spans(group: Sequence[DevicePosition], torus: Torus) -> list[tuple[int, int, bool]]:
    """Returns for each dimension of the group its chips, the hops between neighbours, and whether it is a ring."""
    spans = []
    for dimension, size in enumerate(torus.shape):
        values = sorted({place.coords[dimension] for place in group})
        if len(values) > 1:
            stride = min(b - a for a, b in itertools.pairwise(values))
            wraps = size % torus.chip.wraps_at == 0 and len(values) * stride == size
            spans.append((len(values), stride, wraps))
    return spans


def _ring(group: Sequence[DevicePosition], torus: Torus) -> tuple[int, int, int]:
    """Returns a chip's links in a ring through the group, the groups that share a link, and the ring's hops."""
    spans = _spans(group, torus)
    if not spans:
        return 1, 1, 1
    stride = max(stride for _, stride, _ in spans)
    extent = sum(count * stride // (2 if wraps else 1) for count, stride, wraps in spans)
    # A line has one link in each direction. A plane or a cube with an even side contains a ring of neighbours.
    closed = any(wraps for *_, wraps in spans) or (len(spans) > 1 and any(count % 2 == 0 for count, *_ in spans))
    return (2 if closed else 1), stride, extent


def _cut(group: Sequence[DevicePosition], torus: Torus) -> float:
    """Returns the seconds of an all-to-all for each byte that a device sends, in units of 1 / link bandwidth.

    Half of the n devices send half of their bytes over a cut of n / n_d links, or twice as many if dimension d is a
    ring. That is n_d / 4 or n_d / 8 for each byte. Groups that share links take proportionally longer.
    """
    members = len(group)
    cuts = (count * stride / (8 if wraps else 4) for count, stride, wraps in _spans(group, torus))
    return (
        max(cuts, default=1.0) * members / (members - 1)
    )  # the formula counts the bytes that a device keeps, `sent` does not


def _permute(source: int, target: int, size: float, instruction: Instruction, torus: Torus) -> Collective:
    a, b = torus.places[source], torus.places[target]
    crosses = a.slice != b.slice
    hops = 0
    for x, y, side in zip(a.coords, b.coords, torus.shape, strict=True):
        distance = abs(x - y)
        hops += min(distance, side - distance) if side % torus.chip.wraps_at == 0 else distance
    stays = not hops and a.die == b.die
    sent, dcn = (0.0, size) if crosses else (0.0 if stays else size, 0.0)
    if crosses:
        seconds = dcn / torus.chip.dcn_bandwidth
    elif stays:
        seconds = 0.0
    else:
        rate = torus.chip.link_bandwidth if hops else torus.chip.die_bandwidth
        seconds = max(sent / rate, max(hops, 1) * HOP_SECONDS)
    return Collective("permute", _axes([a, b], torus), sent, dcn, seconds, _channel(instruction))


def _axes(group: Sequence[DevicePosition], torus: Torus) -> str:
    varying = [axis for i, axis in enumerate(torus.axes) if len({place.mesh[i] for place in group}) > 1]
    return "+".join(varying) or "none"


def _colors(instruction: Instruction) -> int | None:
    found = re.search(r"colors:(\d+)", instruction.attributes)
    return found and int(found.group(1))


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else ""
