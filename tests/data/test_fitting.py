"""Tests records of pairs: their order in runs, and that what cannot be used is rejected with its reason."""

import tracemalloc

import numpy as np
import pytest

from ecdit.data.fitting import record_of, records_of
from ecdit.data.images import decode_stored
from ecdit.data.record import encode_record
from ecdit.data.sources.protocol import Pair, Rejected
from tests.data.broken import encoded, noise
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


def test_records_in_runs_are_those_of_each_pair_alone():
    config = make_config()
    image, large = encoded(noise(9, 7)), noise(900, 700)
    pairs = []
    for index in range(600):  # several runs of 256 pairs and of 64 images
        kind = index % 10
        if kind == 3:
            pairs.append(Rejected(f"{index}", "no image", ""))
        else:
            found = {4: b"no image", 5: np.zeros((0, 5, 3), np.uint8)}.get(kind, large if index % 97 == 1 else image)
            pairs.append(Pair(f"{index}", found, {"caption": " " if kind == 6 else f"caption {index}"}, {}))
    made = list(records_of(iter(pairs), config, "part"))
    assert len(made) == len(pairs)
    for pair, one in zip(pairs, made, strict=True):
        alone = pair if isinstance(pair, Rejected) else record_of(pair, config, "part")
        if isinstance(alone, Rejected):
            assert one == alone
        else:
            assert one[0] is pair
            assert encode_record(one[1]) == encode_record(alone)


@pytest.mark.parametrize("large", ["image", "caption", "column", "rejection"])
def test_a_run_is_bounded_by_its_bytes(large):
    image, text, read = encoded(noise(700, 700), "png"), "x" * 1_500_000, []  # 1.5 MB either way

    def pairs():
        for index in range(20):
            read.append(index)
            if large == "rejection":
                yield Rejected(f"{index}", "no image", text)
            elif large == "image":
                yield Pair(f"{index}", image, {"caption": "noise"}, {})
            else:
                caption, column = (text, "") if large == "caption" else ("noise", text)
                yield Pair(f"{index}", encoded(noise(9, 7)), {"caption": caption}, {"column": column})

    for count, _ in enumerate(records_of(pairs(), make_config(), "part"), 1):
        assert count <= len(read) < count + 3  # a run ends at 4 MiB
    assert len(read) == 20


def test_a_source_may_fill_one_array_again_and_again():
    image = np.zeros((9, 9, 3), np.uint8)

    def pairs():
        for value in (0, 100, 200):
            image[:] = value
            yield Pair(f"{value}", image, {"caption": "grey"}, {})

    for pair, record in records_of(pairs(), make_config(), "part"):
        np.testing.assert_array_equal(decode_stored(record.image), int(pair.key))


def test_small_images_that_become_large_are_few_at_a_time():
    pairs = [Pair(f"{index}", encoded(noise(9, 9)), {"caption": "noise"}, {}) for index in range(12)]
    tracemalloc.start()
    for _ in records_of(pairs, make_config(image_size=1024), "part"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20  # all of them take 36 MiB, and as much encoded


def test_a_large_image_is_freed_before_the_next_one_is_decoded():
    """Decoding takes twice the pixels for a moment."""
    image, pixels = encoded(np.full((2000, 2000, 3), 7, np.uint8), "png"), 2000 * 2000 * 3
    pairs = [Pair(f"{index}", image, {"caption": "grey"}, {}) for index in range(4)]
    tracemalloc.start()
    assert len(list(records_of(pairs, make_config(), "part"))) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * pixels
