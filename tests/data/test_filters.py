"""Tests filters by size, caption and columns, whose limits are inclusive."""

import dataclasses

import pytest

from ecdit.config import ConfigError, build, to_dict
from ecdit.data.filters import Filters, caption_reason, column_reason, size_reason

OFF = {"min_side": 0, "max_aspect": 0.0, "min_caption": 0, "max_caption": 0, "columns": {}}


def filters(**changes):
    return build(Filters, {**OFF, **changes})


def test_zeros_let_everything_pass():
    off = filters()
    assert size_reason(off, 1, 100_000) is None
    assert caption_reason(off, "") is None
    assert column_reason(off, {}) is None


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [(64, 64, None), (63, 64, "too small"), (64, 63, "too small"), (64, 128, None), (129, 64, "aspect ratio")],
)
def test_sizes(height, width, reason):
    assert size_reason(filters(min_side=64, max_aspect=2.0), height, width) == reason


@pytest.mark.parametrize(
    ("caption", "reason"), [("ab", "caption too short"), ("abc", None), ("äöüß€", None), ("abcdef", "caption too long")]
)
def test_caption_lengths_are_of_characters(caption, reason):
    assert caption_reason(filters(min_caption=3, max_caption=5), caption) == reason


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"aesthetic": 5.0, "punsafe": 0}, None),
        ({"aesthetic": 10, "punsafe": 0.5}, None),
        ({"aesthetic": 4.999, "punsafe": 0.0}, "column aesthetic"),
        ({"aesthetic": 10**400, "punsafe": 0.0}, "column aesthetic"),
        ({"aesthetic": float("nan"), "punsafe": 0.0}, "column aesthetic"),
        ({"aesthetic": 7.0, "punsafe": 0.6}, "column punsafe"),
        ({"aesthetic": 7.0}, "no column punsafe"),
        ({"punsafe": 0.0}, "no column aesthetic"),
        ({"aesthetic": None, "punsafe": 0.0}, "no column aesthetic"),
        ({"aesthetic": "7.0", "punsafe": 0.0}, "no column aesthetic"),
        ({"aesthetic": True, "punsafe": 0.0}, "no column aesthetic"),
    ],
)
def test_columns(columns, reason):
    assert column_reason(filters(columns={"aesthetic": (5.0, 10), "punsafe": [0, 0.5]}), columns) == reason


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("min_side", {"min_side": -1}),
        ("max_aspect", {"max_aspect": 0.5}),
        ("max_aspect", {"max_aspect": -1.0}),
        ("min_caption", {"min_caption": -1}),
        ("max_caption", {"max_caption": -1}),
        ("max_caption", {"min_caption": 6, "max_caption": 5}),
        ("columns.a", {"columns": {"a": 5}}),
        ("columns.a", {"columns": {"a": (1, 2, 3)}}),
        ("columns.a", {"columns": {"a": ("1", 2)}}),
        ("columns.a", {"columns": {"a": (2, 1)}}),
        ("columns.a", {"columns": {"a": (float("nan"), 1)}}),
        ("columns.a", {"columns": {"a": (False, True)}}),
    ],
)
def test_impossible_limits_name_their_key(key, changes):
    with pytest.raises(ConfigError) as caught:
        filters(**changes)
    assert caught.value.key == key


def test_filters_come_back_from_a_config_as_json_gives_it():
    config = filters(min_side=3, columns={"aesthetic": (5, 10)})
    again = build(Filters, to_dict(config))
    assert dataclasses.asdict(again) == {**OFF, "min_side": 3, "columns": {"aesthetic": [5, 10]}}
    assert column_reason(again, {"aesthetic": 4}) == "column aesthetic"
