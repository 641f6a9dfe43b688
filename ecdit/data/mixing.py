"""Which part of a mixture a row is from: exact at any row, in constant time."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ecdit.data import DataError

MAX_PERIOD = 1_000_000  # rows; the sequence of a million takes some seconds and 12 MB


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An endless sequence of parts in which the first n have rate * n of each part, give or take less than one.

    Rates are exact fractions that sum to 1. The sequence repeats after their common denominator, so that any row is
    found without counting from the first one.
    """

    rates: tuple[Fraction, ...]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns a row's part, and how many rows before it are of that part."""
        period = len(self._parts)
        rounds, within = divmod(row, period)
        part = int(self._parts[within])
        return part, rounds * int(self.rates[part] * period) + int(self._places[within])

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        """The parts of one period, int32, by the quota method of Balinski and Young (1975).

        Of the parts that may get one more without being more than one ahead of their share, it is the turn of the one
        whose share per row it then has is largest. No part is ever ahead or behind by a whole row.
        """
        period = int(np.lcm.reduce([rate.denominator for rate in self.rates]))
        shares = np.array([int(rate * period) for rate in self.rates], np.int64)  # rows of a period
        counts, parts = np.zeros(len(shares), np.int64), np.empty(period, np.int32)
        for row in range(period):
            eligible = counts * period < shares * (row + 1)
            priority = np.where(eligible, shares / (counts + 1), -1.0)
            parts[row] = int(np.argmax(priority))
            counts[parts[row]] += 1
        return parts

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """How many rows of the same part a row of a period has before it."""
        places = np.empty(len(self._parts), np.int64)
        for part in range(len(self.rates)):
            rows = np.flatnonzero(self._parts == part)
            places[rows] = np.arange(len(rows))
        return places


def mixing(rates: Sequence[Fraction]) -> Mixing:
    """Returns the mixing of parts by rates, which need not sum to 1.

    Raises:
      DataError: a rate that is not positive, or rates whose sequence would be too long.
    """
    if not rates or min(rates) <= 0:
        raise DataError(f"rates of a mixture must be above 0: {', '.join(str(float(rate)) for rate in rates)}")
    exact = tuple(rate / sum(rates) for rate in rates)
    period = int(np.lcm.reduce([rate.denominator for rate in exact]))
    if period > MAX_PERIOD:
        given = ", ".join(str(rate) for rate in rates)
        raise DataError(
            f"rates {given} of a mixture repeat after {period} rows, more than {MAX_PERIOD}: round them, "
            "for example to three decimals that sum to 1"
        )
    return Mixing(exact)
