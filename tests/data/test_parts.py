"""Tests that an image which cannot be used is rejected with its reason, whatever the source gives."""

import numpy as np
import pytest

from ecdit.data.parts import record_of
from ecdit.data.sources.protocol import Pair, Rejected
from tests.data.example import make_config


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((0, 5, 3), np.uint8), "zero-sized"),
        (np.zeros((5, 0, 3), np.uint8), "zero-sized"),
        (np.zeros((5, 5, 1), np.uint8), "colour mode"),
        (np.zeros((5, 5), np.uint8), "colour mode"),
        (np.array(7, np.uint8), "colour mode"),
        (np.zeros((5, 5, 3), np.float32), "colour mode"),
    ],
)
def test_an_array_that_is_no_image_is_rejected(image, reason):
    found = record_of(Pair("a", image, {"caption": "cat"}, {}), make_config(), "part")
    assert isinstance(found, Rejected)
    assert (found.name, found.reason) == ("part:a", reason)


def test_blank_captions_of_a_source_that_keeps_them_are_left_out():
    image = np.zeros((5, 5, 3), np.uint8)
    found = record_of(Pair("a", image, {"a": " ", "b": "cat"}, {}), make_config(), "part")
    assert found.captions == {"b": "cat"}
    assert record_of(Pair("a", image, {"a": " "}, {}), make_config(), "part").reason == "empty caption"
