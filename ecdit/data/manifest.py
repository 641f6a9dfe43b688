"""What prepared data says about itself: the manifests of records, columns and mixtures.

    <directory>/<task>/dataset.json                    the Manifest of the task's records
                       000000/train.array_record ...   records (`record.Record`) that training reads, part by part
                       000000/held_out.array_record    those that it never reads
                       quarantine.jsonl                a line for each pair that was left out
                       columns/tokens-<name>/          a Column and its shards, named and ordered as the records'
                       composition.json                the Composition: the task itself, or the parts of a mixture
                       tokenizers/<name>.model         SentencePiece; a public encoder's is a folder <name>/
A mixture, and data that is generated, has only the last two; the parts of a mixture are tasks of their own.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from ecdit.config import ConfigError, build, to_dict
from ecdit.data import DataError
from ecdit.data.config import DataConfig
from ecdit.data.shards import Shard

T = TypeVar("T")
MANIFEST, COLUMN, COMPOSITION, QUARANTINE = "dataset.json", "column.json", "composition.json", "quarantine.jsonl"
FORMAT = 3
SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of a mixture, or the only one of a task by itself."""

    task: str
    rate: str  # a fraction
    fingerprint: str  # of its records, or of what generates them
    generated: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The records of a task."""

    format: int
    settings: Mapping[str, Any]  # that the files depend on: see `settings_of`
    module: str  # sha256 of the user's file that registered the task
    num_records: int  # of the split train
    num_held_out: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    fingerprint: str  # sha256 over all records, in order
    rejected: Mapping[str, Any]  # pairs that were left out, by reason
    caption_characters: Mapping[str, Any]  # for each caption field a histogram: {"16": captions of 16 to 31}, ...
    caption_fields: Mapping[str, Any]  # records by the fields that they have, a JSON list without numbers: captions.0
    identical_images: int  # records whose stored image another record has, too
    identical_captions: int  # records whose captions another record has, too
    counted: float  # share of the records that the last two were counted in and scaled up from
    attribution: str


@dataclasses.dataclass(frozen=True)
class Composition:
    """What a run reads: a task, a mixture of tasks, or generated rows."""

    format: int
    components: tuple[Component, ...]
    module: str  # sha256 of the user's file that registered the mixture


@dataclasses.dataclass(frozen=True)
class Column:
    """What was computed for each record of a task."""

    format: int
    name: str  # tokens-<tokenizer>, latents-<weights>, text-<weights>
    records: str  # fingerprint of the records
    made_by: str  # sha256 of the tokenizer or the weights
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    fingerprint: str  # sha256 over its records, in order
    histograms: Mapping[str, Any]  # of tokens, by caption field: {"caption": {"7": captions of 7 tokens, ...}}


def task_directory(config: DataConfig, task: str = "") -> Path:
    """Returns where a task's prepared data lives; by default that of the config's own."""
    return Path(config.directory) / (task or config.task)


def settings_of(config: DataConfig, task: str) -> dict[str, Any]:
    """Returns what a task's records depend on."""
    return {"task": task, "image_size": config.image_size, **to_dict(config.prepare)}


def read_records_manifest(config: DataConfig, task: str) -> Manifest:
    """Returns the manifest of a task's records.

    Raises:
      DataError: not prepared, made with other settings, or damaged.
    """
    directory = task_directory(config, task)
    manifest = read_json(directory / MANIFEST, Manifest)
    wanted = settings_of(config, task)
    for key in wanted.keys() | manifest.settings.keys():
        asked, made = wanted.get(key), manifest.settings.get(key)
        if asked != made:
            name = f"data.{key}" if key in ("task", "image_size") else f"data.prepare.{key}"
            raise DataError(
                f"{name} = {asked!r}, but {directory} was prepared with {made!r}: set {name} to that, or another "
                "data.directory, or delete this one and prepare again"
            )
    return manifest


def read_json(path: Path, cls: type[T]) -> T:
    """Returns a manifest of type `cls`.

    Raises:
      DataError: it is not there, of another format, or damaged.
    """
    try:
        stored = json.loads(path.read_text())
        if stored["format"] == FORMAT:
            return build(cls, stored)
        found = stored["format"]
    except FileNotFoundError:
        raise DataError(f"{path.parent} is not prepared: run python -m ecdit.prepare --config=... first") from None
    except (OSError, ConfigError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {path.parent} and prepare again") from None
    raise DataError(f"{path} has format {found}, not {FORMAT}: delete {path.parent} and prepare again")


def to_json(manifest: Any) -> str:
    """Returns a manifest as `read_json` reads it."""
    return json.dumps(to_dict(manifest), indent=1) + "\n"


def by_number(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns a histogram in the order of its numbers."""
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def shards_of(manifest: Manifest | Column, split: Literal["train", "held_out"]) -> tuple[Shard, ...]:
    """Returns the shards of a split."""
    return manifest.train if split == "train" else manifest.held_out
