"""Opens prepared data for a run: checks it before the first step, reads rows by index, and names its tokenizer."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ecdit.data import DataError, images
from ecdit.data.columns import ColumnMaker, column_fingerprint, make_column, make_share, read_column, shards_left
from ecdit.data.config import DataConfig, field_group, rate_of
from ecdit.data.generated import GENERATED, Split
from ecdit.data.manifest import (
    Column,
    Component,
    Composition,
    Manifest,
    read_records_manifest,
    shards_of,
    task_directory,
)
from ecdit.data.mixing import mixing
from ecdit.data.preparation import prepare_records, read_composition, summary
from ecdit.data.record import Record, decode_record, unpack
from ecdit.data.shards import ShardReader, check_shards, combined
from ecdit.data.shares import Share
from ecdit.data.text_states import EMPTY
from ecdit.data.tokenizer import PromptTokens, load_tokenizer, tokenizer_sha256
from ecdit.data.tokens import TokensColumn, check_size, make_tokenizer, tokenizer_path, truncated_captions
from ecdit.encoders.autoencoder import StoredLatents


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A stored part of a run's data."""

    component: Component
    directory: Path
    manifest: Manifest
    tokens: Column
    latents: Column | None
    text: Column | None  # the states of captions, which take the place of tokens


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run's data, complete and prepared with the config's settings."""

    config: DataConfig
    composition: Composition
    tokenizer: Path
    stored: tuple[StoredPart | None, ...]  # one per component; None if it is generated
    fingerprint: str  # sha256 of everything but the seed that determines a row

    @property
    def num_records(self) -> int | None:
        """Returns how many records training reads, or None if a part is generated and so endless."""
        if None in self.stored:
            return None
        return sum(part.manifest.num_records for part in self.stored if part)


def prepare(
    config: DataConfig, workers: int = 1, say: Callable[[str], None] = print, same_source: bool = False
) -> Prepared:
    """Prepares missing records, tokenizer and tokens of `data.task`, and prints a line before and after.

    `same_source` is explained in `preparation.prepare_records`.

    Raises:
      DataError: there is no usable image, a package is missing, or the directory has other data or other settings.
    """
    done = tokenizer_path(config).exists()
    prepare_captions(config, workers, say, same_source)
    prepared = open_prepared(config)
    say(f"{task_directory(config)} {'is' if done else 'is now'} prepared: {describe(prepared)}")
    return prepared


def prepare_captions(
    config: DataConfig, workers: int, say: Callable[[str], None], same_source: bool = False
) -> Composition:
    """Prepares what is not prepared of records, tokenizer and tokens, and returns the parts. Raises as `prepare`."""
    composition = prepare_records(config, workers, say, same_source)
    for component in composition.components:
        if not component.generated:
            _check_captions(config, component.task, read_records_manifest(config, component.task))
    tokenizer = make_tokenizer(config, composition, say)
    for component in composition.components:
        if not component.generated:
            manifest = read_records_manifest(config, component.task)
            make_column(task_directory(config, component.task), manifest, TokensColumn(tokenizer), workers, say)
    return composition


def prepare_column(
    config: DataConfig,
    maker: ColumnMaker,
    workers: int,
    say: Callable[[str], None],
    constants: Callable[[], Mapping[str, bytes]] = dict,
    share: Share | None = None,
) -> None:
    """Computes a column, or a share of its shards, of every stored part, whose records are prepared; says how fast.

    Raises:
      DataError: as `prepare`; or there is one of that name that something else has made.
    """
    components = read_composition(config).components
    if made := [component.task for component in components if component.generated]:
        raise DataError(f"{made[0]} is made when it is read: it has no records to compute {maker.name} of")
    for component in components:
        directory, manifest = task_directory(config, component.task), read_records_manifest(config, component.task)
        mine, start = shards_left(directory, manifest, maker.name, share), time.monotonic()
        if share is None:
            make_column(directory, manifest, maker, workers, say, constants)
        else:
            make_share(directory, manifest, maker, workers, say, share)
        left, seconds = sum(shard.records for shard in mine), time.monotonic() - start
        rate = f"{left} images in {seconds:.1f} s, {left / seconds:.1f} images/s" if left else "is there"
        say(f"{directory}, column {maker.name}{f', share {share}' if share else ''}: {rate}")
        if share:
            others = len(shards_left(directory, manifest, maker.name))
            of_all = f"{others} of all {len(manifest.train) + len(manifest.held_out)} shards are left"
            say(f"{of_all}; the command without --share computes what is left when shares have ended, and joins them")


def open_prepared(config: DataConfig) -> Prepared:
    """Returns a run's data after checking that it is complete and prepared with the config's settings.

    Raises:
      DataError: the data is not prepared, prepared with other settings, incomplete or damaged.
    """
    composition, tokenizer = read_composition(config), tokenizer_path(config)
    if not tokenizer.exists():
        raise DataError(f"there is no tokenizer {tokenizer}: run python -m ecdit.prepare --config=... first")
    check_size(config, tokenizer)
    column, stored, decides = TokensColumn(tokenizer), [], []
    for component in composition.components:
        if component.generated:
            made = GENERATED[component.task].fingerprint(config)
            _same(component, made, "its generator")
            decides.append(made)
            stored.append(None)
            continue
        directory, manifest = task_directory(config, component.task), read_records_manifest(config, component.task)
        _same(component, manifest.fingerprint, "its records")
        _check_captions(config, component.task, manifest)
        tokens = read_column(directory, manifest, column.name, column.made_by)
        latents = read_column(directory, manifest, f"latents-{config.latents}", "") if config.latent_channels else None
        text = read_column(directory, manifest, f"text-{config.text_states}", "") if config.text_states else None
        part = StoredPart(component, directory, manifest, tokens, latents, text)
        _check_whole(part)
        stored.append(part)
        decides += [
            manifest.fingerprint,
            tokens.fingerprint,
            *(column.fingerprint for column in (latents, text) if column),
        ]
    rates = [component.rate for component in composition.components]
    # Before, all parts were shuffled alike: a run of that order is not to go on with this one.
    order = ["parts are shuffled apart"] if len(stored) > 1 else []
    fingerprint = combined([*decides, *rates, column.made_by, *order])
    return Prepared(config, composition, tokenizer, tuple(stored), fingerprint)


def _same(component: Component, found: str, name: str) -> None:
    if component.fingerprint != found:
        raise DataError(
            f"{component.task} has changed since it was prepared: {name} has the fingerprint {found[:12]}, not "
            f"{component.fingerprint[:12]}; delete composition.json of the task that names it, and prepare again"
        )


def _check_captions(config: DataConfig, task: str, manifest: Manifest) -> None:
    """Raises DataError unless every record has a caption field with a rate."""
    found = [(json.loads(names), count) for names, count in manifest.caption_fields.items()]
    rated = {name for names, _ in found for name in names if rate_of(config.captions, name)}
    for field, lengths in manifest.caption_characters.items():
        group = field_group(field)
        # One caption of a list, such as captions.0, stands for the list if as many records have it as have the list.
        if rate_of(config.captions, field) and sum(lengths.values()) == sum(n for names, n in found if group in names):
            rated.add(group)
    without = [(names, count) for names, count in found if rated.isdisjoint(names)]
    if without:
        have = ", ".join(f"{count} with {' and '.join(names)} alone" for names, count in without)
        rates = ", ".join(f"{name} {rate}" for name, rate in config.captions.items())
        raise DataError(
            f"data.captions has the rates {rates}, and {task} has records without such a caption: {have}; give one of "
            "their fields a rate"
        )


def _check_whole(part: StoredPart) -> None:
    """Raises DataError unless every shard that training reads exists with its original size."""
    columns = part.directory / "columns"
    read = {part.directory: part.manifest} if part.latents is None else {columns / part.latents.name: part.latents}
    text = part.text or part.tokens
    for directory, manifest in {**read, columns / text.name: text}.items():
        check_shards(directory, (*manifest.train, *manifest.held_out))


def describe(prepared: Prepared) -> str:
    """Returns a line that summarizes a run's data."""
    config, told = prepared.config, []
    for component, part in zip(prepared.composition.components, prepared.stored, strict=True):
        cut = truncated_captions(part.tokens.histograms, config.caption_length) if part else 0
        what = f"{summary(part.manifest)}, {cut} captions longer than {config.caption_length} tokens" if part else ""
        told.append(f"{component.task}: {what or 'made when it is read'}" if len(prepared.stored) > 1 else what)
    pieces = " and ".join(str(part.size) for part in load_tokenizer(prepared.tokenizer).parts)
    return "; ".join([*filter(None, told), f"{pieces} pieces in {prepared.tokenizer.name}"])


