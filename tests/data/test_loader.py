"""Tests the loader's rows, their order on any number of processes, and their augmentation."""

import itertools
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.data import DataError, loader
from ecdit.data.loader import augmented, draw_field, make_loader, mixed, row_reader, shuffled
from ecdit.data.mixing import mixing
from ecdit.data.prepared import Row, open_prepared, prepare, stored_records
from ecdit.data.text import EOS, PAD
from ecdit.data.tokenizer import Tokenizer
from tests.data.example import make_config, module, tokenize

BATCH = 8


class Words:
    """A tokenizer with the special tokens of SentencePiece files, for rows that are tokens already."""

    end, pad = EOS, PAD

    def rows(self, captions):
        assert captions == [""]
        return [[EOS]]


WORDS = Tokenizer([Words()])


class CountedRows:
    """Rows that tell which they are by their tokens [index + 10, EOS] and count how often they are read."""

    def __init__(self, count):
        self.count, self.reads = count, 0
        self.images = np.random.default_rng(0).integers(0, 256, (min(count, 100), 6, 5, 3), np.uint8)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        tokens = {"caption": np.array([index + 10, EOS], np.int32), "other": np.array([index + 10, 9, EOS], np.int32)}
        return Row(self.images[index % len(self.images)], tokens, np.array([72, 60]), np.array([3, 4]))


def config(**changes):
    return make_config(**{"image_size": 6, "caption_length": 3, **changes})


PLAIN = config(caption_dropout=0.0, flip_probability=0.0, crop_padding=0)


@pytest.fixture
def source(monkeypatch):
    """113 records: a prime, so that epochs end inside batches."""
    source = CountedRows(113)
    use(monkeypatch, source)
    return source


def use(monkeypatch, source):
    monkeypatch.setattr(loader, "open_prepared", lambda config: SimpleNamespace(tokenizer=None))
    monkeypatch.setattr(loader, "load_tokenizer", lambda path: WORDS)
    monkeypatch.setattr(loader, "row_reader", lambda _, seed: shuffled(source, seed, "counted"))


def reader(config, source, seed=3):
    return augmented(config, seed, shuffled(source, seed, "counted"), WORDS)


def make_default():
    return config()


