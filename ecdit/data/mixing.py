"""Assigns rows to the parts of a mixture: exactly at any row, in constant time."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ecdit.data import DataError

MAX_PERIOD = 1_000_000  # rows; the sequence of a million takes some seconds and 12 MB


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An endless sequence of parts whose first n rows have rate * n rows of each part, to within less than one.

    Rates are exact fractions that sum to 1. The sequence repeats after their common denominator, so that `locate` need
    not count from the first row.
    """

    rates: tuple[Fraction, ...]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns a row's part, and how many earlier rows have that part."""
        period = len(self._parts)
        rounds, within = divmod(row, period)
        part = int(self._parts[within])
        return part, rounds * int(self.rates[part] * period) + int(self._places[within])

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        """Returns the parts of one period, int32, by the quota method of Balinski and Young (1975).

        A part is eligible if one more row would not put it a whole row ahead of its share. The next row goes to the
        eligible part with the largest share / (count + 1). No part is ever ahead or behind by a whole row.
        """
        period = int(np.lcm.reduce([rate.denominator for rate in self.rates]))
        shares = np.array([int(rate * period) for rate in self.rates], np.int64)  # rows of a period for each part
        counts, parts = np.zeros(len(shares), np.int64), np.empty(period, np.int32)
        for row in range(period):
            eligible = counts * period < shares * (row + 1)
            priority = np.where(eligible, shares / (counts + 1), -1.0)
            parts[row] = int(np.argmax(priority))
            counts[parts[row]] += 1
        return parts

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Returns, for each row of a period, how many earlier rows of the period have the same part."""
        places = np.empty(len(self._parts), np.int64)
        for part in range(len(self.rates)):
            rows = np.flatnonzero(self._parts == part)
            places[rows] = np.arange(len(rows))
        return places


def mixing(rates: Sequence[Fraction]) -> Mixing:
    """Returns the mixing of parts by rates, which need not sum to 1.

    Raises:
      DataError: a rate is not positive, or the period of the rates would be too long.
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