@dataclasses.dataclass(frozen=True)
class Row:
    """A row before augmentation."""

    content: np.ndarray  # uint8[H, W, 3], or float16[h, w, 2c], the moments of its latents
    # Of every caption field the tokens, the end token last; or its states as `text_states.store` keeps them.
    tokens: Mapping[str, Any]
    original_size: Int[np.ndarray, "2"]
    crop: Int[np.ndarray, "2"]


class StoredRows:
    """Reads the rows of a part's split by record. Thread-safe.

    Raises:
      DataError: a record that is read is missing, damaged, or of another shape.
    """

    def __init__(self, part: StoredPart, config: DataConfig, split: Split):
        text = part.text or part.tokens
        self._tokens = ShardReader(part.directory / "columns" / text.name, shards_of(text, split))
        latents = part.latents
        self._latents = latents and ShardReader(part.directory / "columns" / latents.name, shards_of(latents, split))
        self._records = None if latents else ShardReader(part.directory, shards_of(part.manifest, split))
        side, channels = config.image_size // StoredLatents.downsampling, 2 * config.latent_channels
        self._shape = (side, side, channels) if latents else (config.image_size, config.image_size, 3)
        self._name = f"{part.directory} ({latents.name if latents else 'images'})"

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Row:
        tokens = unpack(self._tokens[index])
        if self._latents is not None:
            stored = unpack(self._latents[index])
            content, size, crop = stored["latents"], stored["original_size"], stored["crop"]
        else:
            assert self._records is not None
            record = decode_record(self._records[index])
            content, size, crop = images.decode_stored(record.image), record.original_size, record.crop
        if content.shape != self._shape:
            raise DataError(f"{self._name}: record {index} has the shape {content.shape}, not {self._shape}")
        return Row(content, tokens, size, crop)


