"""Turns captions into token ids of public text encoders: CLIP's byte-pair encoding and T5's SentencePiece.

CLIP's needs the package `tokenizers` and, to clean captions like OpenCLIP, `ftfy`. The extra `pretrained` has both.
"""

import html
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from ecdit.errors import UserError
from ecdit.pretrained.config_json import WeightsError, read_json

VOCABULARY, MERGES, BOTH = "vocab.json", "merges.txt", "tokenizer.json"
SPIECE = "spiece.model"
# Byte pairs are merged only inside these pieces: endings after an apostrophe, words, digits, and other characters.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Defaults of transformers' CLIPTokenizer.
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
T5_PAD, T5_EOS = 0, 1


class Tokens(NamedTuple):
    """Encoded captions."""

    ids: Int[np.ndarray, "n L"]  # int32, padded at the end
    lengths: Int[np.ndarray, " n"]  # int32, with special tokens and without padding


class Tokenizer(Protocol):
    """Turns captions into ids."""

    def encode(self, captions: Sequence[str], length: int) -> Tokens:
        """Returns the captions' tokens. Captions that are too long keep their end token."""
        ...

    def check_fits(self, vocab_size: int) -> None:
        """Raises WeightsError unless an embedding with `vocab_size` rows fits this tokenizer."""
        ...


class ClipTokenizer:
    """Applies CLIP's byte-pair encoding to lower-cased text.

    `cleaning` selects the library whose cleaning of captions it follows. OpenCLIP, like OpenAI, repairs wrongly decoded
    text and resolves HTML entities. transformers does neither, but replaces a special token that a caption spells out
    by that token's id. On plain captions both yield the same ids.

    Raises:
      WeightsError: the folder's files cannot be read (on construction).
      UserError: a package is missing (on construction).
    """

    def __init__(self, folder: Path, cleaning: Literal["open_clip", "transformers"]):
        self.folder, self.cleaning = Path(folder), cleaning
        tokenizers, self._fix_text = _import("tokenizers"), None
        if cleaning == "open_clip":
            self._fix_text = _import("ftfy").fix_text
        vocabulary, merges = _vocabulary(self.folder)
        special = _special_tokens(self.folder)
        unknown = [f"{key} {token!r}" for key, token in special.items() if token not in vocabulary]
        if unknown:
            raise WeightsError(f"{folder}: the vocabulary lacks {', '.join(unknown)}")
        self.start, self.end, self.pad = (vocabulary[special[key]] for key in ("bos_token", "eos_token", "pad_token"))
        self.largest = max(vocabulary.values())
        model = tokenizers.models.BPE(
            vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=special["eos_token"]
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="removed", invert=True)
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pieces, byte_level])
        if cleaning == "transformers":
            normalizers = tokenizers.normalizers
            spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
            self._tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
            # transformers recognises these in captions, even the padding token, which is "!" in SDXL's folders.
            self._tokenizer.add_special_tokens(sorted(set(special.values())))

    @property
    def size(self) -> int:
        """Returns the number of rows that an embedding needs for it."""
        return self.largest + 1

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the ids of captions at their true length, with start and end."""
        if self._fix_text is not None:
            captions = [_clean(caption, self._fix_text) for caption in captions]
        encoded = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        return [[self.start, *one.ids, self.end] for one in encoded]

    def encode(self, captions: Sequence[str], length: int) -> Tokens:
        """Encodes captions."""
        return _fit_all(self.rows(captions), length, self.end, self.pad)

    def check_fits(self, vocab_size: int) -> None:
        """Raises WeightsError unless ids and rows match and the end token has the largest id, as `ClipText` expects."""
        _check_size(self.folder, self.largest + 1, vocab_size, exactly=True)
        if self.end != self.largest:
            raise WeightsError(
                f"{self.folder}: the end token has id {self.end}, it must be the largest, {self.largest}"
            )


class T5Tokenizer:
    """Applies T5's SentencePiece unigram model.

    Raises:
      WeightsError: the folder has no readable spiece.model (on construction).
    """

    end, pad = T5_EOS, T5_PAD

    def __init__(self, folder: Path):
        import sentencepiece

        self.folder, path = Path(folder), Path(folder) / SPIECE
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from None
        ids = self._pieces.pad_id(), self._pieces.eos_id()
        if ids != (T5_PAD, T5_EOS):
            raise WeightsError(f"{path}: padding and end have ids {ids}, T5's have {(T5_PAD, T5_EOS)}")

    @property
    def size(self) -> int:
        """Returns the number of pieces."""
        return self._pieces.vocab_size()

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the ids of captions at their true length, with the end; U+0085 is a space, as for transformers."""
        encoded = self._pieces.encode([caption.replace("\x85", " ") for caption in captions])
        return [[*ids, T5_EOS] for ids in encoded]

    def encode(self, captions: Sequence[str], length: int) -> Tokens:
        """Encodes captions."""
        return _fit_all(self.rows(captions), length, T5_EOS, T5_PAD)

    def check_fits(self, vocab_size: int) -> None:
        """Raises WeightsError if a piece has no row. T5's embeddings have more rows than pieces."""
        _check_size(self.folder, self._pieces.vocab_size(), vocab_size, exactly=False)


