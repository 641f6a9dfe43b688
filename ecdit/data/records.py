"""Prepared data: a task's examples in ArrayRecord files, its vocabulary and a manifest.

    <directory>/<task>/records-00000.array_record ...   one msgpack map a record
                       vocabulary.model                 SentencePiece
                       dataset.json                     the Manifest
A record has image uint8[H, W, 3] or latents float16[h, w, c], tokens int32[caption_length], original_size int32[2]
(height, width in px) and caption (str). The directory is made under another name and renamed when complete: it is there
and whole, or not there.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from flax import serialization
from jaxtyping import Int
from tqdm import tqdm

from ecdit.config import ConfigError, build, to_dict
from ecdit.data import DataError
from ecdit.data.tasks import TASKS, Corpus, DataConfig, stored_content
from ecdit.data.text import VOCABULARY, fit, load_vocabulary, tokenize

MANIFEST = "dataset.json"
_FORMAT = 2
_SETTINGS = (
    "task",
    "source",
    "image_size",
    "latent_channels",
    "caption_length",
    "vocab_size",
)  # what the files depend on
_SHARD_RECORDS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds, and the settings it was made with."""

    format: int
    task: str
    source: str
    image_size: int
    latent_channels: int
    caption_length: int
    vocab_size: int  # pieces asked for: the size of an embedding table
    pieces: int  # pieces the vocabulary has, never more
    num_records: int
    shards: tuple[str, ...]  # file names in reading order
    truncated_captions: int
    skipped: tuple[str, ...]  # 'name: reason' of every picture left out
    fingerprint: str  # sha256 over all records, in order, and the vocabulary
    attribution: str


def prepare(config: DataConfig) -> Manifest:
    """Prepares `config.task`, unless it is prepared, and prints a line before and after it.

    Raises:
      DataError: no usable picture, a package that is missing, or the directory is taken by other data or by data of
        other settings.
    """
    target = dataset_directory(config)
    if (target / MANIFEST).exists():
        manifest = read_manifest(config)
        print(f"{target} is prepared: {_summary(manifest)}", flush=True)
        return manifest
    if target.exists():
        raise DataError(f"{target} is in the way: it is no prepared data; move it, or set data.directory")
    print(f"preparing {target}, which is done once", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.task}-", dir=target.parent) as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        corpus = TASKS[config.task](config, prepared)
        manifest = _write(config, corpus, prepared)
        if manifest.num_records == 0:
            raise DataError(f"data.task = {config.task!r} has no records in data.source = {config.source!r}")
        shutil.rmtree(prepared / "tfds", ignore_errors=True)  # an intermediate, as large as the records
        (prepared / MANIFEST).write_text(json.dumps(to_dict(manifest), indent=2) + "\n")
        try:
            prepared.rename(target)
        except OSError:
            return read_manifest(config)  # another process was first; raises if it was something else
    print(f"prepared {target}: {_summary(manifest)}", flush=True)
    return manifest


def read_manifest(config: DataConfig) -> Manifest:
    """The manifest of `config`'s prepared data.

    Raises:
      DataError: not prepared, made with other settings, or damaged.
    """
    directory = dataset_directory(config)
    path = directory / MANIFEST
    if not path.exists():
        raise DataError(f"{directory} is not prepared: run python -m ecdit.prepare --config=... first")
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != _FORMAT:
            raise DataError(
                f"{path} has format {stored['format']}, not {_FORMAT}: delete {directory} and prepare again"
            )
        manifest = build(Manifest, stored)
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {directory} and prepare again") from None
    for key in _SETTINGS:
        asked, made = getattr(config, key), getattr(manifest, key)
        if asked != made:
            raise DataError(
                f"data.{key} = {asked!r}, but {directory} was prepared with {made!r}: "
                f"set data.{key} to that, or another data.directory, or delete this one and prepare again"
            )
    return manifest