class GeneratedRows:
    """Generates the rows of a part."""

    def __init__(self, task: str, config: DataConfig, split: Split, tokenizer: Path):
        self._source, self._config = GENERATED[task], config
        self._split: Split = split
        self._encode = load_tokenizer(tokenizer).encode

    def row(self, seed: int, index: int) -> Row:
        """Returns the row of a seed and an index."""
        made = self._source.example(self._config, self._split, seed, index)
        tokens = {field: self._encode(text) for field, text in made.captions.items()}
        return Row(made.content, tokens, made.original_size, made.crop)


def stored_records(prepared: Prepared, split: Split) -> Iterator[Record]:
    """Yields the records of all stored parts, in order."""
    for part in filter(None, prepared.stored):
        reader = ShardReader(part.directory, shards_of(part.manifest, split))
        yield from (decode_record(reader[i]) for i in range(len(reader)))


def sample_captions(prepared: Prepared, count: int) -> list[str]:
    """Returns captions that training reads, evenly spaced over a stored task, or from the first rows of other data."""
    return [caption_of(prepared.config, captions) for captions, _ in _sample_rows(prepared, count, with_images=False)]


def sample_targets(prepared: Prepared, count: int) -> list[UInt8[np.ndarray, "H W 3"] | None]:
    """Returns the images of `sample_captions`, without augmentation; None for a row that is generated latents."""
    return [image for _, image in _sample_rows(prepared, count, with_images=True)]


