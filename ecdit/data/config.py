"""Configures which data a run reads, how preparation stores it, and how training reads it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.data.filters import Filters
from ecdit.encoders.autoencoder import StoredLatents


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Says which images and captions preparation keeps, and how it stores images. Every field changes the records."""

    image_format: Literal["png", "webp", "jpeg"]  # format of stored images
    quality: int  # 1 to 100, for webp (lossless at 100) and jpeg; png ignores it
    background: Literal["", "white"]  # colour behind transparent images; "" rejects them
    max_pixels: int  # larger images are rejected as decompression bombs
    held_out: float  # share of the keys in the split `held_out`, which training never reads
    filters: Filters

    def __post_init__(self):
        require(1 <= self.quality <= 100, "quality", self.quality, "must be between 1 and 100")
        require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "must be at least 1")
        require(0.0 <= self.held_out < 1.0, "held_out", self.held_out, "must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Names the data, and says how it is stored and how training reads it."""

    module: str  # Python file that registers the task; "" for the tasks of ecdit/data/tasks.py
    task: str  # name of the seqio Task or Mixture
    directory: str = field(metadata=RESUME_OR_PHASE)  # holds prepared data, each task in a subdirectory
    image_size: int = field(metadata=PHASE)  # px, side of the square image
    prepare: PrepareConfig
    # Rates at which a row's caption is drawn from the named fields; the draw leaves out fields that a record lacks. The
    # field `captions` stands for `captions.0`, `captions.1` and so on, which are drawn equally often.
    captions: Mapping[str, Any] = field(metadata=PHASE)
    # A SentencePiece .model file; or the folder of a public text encoder's tokenizer, CLIP's or T5's; "" for one of
    # vocab_size pieces that is trained on the captions.
    tokenizer: str = field(metadata=RESUME)  # the same one at another place: its hash must stay
    second_tokenizer: str = field(metadata=RESUME)  # the folder of that of a second text encoder; "" for none
    vocab_size: int  # pieces at most; a folder's tokenizer has those of its encoder
    caption_length: int  # tokens, EOS and padding included
    latent_channels: int  # channels of stored latents (one position per 8 x 8 px); 0 reads images instead
    placeholder_ok: bool = field(metadata=RESUME)  # whether several hosts may train on random_latents
    latents: str  # <name> of the column latents-<name> that holds them; generated latents need none
    text_states: str  # <name> of the column text-<name> with states of captions, which batches have for tokens; or ""
    caption_dropout: float  # probability that the null caption replaces a caption
    flip_probability: float  # probability of a left-right flip
    crop_padding: int  # px of white added on each side before a random crop back to image_size; 0 is off
    num_threads: int = field(metadata=RESUME)  # threads that read records; 0 reads in the training thread
    prefetch: int = field(metadata=RESUME)  # batches read ahead

    def __post_init__(self):
        require(self.module == "" or self.module.endswith(".py"), "module", self.module, 'must be "" or a Python file')
        plain = self.task.replace("_", "").replace("-", "").isalnum() and self.task.isascii()
        require(plain, "task", self.task, "must be a name of ASCII letters, digits, _ and -: a directory is named so")
        require(self.directory != "", "directory", self.directory, "must be a directory")
        require(self.image_size >= 1, "image_size", self.image_size, "must be at least 1 px")
        rates = list(self.captions.values())
        numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) and rate >= 0 for rate in rates)
        required = "must map names of caption fields to rates of 0 or more, one of them above 0"
        require(bool(rates) and numbers and sum(rates) > 0, "captions", dict(self.captions), required)
        beside = bool(self.tokenizer_folders) or not self.second_tokenizer
        allowed = 'must be "" unless data.tokenizer is a folder too'
        require(beside, "second_tokenizer", self.second_tokenizer, allowed)
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

    @property
    def tokenizer_folders(self) -> tuple[str, ...]:
        """Returns the folders of public tokenizers, ordered as their text encoders; none for a SentencePiece file."""
        if not self.tokenizer or self.tokenizer.endswith(".model"):
            return ()
        return tuple(filter(None, (self.tokenizer, self.second_tokenizer)))


def field_group(field: str) -> str:
    """Returns the list that a stored caption field belongs to (`captions` for `captions.2`), or the field itself."""
    group, dot, number = field.rpartition(".")
    return group if dot and number.isdigit() else field


def rate_of(captions: Mapping[str, Any], field: str) -> str | None:
    """Returns the key of `captions` that a stored caption field belongs to, or None if it has no rate above 0."""
    return next((name for name in (field, field_group(field)) if captions.get(name)), None)
