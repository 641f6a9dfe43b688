"""Turns captions into tokens with a SentencePiece vocabulary, which is trained on the data and stored beside it.

This module needs only the `sentencepiece` package, so that sampling never imports TensorFlow.
"""

import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecdit.data import DataError

if TYPE_CHECKING:
    import sentencepiece

PAD, EOS, UNKNOWN = 0, 1, 2


def train_vocabulary(captions: Iterable[str], vocab_size: int, path: Path, words: Sequence[str] = ()) -> None:
    """Trains a unigram vocabulary of at most `vocab_size` pieces, with byte fallback, and writes it to `path`.

    Each of `words` is a piece of its own.

    Raises:
      DataError: the captions have more distinct characters than `vocab_size` has room for.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Single letters are added, because the trainer would find none in captions made of `words` alone.
            sentence_iterator=itertools.chain(captions, sorted(set("".join(words)))),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            hard_vocab_limit=False,  # few captions may yield fewer pieces
            user_defined_symbols=[f"\u2581{word}" for word in words],  # the mark of a word's beginning
            num_threads=1,  # several threads would add in another order and yield other pieces
            minloglevel=2,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
        )
    except RuntimeError as error:
        raise DataError(f"no vocabulary of data.vocab_size = {vocab_size} pieces for these captions: {error}") from None
    path.write_bytes(model.getvalue())


def load_vocabulary(path: Path) -> "sentencepiece.SentencePieceProcessor":
    """Returns the vocabulary of a SentencePiece .model file, whose special tokens are PAD, EOS and UNKNOWN.

    Raises:
      DataError: the file is missing, cannot be read, or has other special tokens.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from None
    return read_vocabulary(data, path)


def read_vocabulary(data: bytes, path: Path | str) -> "sentencepiece.SentencePieceProcessor":
    """Returns the vocabulary in a SentencePiece file; `path` is for messages. Raises as `load_vocabulary`."""
    import sentencepiece

    try:
        vocabulary = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from None
    if (vocabulary.pad_id(), vocabulary.eos_id()) != (PAD, EOS):
        raise DataError(
            f"the tokenizer {path} pads with {vocabulary.pad_id()} and ends captions with {vocabulary.eos_id()}: "
            f"these must be {PAD} and {EOS}"
        )
    return vocabulary
