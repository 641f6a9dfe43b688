"""Columns: values computed for each record of a task, in shards beside the records and in the same order."""

import collections
import dataclasses
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

from ecdit.data import DataError
from ecdit.data.locks import ends_with_its_parent, lock_of, locked, remove_scratch, scratch_of
from ecdit.data.manifest import COLUMN, FORMAT, Column, Manifest, by_number, read_json, to_json
from ecdit.data.memory import fitting, free_bytes
from ecdit.data.record import Record, decode_record
from ecdit.data.shards import (
    Shard,
    ShardReader,
    ShardSummary,
    check_shards,
    combined,
    read_summary,
    some_of,
    summary_path,
    write_shard,
    write_summary,
)
from ecdit.data.shares import Share, beginning, check_count, forget_count, sharing
from ecdit.files import in_threads, replace_bytes, replace_text, sync
from ecdit.progress import progress

_MADE_OF = "made_of"  # file with the fingerprints of the records and of the tokenizer or weights
Say = Callable[[str], None]


class ColumnMaker(Protocol):
    """Computes a column. It must be picklable, because several processes run it."""

    @property
    def name(self) -> str:
        """Returns the column's name."""
        ...

    @property
    def made_by(self) -> str:
        """Returns the sha256 of the tokenizer or the weights that compute it."""
        ...

    @property
    def process_bytes(self) -> int:
        """Returns the memory that each process takes to compute it, or 0 if that is too little to matter."""
        ...

    def values(self, records: Iterable[Record]) -> Iterator[tuple[bytes, Mapping[str, int]]]:
        """Yields for each record, in order, the bytes to store and the numbers to count in the column's histograms."""
        ...


def column_directory(task: Path, name: str) -> Path:
    """Returns the directory of a task's column `name`."""
    return task / "columns" / name


def read_column(task: Path, manifest: Manifest, name: str, made_by: str) -> Column:
    """Returns a task's column.

    Args:
      task: directory of the task.
      manifest: manifest of its records.
      name: name of the column.
      made_by: sha256 of the tokenizer or the weights that must have made it; "" accepts any.

    Raises:
      DataError: the column is missing, incomplete or damaged, or was made from other records, or by another tokenizer
        or other weights.
    """
    directory = column_directory(task, name)
    command = f"python -m ecdit.prepare --config=...{_what(name)}"
    if not (directory / COLUMN).exists():
        begun = _working(directory)
        if begun.exists():
            shards = [shard.name for shard in (*manifest.train, *manifest.held_out)]
            left = [shard for shard in shards if read_summary(begun / shard) is None]
            raise DataError(
                f"the column {name} of {task} is incomplete: {some_of(left)} of {len(shards)} shards are missing; "
                f"run {command} again"
            )
        raise DataError(f"{task} has no column {name}: run {command} first")
    column = read_json(directory / COLUMN, Column)
    for origin, made, wanted in (
        ("records", column.records, manifest.fingerprint),
        ("tokenizer or weights", column.made_by, made_by or column.made_by),
    ):
        if made != wanted:
            raise DataError(
                f"{directory} was made from other {origin}: their fingerprint is {made[:12]}, not {wanted[:12]}; "
                f"delete it and run {command} again"
            )
    if other := _other_rows((*column.train, *column.held_out), (*manifest.train, *manifest.held_out)):
        raise DataError(
            f"{directory} has not a row for each record of {some_of(other)}: delete it and run {command} again"
        )
    return column


def _other_rows(made: Sequence[Shard], records: Sequence[Shard]) -> list[str]:
    """Returns the names of shards that have not as many rows in a column as there are records."""
    rows, wanted = ({shard.name: shard.records for shard in shards} for shards in (made, records))
    return [name for name in rows | wanted if rows.get(name) != wanted.get(name)]


def shards_left(task: Path, manifest: Manifest, name: str, share: Share | None = None) -> list[Shard]:
    """Returns the shards of records, or a share's, of which a column is still to be computed, after earlier calls."""
    directory = column_directory(task, name)
    working = _working(directory)
    if (directory / COLUMN).exists() or (working / COLUMN).exists():
        return []
    shards = [shard for shard in (*manifest.train, *manifest.held_out) if share is None or _part(shard) in share]
    return [shard for shard in shards if read_summary(working / shard.name) is None]


