"""Tests that readers of many shards are allowed to open them, or refused before the first is opened."""

import resource

import pytest

from ecdit.data import DataError, shards
from ecdit.data.shards import OTHER_FILES, ShardReader, write_shard

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
