"""Writes ArrayRecord shards, and reads several as one sequence from any number of threads."""

import contextlib
import dataclasses
import hashlib
import json
import resource
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain

from ecdit.data import DataError
from ecdit.files import in_threads, replace_text

# With one record per group, a random read reads no other record. Images are compressed already, and latents hardly
# compress.
OPTIONS = "group_size:1,uncompressed"
OTHER_FILES = 256  # that a process may have open besides shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's entry in a manifest."""

    name: str  # file name
    records: int
    size: int  # bytes
    sha256: str  # sha256 of the file
    content: str  # sha256 of its records in order, without ArrayRecord's framing


class ShardWriter:
    """Writes a new shard. Its caller makes the directory visible when all of it is complete.

    Raises:
      DataError: on writing and closing, the file cannot be written; a full disk may show only on closing.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.count = 0
        self._path, self._content = path, hashlib.sha256()
        self._writer = ArrayRecordWriter(str(path), OPTIONS)

    def write(self, record: bytes) -> None:
        """Adds a record."""
        with self._writable():
            self._writer.write(record)
        self._content.update(len(record).to_bytes(8, "little"))
        self._content.update(record)
        self.count += 1

    def close(self) -> Shard:
        """Completes the file, and returns what a manifest says of it."""
        with self._writable():
            self._writer.close()
        size = self._path.stat().st_size
        return Shard(self._path.name, self.count, size, file_sha256(self._path), self._content.hexdigest())

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # ArrayRecord's, of whatever the disk refuses
            raise DataError(f"writing {self._path} failed: {error}") from None

    def discard(self) -> None:
        """Removes the file."""
        self._writer.close()
        self._path.unlink()


def write_shard(path: Path, records: Iterable[bytes]) -> Shard:
    """Writes a new shard with these records and returns its entry for a manifest."""
    writer = ShardWriter(path)
    for record in records:
        writer.write(record)
    return writer.close()


def summary_path(path: Path) -> Path:
    """Returns the path of the summary of the shard at `path`."""
    return path.with_name(f"{path.name}.json")


class ShardSummary(NamedTuple):
    """Describes a shard that is complete, of a column that is not."""

    shard: Shard
    histograms: Mapping[str, Mapping[str, int]]
    made_of: str  # what its values were computed from, by fingerprints


def write_summary(path: Path, summary: ShardSummary) -> None:
    """Writes the summary beside the shard at `path`, which marks the shard as complete."""
    stored = [dataclasses.asdict(summary.shard), summary.histograms, summary.made_of]
    replace_text(summary_path(path), json.dumps(stored) + "\n")


def read_summary(path: Path) -> ShardSummary | None:
    """Returns what is known of a shard, or None if the shard is incomplete.

    Raises:
      DataError: its summary is damaged, or another version of this package wrote it.
    """
    place = summary_path(path)
    try:
        shard, histograms, made_of = json.loads(place.read_text())
        return ShardSummary(Shard(**shard), histograms, made_of)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{place} is damaged or of another version ({error}): delete it, and {path.name} is computed again"
        ) from None


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined(digests: Iterable[str]) -> str:
    """Returns one sha256 of several in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def check_shards(directory: Path, shards: Sequence[Shard]) -> None:
    """Raises DataError with the names of shards that are missing or do not have their original size, in order.

    A shard of which the file system cannot say so is named alone, because preparing again would not help.
    """

    def whole(shard: Shard) -> bool:
        path = directory / shard.name
        try:
            return path.stat().st_size == shard.size
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise DataError(f"{path}: its size cannot be read: {error.strerror}") from None

    found = in_threads(whole, shards)
    if missing := [shard.name for shard, is_whole in zip(shards, found, strict=True) if not is_whole]:
        raise DataError(
            f"{directory} is not whole: {some_of(missing)} of {len(shards)} shards missing or cut; delete {directory} "
            "and prepare again"
        )


def some_of(names: Sequence[str]) -> str:
    """Returns up to ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


class ShardReader:
    """Reads the records of several shards as one sequence. Opens a shard when it is first read, and keeps it open.

    Raises:
      DataError: this process may not open so many files (on construction); a shard that is read is missing or damaged.
        `check_shards` finds missing shards beforehand.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]):
        self._directory, self._length = directory, sum(shard.records for shard in shards)
        filled = [shard for shard in shards if shard.records]
        weakref.finalize(self, _FILES.free, _FILES.take(len(filled), directory))
        with self._readable():
            # The manifest has each shard's length, so that no shard is opened yet.
            paths: Any = [_Whole(str(directory / one.name), 0, one.records, one.records) for one in filled]
            self._source = grain.sources.ArrayRecordDataSource(paths, _index(self._length)) if paths else ()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._readable():
            return self._source[index]

    def __repr__(self) -> str:
        return f"ShardReader({self._directory})"

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            damage = "where ecdit.prepare --verify finds damage, delete it and prepare again"
            raise DataError(f"cannot read {self._directory}: {error}; {damage}") from None


class _Files:
    """Counts the shards that readers of this process may have open, and raises its limit of open files for them."""

    def __init__(self) -> None:
        self._taken, self._lock = 0, threading.Lock()

    def take(self, count: int, directory: Path) -> int:
        """Makes room for `count` more shards and returns it. Raises DataError if the system allows fewer."""
        with self._lock:
            needed = self._taken + count + OTHER_FILES
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != resource.RLIM_INFINITY and soft < needed:
                if hard != resource.RLIM_INFINITY and hard < needed:
                    raise DataError(
                        f"{directory} has {count} shards, and this process may open {hard} files, of which others take "
                        f"{needed - count}: raise the limit (ulimit -n), or prepare with fewer parts (tars_per_part or "
                        "rows_per_part of the source)"
                    )
                resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            self._taken += count
        return count

    def free(self, count: int) -> None:
        """Gives back what a reader took."""
        with self._lock:
            self._taken -= count


_FILES = _Files()


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A whole shard, as ArrayRecord's FileInstruction protocol describes it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


_INDEXED = 1 << 24  # up to this many records, the index is in memory: 20 to 45 bytes each, up to 0.8 GB


def _index(records: int) -> dict[str, str]:
    """Returns the options that keep a shard's index in memory or, for very many records, in the file.

    Reading a record takes 0.14 ms with the index in the file, and 0.006 ms with the index in memory.
    """
    if records <= _INDEXED:
        return {"index_storage_option": "in_memory"}
    return {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}
