"""The data sets: one function and one entry of `TASKS` each.

A function gets the config and a scratch directory, makes a seqio Task of it (source, preprocessors, output
features, vocabulary) and says what to remember about it. seqio imports TensorFlow, which training and sampling
must not: imports of it stay inside functions.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ecdit.config import require
from ecdit.data.text import VOCABULARY, train_vocabulary

if TYPE_CHECKING:
    import seqio

_VOCABULARY_CAPTIONS = 1_000_000  # more teach a vocabulary little and would have to fit in memory


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, how it is stored, and how training reads it."""

    task: str  # a key of TASKS
    directory: str  # where prepared data lives; this task in its subdirectory
    source: str  # where the pictures come from; '' is the task's own default
    image_size: int  # px, side of the stored square
    caption_length: int  # tokens, EOS and padding included
    vocab_size: int  # pieces at most
    caption_dropout: float  # probability that a caption becomes the empty one
    flip_probability: float  # of a left-right flip
    crop_padding: int  # px of white around the picture before it is cropped back at random; 0 is off
    num_threads: int  # that read records; 0 reads in the training thread
    prefetch: int  # batches read ahead

    def __post_init__(self):
        require(self.task in TASKS, "task", self.task, f"must be one of {', '.join(TASKS)}")
        require(self.directory != "", "directory", self.directory, "must be a directory")
        require(self.image_size >= 1, "image_size", self.image_size, "must be at least 1 px")
        require(self.caption_length >= 1, "caption_length", self.caption_length, "must have room for the EOS token")
        # 256 byte pieces, the three control pieces and the word mark.
        require(self.vocab_size >= 260, "vocab_size", self.vocab_size, "must be at least 260: bytes take 256")
        for key in ("caption_dropout", "flip_probability"):
            require(0.0 <= getattr(self, key) <= 1.0, key, getattr(self, key), "must be between 0 and 1")
        for key in ("crop_padding", "num_threads"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        require(self.prefetch >= 1, "prefetch", self.prefetch, "must be at least 1 batch")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set that is ready to be read once by its seqio Task, split `train`.

    Examples have image uint8[image_size, image_size, 3], tokens int32[any length, EOS at the end],
    tokens_pretokenized (the caption, bytes) and original_size int32[2] (height, width in px).
    """

    task: "seqio.Task"
    attribution: str
    skipped: tuple[str, ...]  # 'name: reason' of every picture left out


def emoji(config: DataConfig, scratch: Path) -> Corpus:
    """Twemoji pictures with their CLDR names; `config.source` may name another directory of PNGs.

    Raises:
      DataError: no readable picture, or a vocab_size that is too small.
    """
    import seqio

    from ecdit.data import emoji as twemoji

    builder = twemoji.build(config.image_size, config.source, scratch / "tfds")
    source = seqio.TfdsDataSource(tfds_data_dir=str(builder.data_dir), splits=("train",), read_only=True)
    return Corpus(_task(config, scratch, source), twemoji.ATTRIBUTION, tuple(builder.skipped))


TASKS: dict[str, Callable[[DataConfig, Path], Corpus]] = {"emoji": emoji}


def _task(config: DataConfig, scratch: Path, source: "seqio.DataSource") -> "seqio.Task":
    """The Task of a source with image, caption and original_size; trains its vocabulary at scratch/VOCABULARY."""
    import seqio
    import tensorflow as tf

    captions = (
        example["caption"].decode() for example in source.get_dataset("train", shuffle=False).as_numpy_iterator()
    )
    train_vocabulary(itertools.islice(captions, _VOCABULARY_CAPTIONS), config.vocab_size, scratch / VOCABULARY)
    vocabulary = seqio.SentencePieceVocabulary(str(scratch / VOCABULARY), extra_ids=0)
    keys = {"image": "image", "tokens": "caption", "original_size": "original_size"}
    return seqio.Task(
        config.task,
        source=source,
        preprocessors=[
            lambda dataset: seqio.preprocessors.rekey(dataset, keys),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "image": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
            "tokens": seqio.Feature(vocabulary, add_eos=True),
            "original_size": seqio.ContinuousFeature(dtype=tf.int32, rank=1),
        },
    )
