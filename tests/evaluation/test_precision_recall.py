"""Tests precision and recall on a line of numbers, by hand."""

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation import precision_recall as module
from ecdit.evaluation.precision_recall import precision_recall, squared_radii


def column(*values):
    return np.array(values, np.float64)[:, None]


def test_the_radius_is_the_distance_to_the_third_nearest_other():
    """Of 0: 1, 3, 6 away. Of 10: 4, 7, 9."""
    np.testing.assert_array_equal(squared_radii(column(0, 1, 3, 6, 10), 3), [36, 25, 9, 25, 81])


def test_precision_and_recall_by_hand():
    """Real 0, 1, 2, 3 with k = 1: balls of radius 1, from -1 to 4. Generated 4, 5, 50, 55: balls of 1, 1, 5, 5.

    4 is on the edge and inside, so precision is 1/4. Of the real ones only 3 is in a generated ball, at its edge.
    """
    assert precision_recall(column(4, 5, 50, 55), column(0, 1, 2, 3), neighbours=1) == (0.25, 0.25)
    assert precision_recall(column(4.1, 5, 50, 55), column(0, 1, 2, 3), neighbours=1) == (0, 0)


def test_precision_and_recall_are_not_the_same():
    """Generated ones in one corner of the real ones: all are precise, and they reach few."""
    real, generated = column(*range(100)), column(50, 50.1, 50.2, 50.3)
    precision, recall = precision_recall(generated, real)
    assert (precision, recall) == (1.0, 0.01)


def test_a_set_is_precise_and_complete_for_itself():
    points = np.random.default_rng(0).normal(size=(50, 8)) + 100
    assert precision_recall(points, points[::-1].copy()) == (1, 1)


def test_equal_rows_are_inside_a_ball_of_radius_zero():
    """Rounding of |x|^2 + |y|^2 - 2 x y must not put a row outside of its own ball."""
    row = np.random.default_rng(0).normal(size=(1, 100)) * 10
    points = np.repeat(row, 5, axis=0)
    assert precision_recall(points, points) == (1, 1)


def test_chunks_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    sets = random.normal(size=(50, 4)), random.normal(size=(60, 4)) * 1.5
    whole = precision_recall(*sets)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert precision_recall(*sets) == whole
    assert 0 < whole[1] < whole[0] <= 1


def test_sets_too_small_or_of_two_networks_are_refused():
    with pytest.raises(UserError, match="neighbours = 3: must be from 1 to 2 for generated features"):
        precision_recall(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(UserError, match="must be from 1 to 2 for real features"):
        precision_recall(np.zeros((4, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        precision_recall(np.zeros((4, 2)), np.zeros((4, 3)))
