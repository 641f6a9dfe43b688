"""Makes the tokenizer of a run's data and the column with every caption's tokens."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from ecdit.data import DataError
from ecdit.data.config import DataConfig, rate_of
from ecdit.data.generated import GENERATED
from ecdit.data.locks import lock_of, locked, scratch_of
from ecdit.data.manifest import Composition, read_records_manifest, task_directory
from ecdit.data.mixing import mixing
from ecdit.data.record import Record, decode_record, pack
from ecdit.data.shards import ShardReader, file_sha256
from ecdit.data.text import load_vocabulary, train_vocabulary
from ecdit.data.tokenizer import (
    SPIECE,
    copy_folders,
    files_of,
    folders_sha256,
    hash_digests,
    load_tokenizer,
    tokenizer_sha256,
)
from ecdit.files import replace_text, sync

_CAPTIONS = 1_000_000  # more hardly improve a vocabulary and would have to fit in memory
_GENERATED_CAPTIONS = 4096


def tokenizer_name(config: DataConfig) -> str:
    """Returns the name of the tokenizer: of a file or a folder its name and the beginning of its sha256.

    Raises:
      DataError: there is no such file or folder.
    """
    if config.tokenizer_folders:
        names = "+".join(Path(folder).resolve().name for folder in config.tokenizer_folders)
        return f"{names}-{folders_sha256(config.tokenizer_folders)[:8]}"
    if not config.tokenizer:
        return f"{config.task}-{config.vocab_size}"
    path = Path(config.tokenizer)
    if not path.is_file():
        raise DataError(f"data.tokenizer = {config.tokenizer!r}: there is no such file")
    return f"{path.stem}-{file_sha256(path)[:8]}"


def tokenizer_path(config: DataConfig) -> Path:
    """Returns where prepared data keeps its tokenizer: a .model file, or the folder of a public one.

    One that was prepared from another place, where it had another name, is taken: its hash says that it is the same.
    """
    suffix = "" if config.tokenizer_folders else ".model"
    path = task_directory(config) / "tokenizers" / f"{tokenizer_name(config)}{suffix}"
    if path.exists() or not config.tokenizer:
        return path
    digest = path.name.removesuffix(suffix).rpartition("-")[2]
    return min(path.parent.glob(f"[!.]*-{digest}{suffix}"), default=path)


def tokenizer_files(config: DataConfig) -> dict[str, bytes]:
    """Returns the files of the tokenizer of prepared data by the names that they have in a folder of their own.

    Raises:
      OSError: one cannot be read.
    """
    path = tokenizer_path(config)
    if not config.tokenizer_folders:
        return {SPIECE: path.read_bytes()}
    return {name: file.read_bytes() for name, file in files_of(path).items()}


def hash_files(files: Mapping[str, bytes]) -> str:
    """Returns the sha256 of a tokenizer's files: of one alone that of its contents, of several with their names."""
    return hash_digests({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def make_tokenizer(config: DataConfig, composition: Composition, say: Callable[[str], None] = print) -> Path:
    """Trains the tokenizer on the captions of all parts by their rates, or copies `data.tokenizer`. Returns its path.

    One that was trained before stays, because models know its tokens; a line says so if the captions have changed.

    Raises:
      DataError: the captions have more distinct characters than vocab_size has room for, or the file does not exist.
    """
    path = tokenizer_path(config)
    if path.exists():
        check_size(config, path)
        beside = _trained_on_path(path)
        if not config.tokenizer and beside.exists() and beside.read_text() != _trained_on(config, composition):
            say(
                f"{path} was trained on other records, rates or caption fields, and stays, because models know its "
                f"tokens; to train another for new runs, delete it and the column {TokensColumn(path).name}"
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(path), say):
        if not path.exists():  # else another process was first
            _write_tokenizer(config, composition, path)
    return path


def _write_tokenizer(config: DataConfig, composition: Composition, path: Path) -> None:
    """Copies or trains the tokenizer; `path` appears whole or not at all. One process does this at a time."""
    if config.tokenizer_folders:
        copy_folders(config.tokenizer_folders, path)
        return
    scratch = scratch_of(path)
    if config.tokenizer:
        check_size(config, Path(config.tokenizer))
        shutil.copyfile(config.tokenizer, scratch)
    else:
        names = [one.task for one in composition.components if one.generated]
        words = dict.fromkeys(word for name in names for word in GENERATED[name].words)
        train_vocabulary(_captions(config, composition), config.vocab_size, scratch, list(words))
        replace_text(_trained_on_path(path), _trained_on(config, composition))
    sync(scratch)
    scratch.rename(path)
    sync(path.parent)


def _trained_on_path(tokenizer: Path) -> Path:
    """Returns the file beside a trained tokenizer that keeps `_trained_on`."""
    return tokenizer.with_name(f"{tokenizer.name}.trained_on")


def _trained_on(config: DataConfig, composition: Composition) -> str:
    """Returns the sha256 of what a tokenizer is trained on: the parts' records, their rates, and the caption fields."""
    parts = [(one.rate, one.fingerprint) for one in composition.components]
    fields = sorted(field for field, rate in config.captions.items() if rate)
    return hashlib.sha256(json.dumps([parts, fields]).encode()).hexdigest() + "\n"


def check_size(config: DataConfig, tokenizer: Path) -> None:
    """Raises DataError if a file's tokenizer has more pieces than `data.vocab_size`, by which embeddings are sized.

    A folder's must fit its text encoder: see `experiment.check_tokenizers`.
    """
    if config.tokenizer_folders:
        return
    pieces = load_vocabulary(tokenizer).vocab_size()
    if pieces > config.vocab_size:
        raise DataError(f"data.vocab_size = {config.vocab_size}: must be at least {pieces}, the pieces of {tokenizer}")


def _captions(config: DataConfig, composition: Composition) -> Iterator[str]:
    """Yields captions of the parts in the proportion in which training reads them, evenly spaced over each part."""
    rates = mixing([Fraction(one.rate) for one in composition.components])
    readers = []
    for one in composition.components:
        if one.generated:
            readers.append(None)
        else:
            manifest = read_records_manifest(config, one.task)
            readers.append(ShardReader(task_directory(config, one.task), manifest.train))
    # The number of rows is limited so that no part is read twice.
    limits = [
        int((len(reader) if reader else _GENERATED_CAPTIONS) / rate)
        for reader, rate in zip(readers, rates.rates, strict=True)
    ]
    rows = min(_CAPTIONS, *limits)
    for row in range(rows):
        part, place = rates.locate(row)
        name, reader = composition.components[part].task, readers[part]
        if reader is None:
            captions = GENERATED[name].captions(config, "train", 0, place)
        else:
            count = max(int(rows * rates.rates[part]), 1)
            captions = decode_record(reader[place * len(reader) // max(count, 1) % len(reader)]).captions
        yield from (text for field, text in captions.items() if rate_of(config.captions, field) is not None)


@dataclasses.dataclass(frozen=True)
class TokensColumn:
    """The column tokens-<tokenizer>: for every caption field int32 tokens of the true length, the end token last.

    Of two tokenizers the tokens of the second follow those of the first.
    """

    tokenizer: Path

    @property
    def name(self) -> str:
        """Returns the column's name."""
        return f"tokens-{self.tokenizer.name.removesuffix('.model')}"

    @property
    def made_by(self) -> str:
        """Returns the tokenizer's sha256."""
        return tokenizer_sha256(self.tokenizer)

    @property
    def process_bytes(self) -> int:
        """Returns 0: a tokenizer is small."""
        return 0

    def values(self, records: Iterable[Record]) -> Iterator[tuple[bytes, Mapping[str, int]]]:
        """Yields each record's tokens, and their lengths by field: of two tokenizers the longer part's."""
        tokenizer = load_tokenizer(self.tokenizer)
        for record in records:
            tokens = {field: tokenizer.encode(text) for field, text in record.captions.items()}
            yield pack(tokens), {field: max(map(len, tokenizer.split(row))) for field, row in tokens.items()}


def truncated_captions(histograms: Mapping[str, Mapping[str, int]], caption_length: int) -> int:
    """Returns how many captions of a tokens column have more tokens than `caption_length`."""
    lengths = [item for counts in histograms.values() for item in counts.items()]
    return sum(count for length, count in lengths if int(length) > caption_length)
