"""The data sets: one function and one entry of `TASKS` each.

A function gets the config and a scratch directory, and gives the examples: by a seqio Task of it (source,
preprocessors, output features, vocabulary), or by Python alone. seqio imports TensorFlow, which training and sampling
must not: imports of it stay inside functions.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.data.tensorflow import preparing
from ecdit.data.text import EOS, VOCABULARY, load_vocabulary, train_vocabulary
from ecdit.encoders.autoencoder import StoredLatents

if TYPE_CHECKING:
    import seqio

_RANDOM_RECORDS = 1024
_VOCABULARY_CAPTIONS = 1_000_000  # more teach a vocabulary little and would have to fit in memory


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, how it is stored, and how training reads it."""

    task: str  # a key of TASKS
    directory: str = field(metadata=RESUME_OR_PHASE)  # where prepared data lives; this task in its subdirectory
    source: str = field(metadata=RESUME_OR_PHASE)  # where the pictures come from; '' is the task's own default
    image_size: int = field(metadata=PHASE)  # px, side of the square picture
    latent_channels: int  # of latents, a pixel for 8 x 8 px, that are stored in place of pictures; 0: pictures are
    caption_length: int  # tokens, EOS and padding included
    vocab_size: int  # pieces at most
    caption_dropout: float  # probability that a caption becomes the empty one
    flip_probability: float  # of a left-right flip
    crop_padding: int  # px of white around the picture before it is cropped back at random; 0 is off
    num_threads: int = field(metadata=RESUME)  # that read records; 0 reads in the training thread
    prefetch: int = field(metadata=RESUME)  # batches read ahead

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
        require(self.latent_channels >= 0, "latent_channels", self.latent_channels, "must be 0 or more")
        if self.latent_channels:
            for key in ("flip_probability", "crop_padding"):
                require(getattr(self, key) == 0, key, getattr(self, key), "must be 0: latents cannot be augmented")
            step = StoredLatents.downsampling
            require(self.image_size % step == 0, "image_size", self.image_size, f"must be a multiple of {step} px")


def stored_content(config: DataConfig) -> str:
    """What an example has beside its caption: image or latents."""
    return "latents" if config.latent_channels else "image"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set that is ready to be read once; its vocabulary is scratch/VOCABULARY.

    Examples have image uint8[image_size, image_size, 3] or latents float16[image_size / 8, image_size / 8, channels],
    tokens int32[any length, EOS at the end], tokens_pretokenized (the caption, bytes) and original_size int32[2]
    (height, width in px).
    """

    examples: Iterable[dict[str, Any]]
    attribution: str
    skipped: tuple[str, ...]  # 'name: reason' of every picture left out


def emoji(config: DataConfig, scratch: Path) -> Corpus:
    """Twemoji pictures with their CLDR names; `config.source` may name another directory of PNGs.

    Raises:
      DataError: no readable picture, a vocab_size that is too small, or a package that is missing.
    """
    with preparing():
        import seqio

        from ecdit.data import emoji as twemoji
    builder = twemoji.build(config.image_size, config.source, scratch / "tfds")
    source = seqio.TfdsDataSource(tfds_data_dir=str(builder.data_dir), splits=("train",), read_only=True)
    examples = _task(config, scratch, source).get_dataset(sequence_length=None, split="train", shuffle=False)
    return Corpus(examples.as_numpy_iterator(), twemoji.ATTRIBUTION, tuple(builder.skipped))


def random_latents(config: DataConfig, scratch: Path) -> Corpus:
    """Noise with captions of random words: to time and try a run of latents before there are any.

    Made without TensorFlow, so that the hosts of a pod can.
    """
    require(config.latent_channels > 0, "data.latent_channels", config.latent_channels, "must be above 0 for this task")
    side = config.image_size // StoredLatents.downsampling

    def examples() -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for _ in range(_RANDOM_RECORDS):
            words = random.integers(0, 26, (int(random.integers(1, 16)), 4))
            yield {
                "latents": random.normal(size=(side, side, config.latent_channels)).astype(np.float16),
                "caption": " ".join("".join(chr(ord("a") + letter) for letter in word) for word in words),
            }

    train_vocabulary((example["caption"] for example in examples()), config.vocab_size, scratch / VOCABULARY)
    encode = load_vocabulary(scratch).encode
    tokenized = (
        {
            "latents": example["latents"],
            "tokens": np.array([*encode(example["caption"]), EOS], np.int32),
            "tokens_pretokenized": example["caption"].encode(),
            "original_size": np.array([config.image_size] * 2, np.int32),
        }
        for example in examples()
    )
    return Corpus(tokenized, "random numbers", ())


TASKS: dict[str, Callable[[DataConfig, Path], Corpus]] = {"emoji": emoji, "random_latents": random_latents}
WITHOUT_TENSORFLOW = frozenset({"random_latents"})


def _task(config: DataConfig, scratch: Path, source: "seqio.DataSource") -> "seqio.Task":
    """The Task of a source with image or latents, caption and original_size; trains scratch/VOCABULARY."""
    import seqio
    import tensorflow as tf

    captions = (
        example["caption"].decode() for example in source.get_dataset("train", shuffle=False).as_numpy_iterator()
    )
    train_vocabulary(itertools.islice(captions, _VOCABULARY_CAPTIONS), config.vocab_size, scratch / VOCABULARY)
    vocabulary = seqio.SentencePieceVocabulary(str(scratch / VOCABULARY), extra_ids=0)
    content = stored_content(config)
    keys = {content: content, "tokens": "caption", "original_size": "original_size"}
    return seqio.Task(
        config.task,
        source=source,
        preprocessors=[
            lambda dataset: seqio.preprocessors.rekey(dataset, keys),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={
            content: seqio.ContinuousFeature(dtype=tf.float16 if content == "latents" else tf.uint8, rank=3),
            "tokens": seqio.Feature(vocabulary, add_eos=True),
            "original_size": seqio.ContinuousFeature(dtype=tf.int32, rank=1),
        },
    )
