"""Generates data while it is read. Row r is a function of the seed and r, so nothing is stored and rows never end.

`GENERATED` lists the package's sources. A run may train on one alone or in a mixture. None needs TensorFlow.
"""

import dataclasses
import hashlib
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float16, Int, UInt8

from ecdit.config import require
from ecdit.data import shapes
from ecdit.data.config import DataConfig
from ecdit.data.shape_scenes import KINDS, KINDS_HELD_OUT, ShapesConfig
from ecdit.encoders.autoencoder import StoredLatents

Split = Literal["train", "held_out"]
Ground = Literal["plain", "textured"]


class Example(NamedTuple):
    """A row before augmentation."""

    content: UInt8[np.ndarray, "H W 3"] | Float16[np.ndarray, "h w 2c"]  # an image, or latents' mean and log variance
    captions: dict[str, str]  # by field
    original_size: Int[np.ndarray, "2"]  # height and width, px
    crop: Int[np.ndarray, "2"]  # top and left, px


class Generated(Protocol):
    """A source of endless rows."""

    @property
    def attribution(self) -> str:
        """Returns who made it, and under which licence."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """Returns all words of its captions if these are few, so that a trained tokenizer has a piece for each."""
        ...

    @property
    def placeholder(self) -> bool:
        """Returns True if the rows only take the place of data, so that training on them teaches nothing."""
        ...

    def example(self, config: DataConfig, split: Split, seed: int, row: int) -> Example:
        """Returns a row, the same on every host."""
        ...

    def captions(self, config: DataConfig, split: Split, seed: int, row: int) -> dict[str, str]:
        """Returns the captions of a row without drawing its image."""
        ...

    def fingerprint(self, config: DataConfig) -> str:
        """Returns a sha256 of everything that determines the rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Generates images of coloured shapes with captions that a judge can check (docs/shapes.md)."""

    ground: Ground
    attribution = "made by rule"
    words = shapes.VOCABULARY
    placeholder = False

    def example(self, config: DataConfig, split: Split, seed: int, row: int) -> Example:
        """Returns a row's image and caption."""
        made = shapes.example(self._config(config, split), seed, row)
        side = np.full(2, config.image_size, np.int32)
        return Example(made.image, {"caption": made.caption}, side, np.zeros(2, np.int32))

    def captions(self, config: DataConfig, split: Split, seed: int, row: int) -> dict[str, str]:
        """Returns a row's caption."""
        return {"caption": shapes.scene_and_caption(self._config(config, split), seed, row)[1]}

    def fingerprint(self, config: DataConfig) -> str:
        """Returns the fingerprint of the scenes, the captions and the pixels."""
        return shapes.fingerprint(self._config(config, "train"))

    def _config(self, config: DataConfig, split: Split) -> ShapesConfig:
        require(config.latent_channels == 0, "data.latent_channels", config.latent_channels, "shapes are images: 0")
        # Captions say left and right, which flips exchange. Padding would put white borders on textured grounds.
        for key in ("flip_probability", "crop_padding"):
            value = getattr(config, key)
            require(value == 0, f"data.{key}", value, "must be 0 with shapes, whose captions say where things are")
        kinds = KINDS if split == "train" else KINDS_HELD_OUT
        return ShapesConfig(config.image_size, self.ground, split, kinds)


@dataclasses.dataclass(frozen=True)
class RandomLatents:
    """Generates noise with captions of random words, to test and time runs on latents before any are stored."""

    attribution = "random numbers"
    words = ()
    placeholder = True

    def example(self, config: DataConfig, split: Split, seed: int, row: int) -> Example:
        """Returns a row's mean latents, with the smallest variance, and its caption."""
        side, random = self._side(config), self._random(split, seed, row)
        caption = self._caption(random)
        mean = random.standard_normal((side, side, config.latent_channels), np.float32)
        log_variance = np.full_like(mean, LOG_VARIANCES[0])
        moments = np.concatenate([mean, log_variance], axis=-1).astype(np.float16)
        size = np.full(2, config.image_size, np.int32)
        return Example(moments, {"caption": caption}, size, np.zeros(2, np.int32))

    def captions(self, config: DataConfig, split: Split, seed: int, row: int) -> dict[str, str]:
        """Returns a row's caption."""
        return {"caption": self._caption(self._random(split, seed, row))}

    def fingerprint(self, config: DataConfig) -> str:
        """Returns the fingerprint of the latents' shape and of the first row, which changes with NumPy's generators."""
        first = self.example(config, "train", 0, 0)
        text = f"{config.image_size} {config.latent_channels} {first.captions}"
        return hashlib.sha256(text.encode() + first.content.tobytes()).hexdigest()

    def _random(self, split: Split, seed: int, row: int) -> np.random.Generator:
        key, counter = np.array([seed, 32 + (split == "held_out")], np.uint64), np.array([0, row, 0, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _caption(self, random: np.random.Generator) -> str:
        words = random.integers(0, 26, (int(random.integers(1, 16)), 4))
        return " ".join("".join(chr(ord("a") + letter) for letter in word) for word in words)

    def _side(self, config: DataConfig) -> int:
        channels = config.latent_channels
        require(channels > 0, "data.latent_channels", channels, "must be above 0 for random_latents")
        return config.image_size // StoredLatents.downsampling


LOG_VARIANCES = (-30.0, 20.0)  # autoencoders clamp log variances to this range

GENERATED: dict[str, Generated] = {
    "random_latents": RandomLatents(),
    "shapes": Shapes("plain"),
    "shapes_textured": Shapes("textured"),
}
