"""Tests which rows of a mixture belong to which part, and how many there are up to any row."""

from fractions import Fraction

import numpy as np
import pytest

from ecdit.data import DataError
from ecdit.data.mixing import MAX_PERIOD, mixing

RATES = [
    ["0.3", "0.7"],
    ["1"],
    ["1", "1", "1"],
    ["0.5", "0.5", "0.001"],
    ["0.9", "0.05", "0.03", "0.02"],
    ["1"] * 11,
    ["118287", "1913"],
    ["7", "5", "3", "2", "1", "0.5"],
]


@pytest.mark.parametrize("rates", RATES, ids=" ".join)
def test_no_part_is_ever_a_row_ahead_or_behind(rates):
    """Counts up to every row n are within one of rate * n, exactly: the largest difference is a fraction below 1."""
    mix = mixing([Fraction(rate) for rate in rates])
    total = sum(Fraction(rate) for rate in rates)
    rows = 3000
    parts = np.array([mix.locate(row)[0] for row in range(rows)])
    for part, rate in enumerate(rates):
        counts, share = np.cumsum(parts == part), Fraction(rate) / total
        assert all(abs(int(count) - share * (row + 1)) < 1 for row, count in enumerate(counts))


@pytest.mark.parametrize("rates", RATES, ids=" ".join)
def test_each_part_is_read_in_its_own_order_without_gaps(rates):
    mix = mixing([Fraction(rate) for rate in rates])
    seen = [[] for _ in rates]
    for row in range(2000):
        part, index = mix.locate(row)
        seen[part].append(index)
    assert seen == [list(range(len(indices))) for indices in seen]


@pytest.mark.parametrize("start", [0, 10**9, 10**12 + 7])
def test_rows_far_out_go_on_as_rows_at_the_beginning(start):
    """3000 of 10 000 rows, where rates that are rounded to a table of their own give 3003."""
    mix = mixing([Fraction("0.3"), Fraction("0.7")])
    places = [mix.locate(start + row) for row in range(10_000)]
    assert [sum(part == which for part, _ in places) for which in (0, 1)] == [3000, 7000]
    first = [index for part, index in places if part == 0]
    assert first == list(range(first[0], first[0] + 3000))
    assert abs(first[0] - Fraction(3, 10) * start) < 1


def test_rates_that_cannot_be_mixed_are_refused():
    with pytest.raises(DataError, match=r"must be above 0: 0\.5, 0\.0"):
        mixing([Fraction("0.5"), Fraction(0)])
    with pytest.raises(DataError, match=f"repeat after 1000001 rows, more than {MAX_PERIOD}: round them"):
        mixing([Fraction(1), Fraction(1_000_000)])
