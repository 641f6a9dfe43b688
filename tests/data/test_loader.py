import itertools
import time

import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.data import DataError, loader
from ecdit.data.loader import make_loader, row_reader
from ecdit.data.tasks import DataConfig
from ecdit.data.text import EOS

BATCH = 8


class CountedRecords:
    """Records that tell which they are by their tokens [index + 10, EOS, 0] and count how often they are read."""

    def __init__(self, count):
        self.count, self.reads = count, 0
        self.images = np.random.default_rng(0).integers(0, 256, (min(count, 100), 6, 5, 3), np.uint8)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        image = self.images[index % len(self.images)]
        return {"image": image, "tokens": np.array([index + 10, EOS, 0], np.int32), "original_size": np.array([72, 60])}


def make_config(**changes):
    values = {
        "task": "emoji",
        "directory": "nowhere",
        "source": "",
        "image_size": 6,
        "latent_channels": 0,
        "caption_length": 3,
        "vocab_size": 1024,
        "caption_dropout": 0.1,
        "flip_probability": 0.5,
        "crop_padding": 2,
        "num_threads": 2,
        "prefetch": 2,
    }
    return DataConfig(**{**values, **changes})


PLAIN = make_config(caption_dropout=0.0, flip_probability=0.0, crop_padding=0)


@pytest.fixture
def source(monkeypatch):
    """113 records: a prime, so that epochs end inside batches."""
    source = CountedRecords(113)
    monkeypatch.setattr(loader, "Records", lambda config: source)
    return source


def take(count, start_row=0, rows=range(BATCH), config=None, seed=3):
    """`count` batches, each array with the batches concatenated: [count * len(rows), ...]."""
    batches = list(itertools.islice(make_loader(config or make_config(), seed, BATCH, start_row, rows), count))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_shapes_and_types(source):
    batch = next(make_loader(make_config(), 3, BATCH, 0, [1, 5]))
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
    assert_same(take(12, config=make_config(num_threads=num_threads)), take(12, config=make_config(num_threads=0)))


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
        source = CountedRecords(2 * 10**9)
        monkeypatch.setattr(loader, "Records", lambda config, source=source: source)
        batch = take(1, start_row=start_row, config=make_config(num_threads=0))
        assert len(np.unique(batch["tokens"][:, 0])) > 1
        reads.append(source.reads)
    assert reads == [BATCH, BATCH]


def test_rows_far_out_are_the_same_for_every_split(source):
    start = 10**9
    together = take(2, start_row=start)
    assert_same(take(1, start_row=start + BATCH), {key: array[BATCH:] for key, array in together.items()})


def test_captions_drop_at_their_rate_and_by_row(source):
    config = make_config(caption_dropout=0.25)
    read = row_reader(config, 3, source)
    examples = [read(row) for row in range(4000)]
    dropped = np.array([example["tokens"][0] == EOS for example in examples])
    assert abs(dropped.mean() - 0.25) < 0.03  # four standard deviations
    for example in itertools.compress(examples, dropped):
        assert example["tokens"].tolist() == [EOS, 0, 0]
        assert example["size_crop"][:2].tolist() == [72, 60]
    for rows in (range(4), range(4, 8), [6, 1]):
        batch = take(20, rows=rows, config=config)["tokens"].reshape(20, len(rows), 3)
        expected = dropped[: 20 * BATCH].reshape(20, BATCH)[:, rows]
        np.testing.assert_array_equal(batch[:, :, 0] == EOS, expected)
    assert not any(row_reader(PLAIN, 3, source)(row)["tokens"][0] == EOS for row in range(200))
    always = row_reader(make_config(caption_dropout=1.0), 3, source)
    assert all(always(row)["tokens"][0] == EOS for row in range(200))


def test_pictures_flip_at_their_rate_and_by_row(source):
    plain, config = row_reader(PLAIN, 3, source), make_config(flip_probability=0.5, crop_padding=0)
    read, flips = row_reader(config, 3, source), []
    for row in range(1000):
        image, original = read(row)["image"], plain(row)["image"]
        flips.append((image != original).any())
        np.testing.assert_array_equal(image, original[:, ::-1] if flips[-1] else original)
    assert abs(np.mean(flips) - 0.5) < 0.07
    late = take(2, start_row=5 * BATCH, rows=[2], config=config)["image"]
    assert [(image != plain(row)["image"]).any() for image, row in zip(late, (42, 50), strict=True)] == [
        flips[42],
        flips[50],
    ]


def test_crop_offsets_are_those_of_the_pixels(source):
    plain = row_reader(PLAIN, 3, source)
    read, corners = row_reader(make_config(flip_probability=0.0, crop_padding=2), 3, source), set()
    for row in range(500):
        example, original = read(row), plain(row)["image"]
        height, width, top, left = example["size_crop"].astype(int)
        assert (height, width) == (72, 60)
        padded = np.full((10, 9, 3), 255, np.uint8)
        padded[2:8, 2:7] = original
        np.testing.assert_array_equal(example["image"], padded[top : top + 6, left : left + 5])
        corners.add((top, left))
    assert corners == set(itertools.product(range(5), range(5)))
    assert plain(0)["size_crop"].tolist() == [72, 60, 0, 0]


def test_chances_do_not_touch_each_other(source):
    """Turning one on leaves the others' draws as they were, and they are not the same draws."""
    every = row_reader(make_config(caption_dropout=0.5), 3, source)
    crop_only = row_reader(make_config(caption_dropout=0.0, flip_probability=0.0), 3, source)
    plain, dropped, flipped = row_reader(PLAIN, 3, source), [], []
    flip_only = row_reader(make_config(crop_padding=0), 3, source)
    for row in range(400):
        np.testing.assert_array_equal(every(row)["size_crop"], crop_only(row)["size_crop"])
        dropped.append(every(row)["tokens"][0] == EOS)
        flipped.append((flip_only(row)["image"] != plain(row)["image"]).any())
    assert abs(np.corrcoef(dropped, flipped)[0, 1]) < 0.2
    assert abs(np.corrcoef(dropped[1:], dropped[:-1])[0, 1]) < 0.2


def test_streams_never_meet():
    streams = [(row, purpose) for row in (0, 1, 2, 10**9) for purpose in ("caption", "flip", "crop")]
    draws = np.concatenate(
        [loader._random(3, row, purpose).integers(0, 2**64, 20, np.uint64) for row, purpose in streams]
    )
    assert len(np.unique(draws)) == len(draws)


def test_stored_pictures_are_never_written_to(source):
    before = source.images.copy()
    for array in take(5).values():
        array[...] = 0
    np.testing.assert_array_equal(source.images, before)


def test_prefetching_reads_only_so_far_ahead(source):
    batches = make_loader(make_config(num_threads=1, prefetch=3), 3, BATCH, 0, range(BATCH))
    next(batches)
    time.sleep(0.2)  # for its thread to read all that it may
    assert source.reads == (1 + 3) * BATCH


def test_impossible_positions_are_refused(source):
    with pytest.raises(DataError, match="start at row 12: it is no multiple of the batch size 8"):
        make_loader(make_config(), 3, BATCH, 12, range(BATCH))
    with pytest.raises(DataError, match="row -8"):
        make_loader(make_config(), 3, BATCH, -8, range(BATCH))
    for rows in ([], [8], [-1]):
        with pytest.raises(ValueError, match="positions in a batch of 8"):
            make_loader(make_config(), 3, BATCH, 0, rows)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match="seed"):
            make_loader(make_config(), seed, BATCH, 0, range(BATCH))
