"""Verifies prepared data: every checksum, every record, every image."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ecdit.data import DataError
from ecdit.data.columns import read_column
from ecdit.data.config import DataConfig
from ecdit.data.generated import Split
from ecdit.data.images import decode_stored
from ecdit.data.manifest import COLUMN, SPLITS, Column, Manifest, shards_of
from ecdit.data.prepared import Prepared, StoredPart, open_prepared, read_empty
from ecdit.data.record import decode_record
from ecdit.data.shards import Shard, ShardReader, file_sha256
from ecdit.data.text_states import TEXT
from ecdit.progress import each


def verify(config: DataConfig, say: Callable[[str], None] = print) -> Prepared:
    """Reads all prepared data of `config`, prints how much was verified, and returns it opened.

    Raises:
      DataError: a shard's checksum differs from the manifest's, or a record or an image cannot be decoded. The message
        names all damaged shards.
    """
    prepared, damaged, records, shards = open_prepared(config), [], 0, 0
    for part in filter(None, prepared.stored):
        columns, unreadable = _columns(part)
        damaged += unreadable
        for column in columns:
            if column.name.startswith(TEXT):
                try:
                    read_empty(part.directory, column)
                except DataError as error:
                    damaged.append(str(error))
        for split in SPLITS:
            for shard in _each_shard(part.manifest, split, part.component.task):
                problem = _problem(part, shard, config.image_size)
                damaged += [f"{part.directory / shard.name}: {problem}"] if problem else []
                records, shards = records + shard.records, shards + 1
            for column in columns:
                directory = part.directory / "columns" / column.name
                for shard in _each_shard(column, split, f"{column.name} of {part.component.task}"):
                    problem = _changed(directory / shard.name, shard)
                    damaged += [f"{directory / shard.name}: {problem}"] if problem else []
                    shards += 1
    if damaged:
        raise DataError(f"{len(damaged)} of {shards} shards are damaged:\n  " + "\n  ".join(damaged))
    say(f"verified {shards} shards: {records} records, their images and their columns are unchanged")
    return prepared


def _each_shard(manifest: Manifest | Column, split: Split, of: str) -> Iterator[Shard]:
    """Yields the shards of a split, and shows how many are verified."""
    shards = shards_of(manifest, split)
    return each(shards, f"verifying {of}, {split}", "shards", len(shards))


def _columns(part: StoredPart) -> tuple[list[Column], list[str]]:
    """Returns all columns of a part, also those that the config does not name, and why others cannot be read."""
    columns, unreadable = [], []
    for path in sorted((part.directory / "columns").glob(f"[!.]*/{COLUMN}")):
        try:
            columns.append(read_column(part.directory, part.manifest, path.parent.name, ""))
        except DataError as error:
            unreadable.append(str(error))
    return columns, unreadable


def _changed(path: Path, shard: Shard) -> str | None:
    """Returns how a shard's file differs from the manifest's entry, or None."""
    try:
        return None if file_sha256(path) == shard.sha256 else "its sha256 differs from the manifest's"
    except OSError as error:
        return f"cannot be read: {error}"


def _problem(part: StoredPart, shard: Shard, side: int) -> str | None:
    """Returns why a shard of records is damaged, or None."""
    if problem := _changed(part.directory / shard.name, shard):
        return problem
    try:
        reader = ShardReader(part.directory, [shard])
        for index in range(len(reader)):
            shape = decode_stored(decode_record(reader[index]).image).shape
            if shape != (side, side, 3):
                return f"record {index} has an image of shape {shape}"
    except (DataError, ValueError, OSError) as error:
        return f"cannot be read: {error}"
    return None
