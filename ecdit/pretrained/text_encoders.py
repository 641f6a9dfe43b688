"""The text encoder that a config names: the tower that is drawn, or one or two public ones with their folders' weights.

Two encoders stand side by side: each reads the caption by its own tokenizer, so that a row of tokens has the ids of the
first and then those of the second. Their states follow each other in the same order, the narrower ones filled with
zeros to the width of the others; their pooled states are joined. Axes: B batch, L tokens, t text width, p pooled width.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from ecdit.components import Mode, PartFlops, TextEncoder, TextStates, TextWidths
from ecdit.config import require
from ecdit.encoders.text_tower import RANDOM, TextConfig, TextTower
from ecdit.models.packing import PADDED, Packing
from ecdit.pretrained.agreement import load_agreed
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, ClipTextConfig, read_clip_text
from ecdit.pretrained.config_json import CONFIG, ConfigJson, read_json
from ecdit.pretrained.layout import Layout
from ecdit.pretrained.t5_encoder import T5_LAYOUT, T5Config, T5Encoder, read_t5
from ecdit.pretrained.t5x_checkpoint import T5xCheckpoint, is_t5x

CLIP_TYPES, T5_TYPES = ("clip_text_model", "clip"), ("t5",)


@dataclasses.dataclass(frozen=True)
class PublicEncoder:
    """An encoder as its folder describes it."""

    folder: Path
    config: ClipTextConfig | T5Config
    packing: Packing  # as TextConfig's; PADDED for T5

    def make(self, max_length: int, rngs: nnx.Rngs) -> ClipText | T5Encoder:
        """Returns the module."""
        if isinstance(self.config, ClipTextConfig):
            return ClipText(self.config, max_length, rngs, self.packing)
        return T5Encoder(self.config, max_length, rngs)

    @property
    def layout(self) -> Layout:
        """Returns the names of its tensors."""
        return CLIP_TEXT_LAYOUT if isinstance(self.config, ClipTextConfig) else T5_LAYOUT


def read_encoders(config: TextConfig) -> tuple[PublicEncoder, ...]:
    """Returns the encoders in the config's folders; none if the tower is drawn. Reads no weights.

    Raises:
      ConfigError: a folder is not there, or its encoder cannot pack captions.
      WeightsError: it cannot be read, or is another architecture's.
    """
    return tuple(_read_encoder(folder, config) for folder in config.folders)


def _read_encoder(folder: Path, config: TextConfig) -> PublicEncoder:
    path = folder / CONFIG
    key = "text.weights" if str(folder) == str(Path(config.weights)) else "text.second_weights"
    allowed = f"there is no {path}: must be a folder of CLIP's or T5's weights, or \"{RANDOM}\""
    t5x = is_t5x(folder)
    require(path.is_file() or t5x, key, str(folder), allowed)
    kind = "t5" if t5x else ConfigJson(path, read_json(path), {}).choose("model_type", (*CLIP_TYPES, *T5_TYPES))
    if kind in T5_TYPES:
        room, allowed = config.packed_length, f"must be 0: {folder} is a T5, whose tokens attend both ways"
        require(room == 0, "text.packed_length", room, allowed)
        t5 = T5xCheckpoint(folder).config(config.dtype) if t5x else read_t5(folder, config.dtype)
        return PublicEncoder(folder, t5, PADDED)
    clip = read_clip_text(folder, config.clip_projection, config.clip_states, config.dtype)
    return PublicEncoder(folder, clip, config.packing)


class SideBySide(nnx.Module):
    """Two encoders as one; a `components.TextEncoder`. Half of a row of tokens is each one's."""

    def __init__(self, encoders: Sequence[PublicEncoder], max_length: int, rngs: nnx.Rngs):
        first, second = encoders
        self.first, self.second = first.make(max_length, rngs), second.make(max_length, rngs)

    @property
    def widths(self) -> TextWidths:
        """Returns the width of the wider states, and that of both pooled states together."""
        first, second = self.first.widths, self.second.widths
        return TextWidths(max(first.states, second.states), first.pooled + second.pooled)

    def __call__(self, tokens: Int[Array, "B L"], mode: Mode = "sample") -> TextStates:
        """Encodes captions: the first half of each row by the first encoder, the second half by the second."""
        both = [
            encoder(part, mode)
            for encoder, part in zip((self.first, self.second), jnp.split(tokens, 2, 1), strict=True)
        ]
        width = self.widths.states
        padded = [jnp.pad(text.states, ((0, 0), (0, 0), (0, width - text.states.shape[2]))) for text in both]
        return TextStates(
            jnp.concatenate(padded, axis=1),
            jnp.concatenate([text.mask for text in both], axis=1),
            jnp.concatenate([text.pooled for text in both], axis=1),
        )

    def check_layout(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ConfigError if the heads do not divide over the mesh."""
        self.first.check_layout(mesh)
        self.second.check_layout(mesh)

    def flops(self, length: int, mode: Mode = "sample") -> PartFlops:
        """Returns the work of both on one caption, which each has in `length` tokens."""
        first, second = self.first.flops(length, mode), self.second.flops(length, mode)
        return PartFlops("text_encoders", first.tokens + second.tokens, first.flops + second.flops)


def make_text_encoder(config: TextConfig, max_length: int, rngs: nnx.Rngs) -> TextEncoder:
    """Returns the config's text encoder; a public one has weights after `load_text`."""
    encoders = read_encoders(config)
    if not encoders:
        return TextTower(config, max_length, rngs)
    return encoders[0].make(max_length, rngs) if len(encoders) == 1 else SideBySide(encoders, max_length, rngs)


def load_text(config: TextConfig, abstract: nnx.State, mesh: Mesh | None) -> dict[str, Any]:
    """Reads the parameters of the config's public encoders, `abstract` ones of `make_text_encoder`: see `load_agreed`.

    Raises:
      WeightsError: the files are not the encoders'.
    """
    encoders = read_encoders(config)
    if len(encoders) == 1:
        return load_agreed(abstract, encoders[0].layout, encoders[0].folder, mesh)
    return {
        name: load_agreed(abstract[name], one.layout, one.folder, mesh)
        for name, one in zip(("first", "second"), encoders, strict=True)
    }