def _import(package: str) -> Any:
    try:
        module = __import__(package)
    except ImportError:
        raise UserError(f"CLIP's tokenizer needs the package {package}: pip install -e '.[pretrained]'") from None
    for submodule in ("models", "normalizers", "pre_tokenizers") if package == "tokenizers" else ():
        importlib.import_module(f"{package}.{submodule}")  # makes the submodule an attribute
    return module


def _clean(caption: str, fix_text: Any) -> str:
    """Returns a caption cleaned like in OpenCLIP."""
    return " ".join(html.unescape(html.unescape(fix_text(caption))).split()).lower()


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the ids of tokens and the merges in order, from either of the two file formats."""
    pairs: list[tuple[Any, ...]]
    if (folder / VOCABULARY).exists():
        vocabulary = read_json(folder / VOCABULARY)
        try:
            lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder / MERGES} cannot be read: {error}") from None
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    else:
        if not (folder / BOTH).exists():
            raise WeightsError(f"{folder} has neither {VOCABULARY} and {MERGES} nor {BOTH}")
        model = read_json(folder / BOTH).get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type", "BPE") != "BPE":
            raise WeightsError(
                f"{folder / BOTH} is no CLIP's: its type is {model['type']}. T5's tokenizer is read from {SPIECE}: "
                "copy it from where the weights are from, as transformers 5 does not write it"
            )
        vocabulary = model.get("vocab") or {}
        merges = model.get("merges") or []
        pairs = [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m) if isinstance(m, list) else (m,) for m in merges
        ]
    if not vocabulary or not isinstance(vocabulary, dict) or not _are_ids(vocabulary.values()):
        raise WeightsError(f"{folder}: the vocabulary must be an object from tokens to ids, each of another token")
    strange = [pair for pair in pairs if not _is_merge(pair, vocabulary)]
    if strange:
        raise WeightsError(f"{folder}: merges that are no pairs of the vocabulary: {strange[:5]}")
    _check_whole(folder, vocabulary, pairs)
    return vocabulary, [(pair[0], pair[1]) for pair in pairs]


def _are_ids(values: Iterable[Any]) -> bool:
    ids = list(values)
    return all(type(one) is int and 0 <= one < 2**31 for one in ids) and len(set(ids)) == len(ids)


def _is_merge(pair: Any, vocabulary: Mapping[str, int]) -> bool:
    return len(pair) == 2 and all(isinstance(part, str) for part in pair) and "".join(pair) in vocabulary


def _check_whole(folder: Path, vocabulary: Iterable[str], pairs: Iterable[Sequence[str]]) -> None:
    """Raises WeightsError if merges are missing: captions would be cut into smaller pieces, which CLIP has not seen."""
    made = {"".join(pair) for pair in pairs}
    left = [
        token
        for token in vocabulary
        if token not in made and len(token.removesuffix("</w>")) > 1 and not token.startswith("<|")
    ]
    if left:
        raise WeightsError(
            f"{folder}: no merge makes {len(left)} tokens of the vocabulary, such as {', '.join(left[:5])}: the merges "
            "are not whole"
        )


def _special_tokens(folder: Path) -> dict[str, str]:
    """Returns the tokens for start, end and padding."""
    special = dict(SPECIAL)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second overrides the first
        values = read_json(folder / name) if (folder / name).exists() else {}
        for key in special:
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            special[key] = token if isinstance(token, str) else special[key]
    return special


def fit(tokens: Sequence[int] | np.ndarray, length: int, end: int, pad: int) -> Int[np.ndarray, " L"]:
    """Returns tokens that finish with `end` as int32[length]: filled with `pad`, or cut with the end kept."""
    row = np.full(length, pad, np.int32)
    kept = tokens if len(tokens) <= length else [*tokens[: length - 1], end]
    row[: len(kept)] = kept
    return row


def _fit_all(rows: Iterable[Sequence[int]], length: int, end: int, pad: int) -> Tokens:
    rows = list(rows)
    ids = np.array([fit(row, length, end, pad) for row in rows], np.int32).reshape(len(rows), length)
    return Tokens(ids, np.array([min(len(row), length) for row in rows], np.int32))


def _check_size(folder: Path, size: int, vocab_size: int, exactly: bool) -> None:
    if size > vocab_size or (exactly and size != vocab_size):
        raise WeightsError(f"{folder}: the tokenizer has {size} tokens, the text encoder's embedding {vocab_size} rows")
