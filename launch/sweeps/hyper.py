"""Defines the functions with which `get_hyper(hyper)` of a sweep file combines overrides to points.

The overrides of a point map `config.KEY`, as on the command line, to a value. The key `config` names the config file.

    hyper.product([hyper.sweep("config.model.width", [64, 128]), hyper.sweep("config.model.ffn", ["dense"])])
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ecdit.errors import UserError

Overrides = dict[str, Any]  # one point's values by key


class SweepError(UserError, ValueError):
    """A sweep cannot be run."""


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
    """Returns a point for each value of one key."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[Overrides]:
    """Returns one point, whose value a product sets for all points."""
    return sweep(key, [value])


def product(sweeps: Sequence[Sequence[Overrides]]) -> list[Overrides]:
    """Returns every combination; the last sweep varies fastest.

    Raises:
      SweepError: two sweeps set the same key.
    """
    return [_joined(points) for points in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[Sequence[Overrides]]) -> list[Overrides]:
    """Joins the first points of all sweeps, then the second ones, and so on. A sweep of one point joins with all.

    Raises:
      SweepError: sweeps have different lengths, or two set the same key.
    """
    lengths = {len(points) for points in sweeps} - {1}
    if len(lengths) > 1:
        raise SweepError(f"zipit: sweeps of {', '.join(map(str, sorted(lengths)))} points do not go together")
    length = max(lengths, default=1)
    spread = [points if len(points) == length else points * length for points in map(list, sweeps)]
    return [_joined(points) for points in zip(*spread, strict=True)]


def chainit(sweeps: Iterable[Iterable[Overrides]]) -> list[Overrides]:
    """Returns the points of all sweeps, one sweep after another."""
    return list(itertools.chain.from_iterable(sweeps))


def _joined(points: Sequence[Overrides]) -> Overrides:
    joined: Overrides = {}
    for point in points:
        for key in point:
            if key in joined:
                raise SweepError(f"{key} is set by two of the sweeps that are put together")
        joined |= point
    return joined
