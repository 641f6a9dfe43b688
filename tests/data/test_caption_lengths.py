"""Tests how much room packed captions are given, by hand and on prepared data."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from ecdit.data import caption_lengths
from ecdit.data.caption_lengths import least_packed_length, length_shares, overflow, packing_line
from ecdit.data.loader import augmented, row_reader
from ecdit.data.prepared import open_prepared
from ecdit.data.tokenizer import load_tokenizer
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import make_workload
from tests.runs import tiny

# Captions of one token or of three, as often as each other. Streams are made of whole chunks of three tokens.
SHARES = np.array([0.0, 0.5, 0.0, 0.5])


@pytest.mark.parametrize(
    ("packed_length", "captions", "parts", "share"),
    [
        (1, 2, 1, 3 / 4),  # 3 tokens; two captions have 2, 4 or 6
        (2, 2, 1, 0.0),  # all that they can have
        (1, 4, 1, 11 / 16),  # 6 tokens; four captions have 4 or 6 in 5 of 16 cases
        (2, 4, 1, 5 / 16),  # 9 tokens; they have 10 or 12 in 5 of 16 cases
        (2, 4, 2, 1 - (11 / 16) ** 2),
        (3, 4, 2, 0.0),
    ],
)
def test_overflow_by_hand(packed_length, captions, parts, share):
    assert overflow(SHARES, packed_length, captions, parts) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("most", "least"), [(0.7, 1), (0.6, 2), (0.3, 3), (0.001, 3)])
def test_the_least_room_is_the_least_with_which_few_batches_overflow(most, least):
    assert least_packed_length(SHARES, 4, 1, most) == least


def test_rare_overflows_are_counted():
    """Sixty-four captions on each of 64 devices: a device must overflow in 16 of a million batches at most."""
    shares = np.bincount([3, 5, 8, 13, 60], minlength=65) / 5
    least = least_packed_length(shares, 64, 64)
    assert overflow(shares, least, 64, 64) <= 0.001 < overflow(shares, least - 1, 64, 64)
    sums = np.random.default_rng(0).choice(65, (20_000, 64), p=shares).sum(axis=1)
    room = int(np.quantile(sums, 0.99)) // 64  # by experiment, where that can count
    expected = (sums > np.ceil(64 * room / 64) * 64).mean()
    assert overflow(shares, room, 64, 1) == pytest.approx(expected, rel=0.3)


def test_shares_are_those_of_the_captions_that_training_reads(emoji_data):
    """Of an epoch's captions without dropout; with it the empty caption, one token long, is more frequent."""
    config = tiny(data__directory=str(emoji_data), data__caption_dropout=0.0).data
    prepared = open_prepared(config)
    read = augmented(config, 0, row_reader(prepared, 0), load_tokenizer(prepared.tokenizer))
    count = prepared.num_records
    lengths = [(read(row)["tokens"] != 0).sum() for row in range(count)]
    shares = length_shares(prepared)
    np.testing.assert_allclose(shares, np.bincount(lengths, minlength=17) / count, atol=1e-12)
    dropped = length_shares(open_prepared(tiny(data__directory=str(emoji_data), data__caption_dropout=0.25).data))
    np.testing.assert_allclose(dropped, 0.75 * shares + 0.25 * np.eye(17)[1], atol=1e-12)


def test_a_list_of_captions_is_drawn_as_one_field():
    """Half of the draws are the short caption, the other half one of two long ones: not two thirds."""
    histograms = {"caption": {"2": 10}, "captions.0": {"6": 10}, "captions.1": {"8": 10}}
    tokenizer = SimpleNamespace(parts=[None], empty=[1])
    part = SimpleNamespace(tokens=SimpleNamespace(histograms=histograms))
    config = SimpleNamespace(caption_length=8, captions={"caption": 1.0, "captions": 1.0}, caption_dropout=0.0)
    composition = SimpleNamespace(components=[SimpleNamespace(rate="1")])
    prepared = SimpleNamespace(config=config, tokenizer="", composition=composition, stored=[part])
    with mock.patch.object(caption_lengths, "load_tokenizer", return_value=tokenizer):
        shares = length_shares(prepared)
    np.testing.assert_allclose(shares, [0, 0, 0.5, 0, 0, 0, 0.25, 0, 0.25])


def test_a_run_whose_streams_are_as_long_as_padding_is_told_so(emoji_data):
    prepared = open_prepared(tiny(data__directory=str(emoji_data)).data)
    assert "packs nothing" in packing_line(prepared, 8, 1, 8)  # a chunk of sixteen tokens, as long as a caption
    assert "packs nothing" not in packing_line(prepared, 8, 2, 8)


def test_a_run_says_how_often_its_captions_overflow(emoji_data, capsys):
    """32 captions in two microbatches on eight devices: sixteen parts of two captions."""
    packs = {"text__frozen": True, "text__packed_length": 8, "data__directory": str(emoji_data)}
    experiment = tiny(train__batch_size=32, train__accumulation=2, **packs)
    make_workload(experiment, make_mesh(experiment.mesh)).prepare_data()
    prepared = open_prepared(experiment.data)
    line = packing_line(prepared, 8, 2, 16)
    assert line in capsys.readouterr().out
    shares = length_shares(prepared)
    assert f"captions have {shares @ np.arange(17):.1f} tokens on average" in line
    assert f"do not fit in {overflow(shares, 8, 2, 16):.2%} of batches" in line