class Records(Sequence[dict[str, Any]]):
    """The records of a prepared directory, in stored order, for any number of threads; their arrays are read-only.

    Raises:
      DataError: no records, not as many as were written, or (on reading one) a damaged file.
    """

    def __init__(self, config: DataConfig):
        manifest, self._directory = read_manifest(config), dataset_directory(config)
        if manifest.num_records == 0:
            raise DataError(f"{self._directory} has no records")
        with self._readable():
            paths = [str(self._directory / name) for name in manifest.shards]
            self._source: Any = grain.sources.ArrayRecordDataSource(paths)
        if len(self) != manifest.num_records:
            found = f"{len(self)} records, but its {MANIFEST} says {manifest.num_records}"
            raise DataError(f"{self._directory} has {found}: delete it and prepare again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]  # slices are of no use
        self, index: int
    ) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._readable():
            record: Any = serialization.msgpack_restore(self._source[index])
            return record

    def __repr__(self) -> str:
        return f"Records({self._directory})"

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"cannot read {self._directory}: {error}; delete it and prepare again") from None


def dataset_directory(config: DataConfig) -> Path:
    """Where the prepared data of `config` lives, vocabulary included."""
    return Path(config.directory) / config.task


def check_vocabularies(configs: Sequence[DataConfig]) -> None:
    """Raises DataError where prepared data sets that one model reads in turn do not share their vocabulary."""
    directories = [dataset_directory(config) for config in configs]
    for directory in directories[1:]:
        if (directory / VOCABULARY).read_bytes() != (directories[0] / VOCABULARY).read_bytes():
            raise DataError(f"{directory} has another vocabulary than {directories[0]}: a run cannot read both")


def tokenize_captions(config: DataConfig, captions: Sequence[str]) -> Int[np.ndarray, "n L"]:
    """Captions as the prepared data of `config` has them: int32, with its vocabulary and caption length."""
    return tokenize(dataset_directory(config), captions, config.caption_length)


def _write(config: DataConfig, corpus: Corpus, directory: Path) -> Manifest:
    """Writes the shards and says what it wrote."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shards, truncated, digest, num_records, content = [], 0, hashlib.sha256(), 0, stored_content(config)
    for shard in _shards(tqdm(corpus.examples, "writing", unit="record", disable=None)):
        shards.append(f"records-{len(shards):05d}.array_record")
        # One record a group: reading one at random decompresses no other.
        with contextlib.closing(ArrayRecordWriter(str(directory / shards[-1]), "group_size:1")) as writer:
            for example in shard:
                truncated += len(example["tokens"]) > config.caption_length
                record = {
                    content: example[content],
                    "tokens": fit(example["tokens"], config.caption_length),
                    "original_size": example["original_size"],
                    "caption": example["tokens_pretokenized"].decode(),
                }
                serialized = serialization.msgpack_serialize(record)
                digest.update(serialized)
                writer.write(serialized)
                num_records += 1
    digest.update((directory / VOCABULARY).read_bytes())
    return Manifest(
        format=_FORMAT,
        **{key: getattr(config, key) for key in _SETTINGS},
        pieces=load_vocabulary(directory).vocab_size(),
        num_records=num_records,
        shards=tuple(shards),
        truncated_captions=int(truncated),
        skipped=corpus.skipped,
        fingerprint=digest.hexdigest(),
        attribution=corpus.attribution,
    )


def _shards(examples: Iterable[Any]) -> Iterator[Iterator[Any]]:
    for _, numbered in itertools.groupby(enumerate(examples), key=lambda item: item[0] // _SHARD_RECORDS):
        yield (example for _, example in numbered)


def _summary(manifest: Manifest) -> str:
    unread = "".join(f"\n  skipped {name}" for name in manifest.skipped)
    return (
        f"{manifest.num_records} records of {manifest.image_size} px, {manifest.pieces} pieces, "
        f"{manifest.truncated_captions} captions truncated, {len(manifest.skipped)} pictures skipped{unread}"
    )
