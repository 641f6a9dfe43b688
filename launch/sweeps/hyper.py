"""What `get_hyper(hyper)` of a sweep file makes its points of: lists of overrides, put together.

A point is a dict from `config.KEY`, as on the command line, to a value; the key `config` names the config file itself.

    hyper.product([hyper.sweep("config.model.width", [64, 128]), hyper.sweep("config.model.ffn", ["dense"])])
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ecdit.errors import UserError

Point = dict[str, Any]


class SweepError(UserError, ValueError):
    """A sweep that cannot be run as it is written."""


def sweep(key: str, values: Iterable[Any]) -> list[Point]:
    """A point for each value of one key."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[Point]:
    """One point: in a product, what all points have alike."""
    return sweep(key, [value])


def product(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
    """Every combination, those of the last sweep next to each other.

    Raises:
      SweepError: two sweeps set the same key.
    """
    return [_joined(points) for points in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
    """The first points together, the second ones together, and so on; a sweep of one point goes with all.

    Raises:
      SweepError: sweeps of different lengths, or two that set the same key.
    """
    lengths = {len(points) for points in sweeps} - {1}
    if len(lengths) > 1:
        raise SweepError(f"zipit: sweeps of {', '.join(map(str, sorted(lengths)))} points do not go together")
    length = max(lengths, default=1)
    spread = [points if len(points) == length else points * length for points in map(list, sweeps)]
    return [_joined(points) for points in zip(*spread, strict=True)]


def chainit(sweeps: Iterable[Iterable[Point]]) -> list[Point]:
    """The points of all, one sweep after another."""
    return list(itertools.chain.from_iterable(sweeps))


def _joined(points: Sequence[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for key in point:
            if key in joined:
                raise SweepError(f"{key} is set by two of the sweeps that are put together")
        joined |= point
    return joined
