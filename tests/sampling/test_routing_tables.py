"""Tests tables of routing by hand: two images of four tokens, three experts, two solver steps, one sparse layer."""

import numpy as np
import pytest

from ecdit.sampling.routing_tables import (
    busiest_share,
    counts_of,
    coverage,
    coverage_csv,
    favourites,
    layer_table,
    split_patches,
    takings,
)

# Rows are tokens, columns experts.
FIRST = [[0.5, 0, 0], [0, 0.2, 0], [0, 0, 0.9], [0, 0, 0]]
SECOND = [[0.5, 0.1, 0.4], [0, 0, 0], [0, 0, 0], [0.25, 0, 0]]
THIRD = [[0, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0], [0, 0, 0]]
GATES = np.array([[[FIRST], [SECOND]], [[FIRST], [THIRD]]], np.float32)


def test_counts_and_the_busiest_token():
    counts = counts_of(GATES)
    np.testing.assert_array_equal(counts[:, :, 0], [[[1, 1, 1, 0], [3, 0, 0, 1]], [[1, 1, 1, 0], [0, 2, 1, 0]]])
    assert counts.dtype == np.int32
    np.testing.assert_allclose(busiest_share(counts, 3)[..., 0], [[1 / 3, 1], [1 / 3, 2 / 3]])


def test_coverage_is_of_both_images_tokens():
    """In the second step 4 of 8 tokens have no expert, 2 one, 1 two and 1 three."""
    shares = coverage(counts_of(GATES))
    np.testing.assert_allclose(shares[:, 0], [[0.25, 0.75, 0, 0], [0.5, 0.25, 0.125, 0.125]])


def test_the_tables_say_the_same():
    counts = counts_of(GATES)
    shares, busiest = coverage(counts), busiest_share(counts, 3)
    lines = coverage_csv(shares, busiest, np.array([1.0, 0.5])).splitlines()
    assert lines[0] == "time,layer,share_0,share_1,share_2,share_3,busiest,busiest_most"
    assert lines[1:] == ["1,1,0.25,0.75,0,0,0.333333,0.333333", "0.5,1,0.5,0.25,0.125,0.125,0.833333,1"]
    (line,) = layer_table(shares, busiest).splitlines()[1:]
    assert line.split() == ["1", "37.5%", "50.0%", "6.2%", "6.2%", "100.0%", "of", "the", "experts"]


def test_a_layer_whose_tokens_all_have_one_expert_has_columns_for_more():
    counts = np.ones((1, 1, 1, 4), int)
    (line,) = layer_table(coverage(counts), busiest_share(counts, 4)).splitlines()[1:]
    assert line.split()[:5] == ["1", "0.0%", "100.0%", "0.0%", "0.0%"]


def test_patches_are_those_of_patchify_s_order():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    patches = split_patches(image, 4)
    assert patches.shape == (1, 4, 2, 2, 3)
    np.testing.assert_array_equal(patches[0, 1, :, :, 0], [[2, 3], [6, 7]])
    np.testing.assert_array_equal(patches[0, 2, :, :, 0], [[8, 9], [12, 13]])


@pytest.fixture
def images():
    """Patches of one colour: 10, 20, 30, 40 in the first image, 110 to 140 in the second."""
    tokens = np.array([[10, 20, 30, 40], [110, 120, 130, 140]], np.uint8).reshape(2, 2, 2)
    return tokens.repeat(2, axis=1).repeat(2, axis=2)[..., None].repeat(3, axis=3)


def test_takings_in_the_last_step(images):
    """Expert 0 takes tokens 0 and 3 of the first image and 1 of the second: (10 + 40 + 120) / 3, rounded."""
    found = takings(images, GATES, last_steps=1)
    np.testing.assert_array_equal(found.patches[0, :, 0, 0, 0], [57, round((10 + 120 + 130) / 3), 10])
    assert (found.patches == found.patches[:, :, :1, :1, :1]).all()
    np.testing.assert_array_equal(found.tokens[0], [[2, 1], [1, 2], [1, 0]])
    np.testing.assert_allclose(found.gates[0], [[0.75, 0.5], [0.1, 1.0], [0.4, 0.0]], rtol=1e-6)


def test_takings_of_two_steps_are_averages_over_them(images):
    found = takings(images, GATES, last_steps=2)
    np.testing.assert_array_equal(found.tokens[0], [[1.5, 1], [1, 1.5], [1, 0.5]])
    assert found.patches[0, 0, 0, 0, 0] == round((10 + 10 + 40 + 110 + 120) / 5)


def test_an_expert_that_takes_nothing_has_a_black_patch(images):
    found = takings(images, GATES * np.array([1, 1, 0], np.float32), last_steps=1)
    assert (found.patches[0, 2] == 0).all()
    assert (found.tokens[0, 2] == 0).all()


def test_favourites_are_ordered_by_tokens_and_then_by_gates(images):
    order = favourites(takings(images, GATES, last_steps=1), 2)
    np.testing.assert_array_equal(order[0], [[0, 1], [1, 0], [0, 1]])
    tied = takings(images, np.array([[[FIRST]], [[FIRST]]], np.float32) * np.float32([[[[[1]]]], [[[[2]]]]]), 1)
    np.testing.assert_array_equal(favourites(tied, 1)[0, :, 0], [1, 1, 1])


def test_many_tokens_with_small_gates_come_before_one_with_a_large_gate(images):
    gates = np.zeros((2, 1, 1, 4, 1), np.float32)
    gates[0, 0, 0, 0], gates[1, 0, 0, :3] = 0.9, 0.1
    np.testing.assert_array_equal(favourites(takings(images, gates, last_steps=1), 2)[0, 0], [1, 0])