def make_column(
    task: Path,
    manifest: Manifest,
    maker: ColumnMaker,
    workers: int,
    say: Say,
    constants: Callable[[], Mapping[str, bytes]] = dict,
) -> Column:
    """Computes a column unless it is there; goes on where an earlier call was killed.

    `constants` gives files that stand beside its shards. Fewer than `workers` processes run where more would not fit
    the memory, which `say` is told.

    Raises:
      DataError: a column of that name was made from other records, or by another tokenizer or other weights, or
        weights have begun it from or by others; what computes it has changed meanwhile; a process was killed.
    """
    directory = column_directory(task, maker.name)
    if (directory / COLUMN).exists():
        return read_column(task, manifest, maker.name, maker.made_by)
    directory.parent.mkdir(exist_ok=True)
    with locked(lock_of(directory), say):
        if (directory / COLUMN).exists():  # another process was first
            return read_column(task, manifest, maker.name, maker.made_by)
        working, shards = _working(directory), (*manifest.train, *manifest.held_out)
        key = _key(manifest, maker)
        if working.exists() and _made_of(working) != key:
            if _what(maker.name):  # weights may have computed it for days
                _check_same(working, key)
            shutil.rmtree(working)
        working.mkdir(exist_ok=True)
        replace_text(working / _MADE_OF, key)
        if not (working / COLUMN).exists():  # else an earlier call was killed just before the rename
            _write(task, manifest, maker, key, workers, say)
            files = constants()
            if _key(manifest, maker) != key:
                raise DataError(
                    f"{working}: the tokenizer or the weights have changed while they were read: delete it, and "
                    "prepare again"
                )
            for name, data in files.items():
                replace_bytes(working / name, data)
            replace_text(working / COLUMN, to_json(_described(manifest, maker, working, files)))
        for shard in shards:  # what only this call needed
            summary_path(working / shard.name).unlink(missing_ok=True)
            scratch_of(working / shard.name).unlink(missing_ok=True)  # of a share that was killed
        forget_count(working)
        remove_scratch(working)
        working.rename(directory)
    return read_column(task, manifest, maker.name, maker.made_by)


def make_share(task: Path, manifest: Manifest, maker: ColumnMaker, workers: int, say: Say, share: Share) -> None:
    """Computes a share's shards of a column. Several shares may run at once; `make_column` finds their shards done.

    Raises:
      DataError: the column, or what other shares have begun, was made from other records, or by another tokenizer or
        other weights; or shares of another number have begun it.
    """
    directory = column_directory(task, maker.name)
    directory.parent.mkdir(exist_ok=True)
    lock, working, key = lock_of(directory), _working(directory), _key(manifest, maker)
    with sharing(lock, share, say):
        with beginning(lock, say):
            if (directory / COLUMN).exists():
                read_column(task, manifest, maker.name, maker.made_by)
                return
            _check_same(working, key)
            working.mkdir(exist_ok=True)
            replace_text(working / _MADE_OF, key)
            check_count(working, share)
        _write(task, manifest, maker, key, workers, say, share)


def _key(manifest: Manifest, maker: ColumnMaker) -> str:
    """Returns what a column is made of, by fingerprints."""
    return f"{manifest.fingerprint} {maker.made_by}"


def _check_same(working: Path, key: str) -> None:
    """Raises DataError if an unfinished column, unless it has hardly begun, is made of something else."""
    if _made_of(working) not in ("", key):
        raise DataError(
            f"{working} was begun from other records, or by another tokenizer or other weights: delete it when no "
            "process computes it"
        )


def _made_of(working: Path) -> str:
    """Returns what an unfinished column is made of, or "" if it has hardly begun."""
    path = working / _MADE_OF
    return path.read_text() if path.exists() else ""


def _part(shard: Shard) -> int:
    """Returns the index of the part that a shard belongs to."""
    return int(Path(shard.name).parent.name)


def _what(name: str) -> str:
    """Returns the flag of the command that makes a column."""
    kind = name.partition("-")[0]
    return "" if kind == "tokens" else f" --what={kind}"


