"""Manifests of prepared data: of records, columns and mixtures.

    <directory>/<task>/dataset.json                    the Manifest of the task's records
                       000000/train.array_record ...   records (`record.Record`) for training, one directory per part
                       000000/held_out.array_record    records that training never reads
                       quarantine.jsonl                a line for each rejected pair
                       columns/tokens-<name>/          a Column and its shards, named and ordered like the records'
                       composition.json                the Composition: the task itself, or the parts of a mixture
                       tokenizers/<name>.model         SentencePiece; a public encoder's is a folder <name>/
Mixtures and generated data have only the last two. The parts of a mixture are tasks with directories of their own.
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
    """A part of a mixture; a single task has one."""

    task: str
    rate: str  # a fraction
    fingerprint: str  # fingerprint of its records, or of their generator
    generated: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes the records of a task."""

    format: int
    settings: Mapping[str, Any]  # the settings that the records depend on: `settings_of`
    module: str  # sha256 of the user's file that registered the task
    num_records: int  # records of the split train
    num_held_out: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    fingerprint: str  # sha256 over all records, in order
    rejected: Mapping[str, Any]  # counts of rejected pairs by reason
    caption_characters: Mapping[str, Any]  # a histogram of each caption field: {"16": captions of 16 to 31}, ...
    caption_fields: Mapping[str, Any]  # counts of records by their caption fields: {'["caption"]': 1913}
    identical_images: int  # records that share their stored image with another record
    identical_captions: int  # records that share their captions with another record
    held_out_in_train: int | None  # held-out records whose stored image training reads; None: not counted then
    counted: float  # share of the records from which the last three were scaled up
    attribution: str
    source: str  # sha256 of what was read, by names and times of its files; "": not kept then


@dataclasses.dataclass(frozen=True)
class Composition:
    """Lists the parts that a run reads, with their rates."""

    format: int
    components: tuple[Component, ...]
    module: str  # sha256 of the user's file that registered the mixture


@dataclasses.dataclass(frozen=True)
class Column:
    """Describes values computed for each record of a task."""

    format: int
    name: str  # tokens-<tokenizer>, latents-<weights>, text-<weights>
    records: str  # fingerprint of the records
    made_by: str  # sha256 of the tokenizer or the weights
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    fingerprint: str  # sha256 over its values, in order
    histograms: Mapping[str, Any]  # token counts by caption field: {"caption": {"7": captions of 7 tokens, ...}}


def task_directory(config: DataConfig, task: str = "") -> Path:
    """Returns the directory of a task's prepared data, by default of `data.task`."""
    return Path(config.directory) / (task or config.task)


def settings_of(config: DataConfig, task: str) -> dict[str, Any]:
    """Returns the settings that a task's records depend on."""
    return {"task": task, "image_size": config.image_size, **to_dict(config.prepare)}


def read_records_manifest(config: DataConfig, task: str) -> Manifest:
    """Returns the manifest of a task's records.

    Raises:
      DataError: the task is not prepared, prepared with other settings, or its manifest is damaged.
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
      DataError: the file is missing, damaged or of another format.
    """
    try:
        stored = json.loads(path.read_text())
        if stored["format"] == FORMAT:
            if cls is Manifest:
                stored.setdefault("held_out_in_train", None)  # records that were prepared before it was counted
                stored.setdefault("source", "")
            return build(cls, stored)
        found = stored["format"]
    except FileNotFoundError:
        raise DataError(f"{path.parent} is not prepared: run python -m ecdit.prepare --config=... first") from None
    except (OSError, ConfigError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {path.parent} and prepare again") from None
    raise DataError(f"{path} has format {found}, not {FORMAT}: delete {path.parent} and prepare again")


def to_json(manifest: Any) -> str:
    """Returns a manifest as the JSON that `read_json` reads."""
    return json.dumps(to_dict(manifest), indent=1) + "\n"


def by_number(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns a histogram in the order of its numbers."""
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def shards_of(manifest: Manifest | Column, split: Literal["train", "held_out"]) -> tuple[Shard, ...]:
    """Returns the shards of a split."""
    return manifest.train if split == "train" else manifest.held_out
