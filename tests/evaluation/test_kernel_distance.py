"""Tests KID and CMMD by hand and against sums over all pairs."""

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation import kernel_distance
from ecdit.evaluation.kernel_distance import clip_discrepancy, kernel_inception_distance, unbiased_discrepancy


def test_the_unbiased_discrepancy_by_hand():
    """One dimension, kernel (x y + 1)^3; a = 0, 1 and b = 1, 2.

    Pairs of different rows: k(0, 1) = 1, k(1, 2) = 27. Between the sets: k(0, 1), k(0, 2), k(1, 1), k(1, 2) are
    1, 1, 8, 27, whose mean is 9.25. 1 + 27 - 18.5 = 9.5.
    """
    assert unbiased_discrepancy(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])) == pytest.approx(9.5, abs=1e-12)


def test_the_kernel_divides_by_the_dimensions():
    """Two dimensions: x . y / 2 of (1, 1) and (1, 1) is 1, so every kernel is 8 and the discrepancy 0."""
    ones, twos = np.ones((2, 2)), np.full((2, 2), 2.0)
    assert unbiased_discrepancy(ones, ones) == pytest.approx(0, abs=1e-12)
    assert unbiased_discrepancy(ones, twos) == pytest.approx(8 + 125 - 2 * 27, abs=1e-12)


def test_kid_of_subsets_that_are_whole_is_the_discrepancy():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20, 3)), random.normal(size=(20, 3)) + 1
    mean, deviation = kernel_inception_distance(a, b, subsets=3, subset_size=20)
    assert mean == pytest.approx(unbiased_discrepancy(a, b), rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased():
    """The mean over subsets of two samples of one distribution is 0, within four standard errors."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4000, 4)), random.normal(size=(4000, 4))
    mean, deviation = kernel_inception_distance(a, b, subsets=100, subset_size=40)
    assert abs(mean) < 4 * deviation / 10
    assert deviation > 0


def test_kid_depends_on_the_seed_alone():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 3)), random.normal(size=(30, 3))
    results = [kernel_inception_distance(a, b, 2, 10, seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("rows", "subsets", "size", "said"),
    [(9, 1, 10, "subset_size = 10: must be from 2 to 9"), (9, 1, 1, "subset_size = 1"), (9, 0, 5, "subsets = 0")],
)
def test_subsets_that_cannot_be_drawn_are_refused(rows, subsets, size, said):
    with pytest.raises(UserError, match=said):
        kernel_inception_distance(np.zeros((rows, 2)), np.zeros((20, 2)), subsets, size)


def test_cmmd_by_hand():
    """Rows (1, 0) twice against (0, 1): |x - y|^2 = 2, kernel exp(-2 / 200). 1000 (1 + 1 - 2 exp(-0.01)).

    Rows are compared with themselves: the same set has exactly 0.
    """
    a, b = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert clip_discrepancy(a, b) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-10)
    assert clip_discrepancy(a, a) == 0


def test_cmmd_is_the_sum_over_all_pairs(monkeypatch):
    monkeypatch.setattr(kernel_distance, "CHUNK", 4)
    random = np.random.default_rng(0)
    a, b = random.normal(size=(10, 3)) * 8, random.normal(size=(7, 3)) * 8

    def mean(x, y):
        return np.exp(-np.square(x[:, None] - y[None]).sum(axis=2) / 200).mean()

    assert clip_discrepancy(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-10)


@pytest.mark.parametrize("measure", [clip_discrepancy, kernel_inception_distance])
def test_features_of_two_networks_are_refused(measure):
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        measure(np.zeros((4, 2)), np.zeros((4, 3)))