def _working(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.preparing")


def _write(
    task: Path, manifest: Manifest, maker: ColumnMaker, key: str, workers: int, say: Say, share: Share | None = None
) -> None:
    """Writes the shards that are left, of all or of a share's."""
    working = _working(column_directory(task, maker.name))
    _check_begun(manifest, working, key)
    left = shards_left(task, manifest, maker.name, share)
    if left:
        workers, why = fitting(min(workers, len(left)), maker.process_bytes, free_bytes())
        if why:
            say(f"{maker.name}: {why}")
    with progress(maker.name, "records", sum(shard.records for shard in left)) as update:
        _write_shards(task, working, left, maker, key, workers, update)


def _check_begun(manifest: Manifest, working: Path, key: str) -> None:
    """Raises DataError if a finished shard of an unfinished column is made of something else than `key`.

    Shards that hosts have computed on disks of their own are copied into one directory, whose `_MADE_OF` is of one.
    """
    shards = (*manifest.train, *manifest.held_out)
    found = in_threads(lambda shard: read_summary(working / shard.name), shards)
    if other := [shard.name for shard, one in zip(shards, found, strict=True) if one and one.made_of != key]:
        raise DataError(
            f"{working}: {some_of(other)} of {len(shards)} shards were computed from other records, or by another "
            "tokenizer or other weights: delete them, each with its .json, and prepare again"
        )


def _write_shards(
    task: Path,
    working: Path,
    shards: list[Shard],
    maker: ColumnMaker,
    key: str,
    workers: int,
    update: Callable[[int], object],
) -> None:
    """Writes shards, and tells `update` how many more records are written."""
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            _write_one(task, working, shard, maker, key, update)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(shards)), context, ends_with_its_parent, (os.getpid(),)) as pool:
        futures = {pool.submit(_write_one, task, working, shard, maker, key): shard for shard in shards}
        try:
            for future in as_completed(futures):
                future.result()
                update(futures[future].records)
        except BrokenProcessPool:
            raise DataError(
                f"a process that computes {maker.name} was killed, as the kernel does where memory is short; the same "
                "command goes on, and with fewer --workers takes less"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_one(
    task: Path,
    working: Path,
    shard: Shard,
    maker: ColumnMaker,
    key: str,
    update: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes the column's shard for one shard of records; tells `update` of each record."""
    place = working / shard.name
    scratch = scratch_of(place)
    place.parent.mkdir(exist_ok=True)
    scratch.unlink(missing_ok=True)
    reader, histograms = ShardReader(task, [shard]), collections.defaultdict(Counter)

    def rows() -> Iterator[bytes]:
        for data, numbers in maker.values(decode_record(reader[i]) for i in range(len(reader))):
            for name, number in numbers.items():
                histograms[name][str(number)] += 1
            yield data
            update(1)

    written = write_shard(scratch, rows())
    if written.records != shard.records:
        raise DataError(f"{maker.name} of {task}: {written.records} rows for {shard.records} records of {shard.name}")
    sync(scratch)  # before its summary says that it is complete
    scratch.rename(place)
    write_summary(place, ShardSummary(dataclasses.replace(written, name=shard.name), histograms, key))


def column_fingerprint(shards: Iterable[Shard], files: Mapping[str, bytes]) -> str:
    """Returns the sha256 of a column's shards and of the files beside them."""
    return combined([*(shard.content for shard in shards), *(data.hex() for _, data in sorted(files.items()))])


def _described(manifest: Manifest, maker: ColumnMaker, working: Path, files: Mapping[str, bytes]) -> Column:
    histograms: dict[str, Counter[str]] = collections.defaultdict(Counter)
    found: dict[str, list[Shard]] = {"train": [], "held_out": []}
    for split, shards in (("train", manifest.train), ("held_out", manifest.held_out)):
        for shard in shards:
            summary = read_summary(working / shard.name)
            assert summary is not None, shard.name
            found[split].append(summary.shard)
            for name, counts in summary.histograms.items():
                histograms[name].update(counts)
    every = [shard for shards in found.values() for shard in shards]
    check_shards(working, every)
    return Column(
        format=FORMAT,
        name=maker.name,
        records=manifest.fingerprint,
        made_by=maker.made_by,
        train=tuple(found["train"]),
        held_out=tuple(found["held_out"]),
        fingerprint=column_fingerprint(every, files),
        histograms={name: by_number(counts) for name, counts in sorted(histograms.items())},
    )