def _sample_rows(
    prepared: Prepared, count: int, with_images: bool
) -> Iterator[tuple[Mapping[str, str], UInt8[np.ndarray, "H W 3"] | None]]:
    """Yields captions by field and, if asked for and not generated latents, images of rows that training reads."""
    parts, config = prepared.stored, prepared.config
    readers = [part and ShardReader(part.directory, part.manifest.train) for part in parts]
    rates = mixing([Fraction(one.rate) for one in prepared.composition.components])
    total = prepared.num_records
    if len(parts) == 1 and total is not None:
        places = [(0, int(i)) for i in np.linspace(0, total - 1, min(count, total))]
    else:
        places = [rates.locate(row) for row in range(count)]
    for part, index in places:
        reader = readers[part]
        if reader is not None:
            record = decode_record(reader[index % len(reader)])
            yield record.captions, images.decode_stored(record.image) if with_images else None
            continue
        source = GENERATED[prepared.composition.components[part].task]
        if with_images and not config.latent_channels:
            made = source.example(config, "train", 0, index)
            yield made.captions, made.content
        else:
            yield source.captions(config, "train", 0, index), None


def caption_of(config: DataConfig, captions: Mapping[str, str]) -> str:
    """Returns the first of a record's captions that training may read.

    Raises:
      DataError: none of the record's captions has a rate.
    """
    for field, text in captions.items():
        if rate_of(config.captions, field) is not None:
            return text
    raise DataError(f"data.captions has rates for {', '.join(config.captions)}; a record has {', '.join(captions)}")


def check_latents(prepared: Prepared, made_by: str) -> None:
    """Raises DataError unless these weights have made the prepared latents."""
    for part in filter(None, prepared.stored):
        if part.latents is not None:
            read_column(part.directory, part.manifest, part.latents.name, made_by)


def check_text(prepared: Prepared, made_by: str) -> None:
    """Raises DataError unless these weights have made the prepared states of captions, in every part."""
    for component, part in zip(prepared.composition.components, prepared.stored, strict=True):
        if part is None or part.text is None:
            raise DataError(f"{component.task} has no prepared states of captions: text.encode must be online")
        read_column(part.directory, part.manifest, part.text.name, made_by)


def empty_caption(prepared: Prepared) -> Mapping[str, Any]:
    """Returns the prepared states of the empty caption. Raises DataError if there are none, or they are damaged."""
    for part in prepared.stored:
        if part and part.text:
            return read_empty(part.directory, part.text)
    raise DataError(f"{task_directory(prepared.config)} has no prepared states of captions")


def read_empty(directory: Path, column: Column) -> Mapping[str, Any]:
    """Returns the states of the empty caption beside a column of text states. Raises DataError if they are damaged.

    Args:
      directory: of the records that the column belongs to.
      column: its manifest.
    """
    path = directory / "columns" / column.name / EMPTY
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; delete {path.parent} and prepare it again") from None
    if column_fingerprint((*column.train, *column.held_out), {EMPTY: data}) != column.fingerprint:
        raise DataError(f"{path} is damaged: delete {path.parent} and prepare it again")
    return unpack(data)


def check_same_tokenizer(all_prepared: Sequence[Prepared]) -> None:
    """Raises DataError unless the data sets that one run reads in turn share their tokenizer."""
    first = all_prepared[0].tokenizer
    for prepared in all_prepared[1:]:
        if tokenizer_sha256(prepared.tokenizer) != tokenizer_sha256(first):
            raise DataError(f"{prepared.tokenizer} is another tokenizer than {first}: a run cannot use both")


def prompt_tokens(config: DataConfig) -> PromptTokens:
    """Returns what encodes captions by the tokenizer of prepared data."""
    return PromptTokens(load_tokenizer(tokenizer_path(config)), config.caption_length)
