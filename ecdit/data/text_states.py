"""The column of prepared text states: what public text encoders give of each caption, at its true length.

Axes: l tokens of a caption without padding, L with it, t width of the states, p width of the pooled state.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from ecdit.components import TextStates
from ecdit.data import DataError
from ecdit.data.programs import Program, compiled
from ecdit.data.record import Record, pack
from ecdit.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from ecdit.encoders.text_tower import TextConfig
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained.agreement import fingerprint_once
from ecdit.pretrained.text_encoders import load_text, make_text_encoder

TEXT = "text-"  # begins the name of a column of states
EMPTY = "empty_caption"  # the file beside the shards that has the states of the empty caption
_BATCH = 16  # captions of a device at a time
Stored = Literal["bfloat16", "int8"]


class TextRow(NamedTuple):
    """A caption's states, padded; the numbers are bfloat16."""

    states: Shaped[np.ndarray, "L t"]
    mask: Bool[np.ndarray, " L"]
    pooled: Shaped[np.ndarray, " p"]


@dataclasses.dataclass(frozen=True)
class TextColumn:
    """The column text-<name>: for every caption field its states, in bfloat16 or in int8 with a scale a token."""

    label: str  # data.text_states
    config: TextConfig
    tokenizer: Path
    length: int  # data.caption_length, at which captions are cut
    stored: Stored

    @property
    def name(self) -> str:
        """Returns the column's name."""
        return f"{TEXT}{self.label}"

    @property
    def made_by(self) -> str:
        """Returns the sha256 of all that the states depend on: the weights, the tokenizer and the settings."""
        config = self.config
        folders = [fingerprint_once(folder) for folder in config.folders]
        settings = [config.clip_states, config.clip_projection, config.dtype, self.length, self.stored]
        return hashlib.sha256(json.dumps([folders, tokenizer_sha256(self.tokenizer), settings]).encode()).hexdigest()

    @property
    def process_bytes(self) -> int:
        """Returns the memory that each process takes on CPUs: its weights, and what XLA plans to compute a batch."""
        return _program(self.config, self.length).process_bytes

    def values(self, records: Iterable[Record]) -> Iterator[tuple[bytes, Mapping[str, int]]]:
        """Yields each record's states by caption field. Uses all devices of this process.

        Raises:
          DataError: states that are not finite.
        """
        rest, tokenizer = iter(records), load_tokenizer(self.tokenizer)
        while batch := list(itertools.islice(rest, _BATCH * jax.local_device_count())):
            captions = [text for record in batch for text in record.captions.values()]
            encoded = self._encoded(captions, tokenizer)
            for record in batch:
                yield pack({field: next(encoded) for field in record.captions}), {}

    def constants(self) -> dict[str, bytes]:
        """Returns the file with the states of the empty caption, which training puts in a caption's place."""
        return {EMPTY: pack(next(self._encoded([""], load_tokenizer(self.tokenizer))))}

    def _encoded(self, captions: list[str], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
        """Yields captions as they are stored."""
        size, encode = _BATCH * jax.local_device_count(), _encoder(self.config, self.length)
        for start in range(0, len(captions), size):
            some = captions[start : start + size]
            filled = [*some, *[""] * (size - len(some))]  # one shape, so one compilation
            text = encode(tokenizer.tokenize(filled, self.length))
            for states, mask, pooled, caption in zip(*text, some, strict=False):
                if not (np.isfinite(states).all() and np.isfinite(pooled).all()):
                    raise DataError(f"{caption!r}: its states are not finite as {self.config.weights} encodes it")
                yield store(states, mask, pooled, len(tokenizer.parts), self.stored)


def store(
    states: Float[np.ndarray, "L t"],
    mask: Bool[np.ndarray, " L"],
    pooled: Float[np.ndarray, " p"],
    parts: int,
    stored: Stored,
) -> dict[str, Any]:
    """Returns a caption's float32 states without padding, as a column keeps them; `parts` encoders share the length."""
    kept = states[mask]
    lengths = mask.reshape(parts, -1).sum(axis=1).astype(np.int32)
    row = {"lengths": lengths, "pooled": pooled.astype(ml_dtypes.bfloat16)}
    if stored == "bfloat16":
        return row | {"states": kept.astype(ml_dtypes.bfloat16)}
    scale = np.maximum(np.abs(kept).max(axis=1), 1e-30).astype(np.float32) / np.float32(127)
    return row | {"states": np.rint(kept / scale[:, None]).astype(np.int8), "scale": scale}


def restore(row: Mapping[str, Any], length: int) -> TextRow:
    """Returns what `store` kept, padded to `length` tokens for each encoder."""
    kept = row["states"]
    if "scale" in row:
        kept = (kept.astype(np.float32) * row["scale"][:, None]).astype(ml_dtypes.bfloat16)
    mask = (np.arange(length)[None] < row["lengths"][:, None]).reshape(-1)
    states = np.zeros((mask.size, kept.shape[1]), ml_dtypes.bfloat16)
    states[mask] = kept
    return TextRow(states, mask, row["pooled"])


@functools.lru_cache(maxsize=1)
def _program(config: TextConfig, length: int) -> Program:
    """Returns the compiled function from a batch of tokens to states, mask and pooled states. Reads no weights."""
    with nnx.use_eager_sharding(False):
        made = nnx.eval_shape(lambda: make_text_encoder(config, length, nnx.Rngs(0)))
        graphdef, abstract = nnx.split(made, nnx.Param)

    def states(params: dict, tokens: Int[Array, "B L"]) -> TextStates:
        return nnx.merge(graphdef, nnx.State(params))(tokens)

    rows = _BATCH * jax.local_device_count(), length * len(config.folders)
    mesh = make_mesh(MeshConfig(1, 1, -1, 1, 1), jax.local_devices())
    return compiled(states, abstract, jax.ShapeDtypeStruct(rows, jnp.int32), mesh)


@functools.lru_cache(maxsize=1)
def _encoder(config: TextConfig, length: int) -> Callable[[Int[np.ndarray, "B L"]], tuple[np.ndarray, ...]]:
    """Returns that function with the weights on the devices, which share them; states are float32."""
    program = _program(config, length)
    params = load_text(config, program.abstract, program.mesh)

    def run(tokens: Int[np.ndarray, "B L"]) -> tuple[np.ndarray, ...]:
        found = jax.device_get(program.run(params, tokens))
        return found.states.astype(np.float32), np.asarray(found.mask), found.pooled.astype(np.float32)

    return run
