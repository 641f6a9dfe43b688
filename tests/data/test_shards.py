"""Tests that readers of many shards are allowed to open them, or refused before the first is opened."""

import dataclasses
import errno
import os
import resource
import time
from pathlib import Path

import pytest

from ecdit.data import DataError, shards
from ecdit.data.shards import OTHER_FILES, ShardReader, check_shards, write_shard

COUNT = 80


@pytest.fixture
def few_files():
    """`few_files(n)` lets this process open n files until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, [write_shard(folder / f"{n:03d}.array_record", [b"%d" % n]) for n in range(COUNT)]


def test_two_readers_raise_the_limit_for_their_shards(written, few_files):
    folder, found = written
    few_files(OTHER_FILES + COUNT + COUNT // 2)
    readers = [ShardReader(folder, found), ShardReader(folder, found)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= OTHER_FILES + 2 * COUNT
    for reader in readers:
        assert [reader[n] for n in range(COUNT)] == [b"%d" % n for n in range(COUNT)]


def test_more_shards_than_the_system_allows_are_refused_at_once(written, monkeypatch):
    folder, found = written
    allowed = OTHER_FILES + COUNT - 1
    monkeypatch.setattr(shards, "_FILES", shards._Files())
    monkeypatch.setattr(shards.resource, "getrlimit", lambda which: (100, allowed))
    with pytest.raises(
        DataError, match=rf"has {COUNT} shards, and this process may open {allowed} files.*tars_per_part"
    ):
        ShardReader(folder, found)


def test_a_reader_that_is_gone_leaves_its_room_to_others(written, monkeypatch):
    folder, found = written
    monkeypatch.setattr(shards, "_FILES", files := shards._Files())
    reader = ShardReader(folder, found)
    assert files._taken == COUNT
    del reader
    assert files._taken == 0


@pytest.fixture
def slow_stat(monkeypatch):
    """Makes each look at a shard wait as on a mounted bucket, later ones less, so that they end in another order."""

    def stat(path, *, follow_symlinks=True):
        if path.suffix == ".array_record":
            time.sleep(max(0.0, 0.06 - 0.0005 * int(path.stem)))
        return os.stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)


def test_shards_are_looked_at_together_and_named_in_order(written, slow_stat):
    """One after the other, 80 looks would take 3 s."""
    folder, found = written
    start = time.monotonic()
    check_shards(folder, found)
    assert time.monotonic() - start < 1.5
    cut = [dataclasses.replace(one, size=one.size + (n in (3, 70))) for n, one in enumerate(found)]
    missing = dataclasses.replace(found[0], name="900.array_record")
    with pytest.raises(
        DataError, match=r"not whole: 003\.array_record, 070\.array_record, 900\.array_record of 81 shards"
    ):
        check_shards(folder, [*cut, missing])


def test_a_shard_that_the_disk_cannot_read_is_not_called_missing(written, monkeypatch):
    folder, found = written

    def stat(path, **_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(DataError, match=r"000\.array_record: its size cannot be read: Input/output error"):
        check_shards(folder, found)
