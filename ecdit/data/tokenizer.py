"""A run's tokenizer: a SentencePiece file, a public text encoder's folder, or two such folders side by side.

A caption's ids are those of each part in turn, and each part's end with its end token. So they can be stored at their
true length in one array, and told apart again.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Int

from ecdit.data import DataError
from ecdit.data.locks import scratch_of
from ecdit.data.shards import file_sha256
from ecdit.data.text import EOS, PAD, load_vocabulary, read_vocabulary
from ecdit.files import sync_tree
from ecdit.pretrained.tokenizers import BOTH, MERGES, SPIECE, VOCABULARY, ClipTokenizer, T5Tokenizer, fit

if TYPE_CHECKING:
    import sentencepiece

SIDES = ("first", "second")  # the folders of two tokenizers inside that of both
# The files of a tokenizer that its folder may have beside an encoder's weights, the first ones of T5.
FILES = (SPIECE, VOCABULARY, MERGES, BOTH, "tokenizer_config.json", "special_tokens_map.json")


class PartTokenizer(Protocol):
    """Encodes captions as the ids of one text encoder."""

    end: int  # the id that ends a caption
    pad: int  # the id that fills a row

    @property
    def size(self) -> int:
        """Returns the number of ids: the rows that an embedding needs."""
        ...

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the ids of captions at their true length, the end token included."""
        ...