def take(count, start_row=0, rows=range(BATCH), config=None, seed=3):
    """`count` batches, each array with the batches concatenated: [count * len(rows), ...]."""
    batches = list(itertools.islice(make_loader(config or make_default(), seed, BATCH, start_row, rows), count))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_shapes_and_types(source):
    batch = next(make_loader(config(), 3, BATCH, 0, [1, 5]))
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
        "image": ((2, 6, 5, 3), np.uint8),
        "tokens": ((2, 3), np.int32),
        "size_crop": ((2, 4), np.float32),
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_split_the_batch_and_nothing_else_changes(source, processes):
    together = take(20)
    parts = [take(20, rows=rows) for rows in np.split(np.arange(BATCH), processes)]
    for key, array in together.items():
        split = [part[key].reshape(20, -1, *array.shape[1:]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(split, axis=1).reshape(array.shape), array, err_msg=key)


def test_rows_come_in_the_order_asked(source):
    together, backwards = take(3), take(3, rows=[7, 0, 3])
    for key, array in together.items():
        expected = array.reshape(3, BATCH, *array.shape[1:])[:, [7, 0, 3]]
        np.testing.assert_array_equal(backwards[key].reshape(expected.shape), expected)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(source, num_threads):
    assert_same(take(12, config=config(num_threads=num_threads)), take(12, config=config(num_threads=0)))


def test_every_epoch_is_another_permutation(source):
    index = take(113, config=PLAIN)["tokens"][:, 0] - 10  # 113 batches of 8 are 8 epochs of 113
    epochs = index.reshape(8, 113)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(113), (8, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_the_seed_decides_the_order(source):
    first, again, other = (take(2, config=PLAIN, seed=seed)["tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_resuming_continues_the_stream(source):
    uninterrupted, resumed = take(40), take(16, start_row=24 * BATCH)  # the second and the third epoch meet in there
    assert_same(resumed, {key: array[24 * BATCH :] for key, array in uninterrupted.items()})


def test_a_late_start_reads_no_more_than_an_early_one(monkeypatch):
    reads = []
    for start_row in (0, 10**9):
        source = CountedRows(2 * 10**9)
        use(monkeypatch, source)
        batch = take(1, start_row=start_row, config=config(num_threads=0))
        assert len(np.unique(batch["tokens"][:, 0])) > 1
        reads.append(source.reads)
    assert reads == [BATCH, BATCH]


def test_rows_far_out_are_the_same_for_every_split(source):
    start = 10**9
    together = take(2, start_row=start)
    assert_same(take(1, start_row=start + BATCH), {key: array[BATCH:] for key, array in together.items()})


def test_captions_drop_at_their_rate_and_by_row(source):
    changed = config(caption_dropout=0.25)
    read = reader(changed, source)
    examples = [read(row) for row in range(4000)]
    dropped = np.array([example["tokens"][0] == EOS for example in examples])
    assert abs(dropped.mean() - 0.25) < 0.03  # four standard deviations
    for example in itertools.compress(examples, dropped):
        assert example["tokens"].tolist() == [EOS, 0, 0]
        assert example["size_crop"][:2].tolist() == [72, 60]
    for rows in (range(4), range(4, 8), [6, 1]):
        batch = take(20, rows=rows, config=changed)["tokens"].reshape(20, len(rows), 3)
        expected = dropped[: 20 * BATCH].reshape(20, BATCH)[:, rows]
        np.testing.assert_array_equal(batch[:, :, 0] == EOS, expected)
    assert not any(reader(PLAIN, source)(row)["tokens"][0] == EOS for row in range(200))
    always = reader(config(caption_dropout=1.0), source)
    assert all(always(row)["tokens"][0] == EOS for row in range(200))


def test_caption_fields_are_drawn_at_their_rates_and_by_row(source):
    two = config(caption_dropout=0.0, captions={"caption": 0.3, "other": 0.7})
    read = reader(two, source)
    other = np.array([read(row)["tokens"][1] == 9 for row in range(4000)])
    assert abs(other.mean() - 0.7) < 0.03  # four standard deviations
    batch = take(20, rows=[6, 1], config=two)["tokens"].reshape(20, 2, 3)
    np.testing.assert_array_equal(batch[:, :, 1] == 9, other[: 20 * BATCH].reshape(20, BATCH)[:, [6, 1]])
    assert all(reader(PLAIN, source)(row)["tokens"][1] == EOS for row in range(200))


def test_a_field_is_drawn_from_those_that_a_record_has():
    rates = {"caption": 0.3, "re_caption": 0.7, "captions": 1.0, "off": 0.0}
    chances = (np.arange(10_000) + 0.5) / 10_000

    def shares(fields):
        drawn = [draw_field(rates, fields, lambda chance=chance: chance) for chance in chances]
        return {field: drawn.count(field) for field in sorted(set(drawn))}

    assert shares(["caption"]) == {"caption": 10_000}
    assert shares(["re_caption", "caption", "off", "unknown"]) == {"caption": 3000, "re_caption": 7000}
    five = {f"captions.{i}": 2000 for i in range(5)}
    assert shares([*five, "off"]) == five
    assert shares(["captions.0", "captions.1", "caption", "re_caption"]) == {
        "caption": 1500,
        "captions.0": 2500,
        "captions.1": 2500,
        "re_caption": 3500,
    }
    with pytest.raises(DataError, match="has rates for caption, re_caption, captions, off, and a record"):
        draw_field(rates, ["off", "unknown"], lambda: 0.5)


def test_images_flip_at_their_rate_and_by_row(source):
    plain, changed = reader(PLAIN, source), config(flip_probability=0.5, crop_padding=0)
    read, flips = reader(changed, source), []
    for row in range(1000):
        image, original = read(row)["image"], plain(row)["image"]
        flips.append((image != original).any())
        np.testing.assert_array_equal(image, original[:, ::-1] if flips[-1] else original)
    assert abs(np.mean(flips) - 0.5) < 0.07
    late = take(2, start_row=5 * BATCH, rows=[2], config=changed)["image"]
    assert [(image != plain(row)["image"]).any() for image, row in zip(late, (42, 50), strict=True)] == [
        flips[42],
        flips[50],
    ]


def test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop(source):
    plain = reader(PLAIN, source)
    read, corners = reader(config(flip_probability=0.0, crop_padding=2), source), set()
    for row in range(500):
        example, original = read(row), plain(row)["image"]
        height, width, top, left = example["size_crop"].astype(int) - [0, 0, 3, 4]
        assert (height, width) == (72, 60)
        padded = np.full((10, 9, 3), 255, np.uint8)
        padded[2:8, 2:7] = original
        np.testing.assert_array_equal(example["image"], padded[2 + top : 8 + top, 2 + left : 7 + left])
        corners.add((top, left))
        if (top, left) == (0, 0):  # what sampling asks for is the image as it is
            np.testing.assert_array_equal(example["image"], original)
    assert corners == set(itertools.product(range(-2, 3), range(-2, 3)))
    assert plain(0)["size_crop"].tolist() == [72, 60, 3, 4]


def test_chances_do_not_touch_each_other(source):
    """Turning one on leaves the others' draws as they were, and they are not the same draws."""
    every = reader(config(caption_dropout=0.5, captions={"caption": 1, "other": 1}), source)
    crop_only = reader(config(caption_dropout=0.0, flip_probability=0.0), source)
    plain, dropped, flipped, others = reader(PLAIN, source), [], [], []
    flip_only = reader(config(crop_padding=0), source)
    field_only = reader(config(caption_dropout=0.0, captions={"caption": 1, "other": 1}), source)
    for row in range(400):
        example = every(row)
        np.testing.assert_array_equal(example["size_crop"], crop_only(row)["size_crop"])
        dropped.append(example["tokens"][0] == EOS)
        flipped.append((flip_only(row)["image"] != plain(row)["image"]).any())
        others.append(field_only(row)["tokens"][1] == 9)
        if not dropped[-1]:
            np.testing.assert_array_equal(example["tokens"], field_only(row)["tokens"])
    for one, another in itertools.combinations((dropped, flipped, others), 2):
        assert abs(np.corrcoef(one, another)[0, 1]) < 0.2
    assert abs(np.corrcoef(dropped[1:], dropped[:-1])[0, 1]) < 0.2


def test_streams_never_meet():
    streams = [(row, purpose) for row in (0, 1, 2, 10**9) for purpose in loader._PURPOSES]
    draws = np.concatenate(
        [loader._random(3, row, purpose).integers(0, 2**64, 20, np.uint64) for row, purpose in streams]
    )
    assert len(np.unique(draws)) == len(draws)


def test_stored_images_are_never_written_to(source):
    before = source.images.copy()
    for array in take(5).values():
        array[...] = 0
    np.testing.assert_array_equal(source.images, before)


def test_prefetching_reads_only_so_far_ahead(source):
    batches = make_loader(config(num_threads=1, prefetch=3), 3, BATCH, 0, range(BATCH))
    next(batches)
    time.sleep(0.2)  # for its thread to read all that it may
    assert source.reads == (1 + 3) * BATCH


def test_a_mixture_reads_each_part_shuffled_by_itself():
    """Parts of 113 and 20 records at 3 : 1: each has its own epochs, and every record of an epoch comes once."""
    large, small = CountedRows(113), CountedRows(20)
    read = mixed(mixing([Fraction(3), Fraction(1)]), [shuffled(large, 3, "a"), shuffled(small, 3, "b")])
    rows = [read(row) for row in range(4 * 113)]
    turns = [mixing([Fraction(3), Fraction(1)]).locate(row)[0] for row in range(4)]
    of_small = [rows[row].tokens["caption"][0] - 10 for row in range(len(rows)) if turns[row % 4] == 1]
    assert len(of_small) == 113
    for epoch in range(5):
        assert sorted(of_small[epoch * 20 : (epoch + 1) * 20]) == list(range(20))
    assert of_small[:20] != of_small[20:40]


def test_stored_rows_are_the_records_and_held_out_ones_are_never_read(tmp_path):
    made = make_config(
        tmp_path / "data",
        module=module(tmp_path, "loaded", "60"),
        task="loaded",
        prepare={"held_out": 0.2},
        vocab_size=300,
        caption_dropout=0.0,
        flip_probability=0.0,
        crop_padding=0,
    )
    done = prepare(made, say=lambda _: None)
    kept = {int(record.key[3:]) for record in stored_records(done, "train")}
    held_out = {int(record.key[3:]) for record in stored_records(done, "held_out")}
    assert held_out
    assert kept | held_out == set(range(60))
    batches = itertools.islice(make_loader(made, 0, BATCH, 0, range(BATCH)), 3 * len(kept) // BATCH + 1)
    seen = set()
    for batch in batches:
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
            level = int(image[0, 0, 0])
            assert (image == level).all()
            np.testing.assert_array_equal(tokens, tokenize(done.tokenizer, [f"image {level}"], 12)[0])
            seen.add(level)
    assert seen == kept
    read = row_reader(open_prepared(made), 0, "held_out")
    assert {int(read(row).content[0, 0, 0]) for row in range(len(held_out))} == held_out


def test_no_records_to_shuffle_is_an_error():
    with pytest.raises(DataError, match="emoji, held_out: there are no records"):
        shuffled([], 0, "emoji, held_out")


def test_batches_may_begin_at_any_row(source):
    """A phase of larger batches begins where smaller ones have ended."""
    by_fours = make_loader(config(), 3, 4, 12, range(4))
    first, second = next(by_fours), next(by_fours)
    by_eights = next(make_loader(config(), 3, 8, 12, range(8)))
    for name, values in by_eights.items():
        np.testing.assert_array_equal(values, np.concatenate([first[name], second[name]]))


def test_impossible_positions_are_refused(source):
    with pytest.raises(ValueError, match="row -8: rows begin at 0"):
        make_loader(config(), 3, BATCH, -8, range(BATCH))
    for rows in ([], [8], [-1]):
        with pytest.raises(ValueError, match="positions in a batch of 8"):
            make_loader(config(), 3, BATCH, 0, rows)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match="seed"):
            make_loader(config(), seed, BATCH, 0, range(BATCH))