class PiecesFile:
    """The SentencePiece vocabulary of a .model file: see `text.load_vocabulary`."""

    def __init__(self, vocabulary: "sentencepiece.SentencePieceProcessor"):
        self._vocabulary, self.end, self.pad = vocabulary, EOS, PAD

    @property
    def size(self) -> int:
        """Returns the number of pieces."""
        return self._vocabulary.vocab_size()

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the ids of captions at their true length, the end token included."""
        return [[*self._vocabulary.encode(caption), EOS] for caption in captions]


class Tokenizer:
    """Encodes captions by one part, or by two side by side."""

    def __init__(self, parts: Sequence[PartTokenizer]):
        self.parts = tuple(parts)

    def encode(self, caption: str) -> Int[np.ndarray, " l"]:
        """Returns the ids of a caption at its true length.

        By the first end token `fit` tells the parts apart, and CLIP looks no further than that. So what follows it in a
        part, if a tokenizer reads an end token in a caption, is left out.
        """
        rows = [part.rows([caption])[0] for part in self.parts]
        ends = [row.index(part.end) + 1 for row, part in zip(rows, self.parts, strict=True)]
        return np.concatenate([np.array(row[:end], np.int32) for row, end in zip(rows, ends, strict=True)])

    @functools.cached_property
    def empty(self) -> Int[np.ndarray, " l"]:
        """Returns the ids of the empty caption."""
        return self.encode("")

    def fit(self, ids: Int[np.ndarray, " l"], length: int) -> Int[np.ndarray, " L"]:
        """Returns a caption's ids as int32[parts * length]: each part's padded, or cut with its end token kept."""
        rows = [fit(row, length, part.end, part.pad) for row, part in zip(self.split(ids), self.parts, strict=True)]
        return np.concatenate(rows)

    def split(self, ids: Int[np.ndarray, " l"]) -> list[Int[np.ndarray, " k"]]:
        """Returns a caption's ids of each part."""
        rows = []
        for part in self.parts[:-1]:
            end = int(np.argmax(np.asarray(ids) == part.end)) + 1
            rows.append(ids[:end])
            ids = ids[end:]
        return [*rows, ids]

    def tokenize(self, captions: Sequence[str], length: int) -> Int[np.ndarray, "n L"]:
        """Returns the ids of captions, each as `fit` gives them."""
        rows = [self.fit(self.encode(caption), length) for caption in captions]
        return np.array(rows, np.int32).reshape(len(captions), length * len(self.parts))


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """Encodes prompts as captions of training were, padded or cut to the caption length."""

    tokenizer: Tokenizer
    length: int  # tokens of a caption, for each text encoder

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "n L"]:
        """Returns the ids of prompts."""
        return self.tokenizer.tokenize(prompts, self.length)

    def is_cut(self, prompt: str) -> bool:
        """Returns whether a text encoder sees only a part of the prompt."""
        return any(len(part.rows([prompt])[0]) > self.length for part in self.tokenizer.parts)


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a .model file or a folder.

    Raises:
      DataError: a .model file that cannot be used.
      WeightsError: a folder that cannot be used.
      UserError: a package is missing.
    """
    if all((path / side).is_dir() for side in SIDES):
        return Tokenizer([part_tokenizer(path / side) for side in SIDES])
    return Tokenizer([part_tokenizer(path)])


def tokenizer_of(files: Mapping[str, bytes], public: bool) -> Tokenizer:
    """Returns the tokenizer of files by their names: of a public folder's, or of a SentencePiece vocabulary.

    Raises:
      DataError: the files are of no tokenizer that this version knows.
      WeightsError: a public folder's files cannot be used.
    """
    if not public:
        if SPIECE not in files:
            raise DataError(
                f"a tokenizer of the files {', '.join(files) or 'none'} is not known: there must be {SPIECE}"
            )
        return Tokenizer([PiecesFile(read_vocabulary(files[SPIECE], SPIECE))])
    with tempfile.TemporaryDirectory() as scratch:  # the libraries read paths
        for name, data in files.items():
            path = Path(scratch, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return load_tokenizer(Path(scratch))


def part_tokenizer(path: Path) -> PiecesFile | T5Tokenizer | ClipTokenizer:
    """Returns the tokenizer of one text encoder. Raises as `load_tokenizer`."""
    if path.suffix == ".model":
        return PiecesFile(load_vocabulary(path))
    # As CLIP was trained: OpenCLIP's cleaning, which is OpenAI's too.
    return T5Tokenizer(path) if (path / SPIECE).exists() else ClipTokenizer(path, cleaning="open_clip")


def tokenizer_sha256(path: Path) -> str:
    """Returns the sha256 of a tokenizer: of its only file, or of the names and hashes of several."""
    if path.is_file():
        return file_sha256(path)
    digests = {name: file_sha256(file) for name, file in sorted(files_of(path).items())}
    return hash_digests(digests)


def hash_digests(digests: Mapping[str, str]) -> str:
    """Returns one hash of the sha256 of files by their names: of one alone its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Returns the files in a tokenizer's folder by their names, with the subfolder's where there are two."""
    places = [folder / side for side in SIDES if (folder / side).is_dir()] or [folder]
    found = (place / name for place in places for name in FILES if (place / name).is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def folders_sha256(folders: Sequence[str]) -> str:
    """Returns the `tokenizer_sha256` that these folders will have when they are copied.

    Raises:
      DataError: one is missing, or has no tokenizer.
    """
    digests: dict[str, str] = {}
    for folder, side in zip(folders, SIDES if len(folders) > 1 else ("",), strict=True):
        found = files_of(Path(folder))
        if not found:
            key = "data.second_tokenizer" if side == SIDES[1] else "data.tokenizer"
            raise DataError(f"{key} = {folder!r}: must be a .model file or a folder with {SPIECE} or {VOCABULARY}")
        digests |= {f"{side}/{name}" if side else name: file_sha256(path) for name, path in found.items()}
    return hash_digests(digests)


def copy_folders(folders: Sequence[str], target: Path) -> None:
    """Copies the tokenizers of folders to `target`, which appears whole or not at all."""
    scratch = scratch_of(target)
    shutil.rmtree(scratch, ignore_errors=True)
    for folder, side in zip(folders, SIDES if len(folders) > 1 else ("",), strict=True):
        (scratch / side).mkdir(parents=True)
        for name, path in files_of(Path(folder)).items():
            shutil.copyfile(path, scratch / side / name)
    sync_tree(scratch)
    scratch.rename(target)
