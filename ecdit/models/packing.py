"""Packs captions, so that a frozen causal text encoder computes no padding.

The captions of a device stand end to end in a stream of tokens, which is cut into chunks. Each token attends to the
tokens of its own caption up to itself; they are in its own chunk and in the few before it that a caption can reach. No
array crosses from one device to another. The stream has a fixed number of tokens. A batch in which the captions of some
device do not fit is computed with padding, by a second program: no caption is cut.

Axes: B captions, L tokens of a padded caption, C chunks, c tokens of a chunk, M tokens of a chunk and those before it,
b captions and R chunks of a device, t width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ecdit.config import require
from ecdit.partitioning import BATCH_AXES, axis_size, on_each_shard

Attention = Literal["plain", "fused"]  # by the mask, or `tuned.packed_attention`

SCOPE = "packed_captions"  # by which a plan knows the choice between both programs
CHUNK = 128  # tokens of a chunk at most: a TPU's tile, of which shorter chunks waste a part


@dataclasses.dataclass(frozen=True)
class Packing:
    """Says how an encoder packs captions."""

    length: int  # room in a stream for each caption, on average; 0 pads every caption
    attention: Attention

    def check(self, length: int) -> None:
        """Raises ConfigError if captions of `length` tokens at most are too long for the attention."""
        allowed = f"must be 'plain': captions have up to {length} tokens, and a chunk of 'fused' has {CHUNK}"
        fits = self.attention == "plain" or self.length == 0 or length <= CHUNK
        require(fits, "text.packed_attention", self.attention, allowed)


PADDED = Packing(0, "plain")


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tells the layers of an encoder where packed captions stand."""

    tokens: Int[Array, "C c"]
    positions: Int[Array, "C c"]  # of each token in its caption
    mask: Bool[Array, "C c M"]  # True where a token attends
    devices: int  # parts of C that never meet
    before: int  # chunks before its own that a token may attend to
    attention: Attention

    def reach(self, x: Array, axis: int) -> Array:
        """Returns keys or values x [C, ..., c, ...] joined on `axis` with those of the chunks before: [C, ..., M, ...].

        In place of chunks before a device's first one there are zeros, which no token attends to.
        """
        parts = x.reshape(self.devices, -1, *x.shape[1:])
        joined = earlier(parts, self.before, 1, axis + 1)
        return joined.reshape(x.shape[0], *joined.shape[2:])


def earlier(x: Array, count: int, chunks: int, tokens: int, fill: int = 0) -> Array:
    """Returns x with the `count` chunks (axis `chunks`) before each one in front of it, on the axis `tokens`."""
    pad = [(count, 0) if axis == chunks else (0, 0) for axis in range(x.ndim)]
    padded, size = jnp.pad(x, pad, constant_values=fill), x.shape[chunks]
    shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=chunks) for i in range(count + 1)]
    return jnp.concatenate(shifted, axis=tokens)


def chunk_sizes(length: int) -> tuple[int, int]:
    """Returns the tokens of a chunk, and the chunks before its own that a caption of `length` tokens can reach."""
    chunk = min(CHUNK, length)
    return chunk, math.ceil((length - 1) / chunk)


def stream_tokens(packed_length: int, captions: int, length: int) -> int:
    """Returns the tokens of a device's stream for so many captions of `length` tokens at most: whole chunks."""
    chunk, _ = chunk_sizes(length)
    return math.ceil(captions * packed_length / chunk) * chunk


def mean_sizes(packing: Packing, length: int) -> tuple[int, int]:
    """Returns the tokens that an encoder computes for a caption on average, and the tokens that each attends to."""
    if not 0 < packing.length < length:
        return length, length
    chunk, before = chunk_sizes(length)
    return packing.length, chunk * (before + 1)


def encode_packed(
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    packing: Packing,
    padded: Callable[[Int[Array, "B L"]], Any],
    packed: Callable[[Chunks], Any],
) -> Any:
    """Returns the states of captions, arrays [B, L, ...]; those of padding are anything finite.

    Args:
      tokens: ids; padding comes last.
      lengths: tokens of each caption without padding, 1 or more.
      packing: how to pack them.
      padded: computes the states of `tokens`.
      packed: computes the states of chunks: arrays [C, c, ...].
    """
    (batch, length), devices = tokens.shape, math.prod(axis_size(axis) for axis in BATCH_AXES)
    chunk, before = chunk_sizes(length)
    room = stream_tokens(packing.length, batch // devices, length)
    if batch % devices or not 0 < room < batch // devices * length:
        return padded(tokens)

    def lay_out(tokens: Array, lengths: Array) -> tuple[Array, ...]:
        return _lay_out(tokens, lengths, room // chunk, chunk, before)

    ids, positions, mask, fits = on_each_shard(lay_out, (0, 0))(tokens, lengths)
    chunks = Chunks(ids, positions, mask, devices, before, packing.attention)

    def compute(tokens: Array) -> Any:
        states = packed(chunks)
        unpack = on_each_shard(lambda states, lengths: _unpack(states, lengths, length), (0, 0))
        return jax.tree.map(lambda x: unpack(x, lengths), states)

    with jax.named_scope(SCOPE):
        return jax.lax.cond(fits.all(), compute, padded, tokens)


def _lay_out(
    tokens: Int[Array, "b L"], lengths: Int[Array, " b"], rows: int, chunk: int, before: int
) -> tuple[Int[Array, "R c"], Int[Array, "R c"], Bool[Array, "R c M"], Bool[Array, " 1"]]:
    """Returns ids, positions and the mask of a device's chunks, and whether its captions fit into them."""
    ends = jnp.cumsum(lengths)
    place = jnp.arange(rows * chunk)
    caption = (ends[None] <= place[:, None]).sum(axis=1)  # b after the last caption
    used, known = caption < tokens.shape[0], jnp.minimum(caption, tokens.shape[0] - 1)
    position = jnp.where(used, place - (ends - lengths)[known], 0)
    ids = jnp.where(used, tokens[known, position], 0)
    ids, position, caption = (x.reshape(rows, chunk) for x in (ids, position, caption))
    of_keys, key_position = earlier(caption, before, 0, 1, fill=-1), earlier(position, before, 0, 1)
    mask = (caption[:, :, None] == of_keys[:, None]) & (key_position[:, None] <= position[:, :, None])
    return ids, position, mask, ends[-1:] <= rows * chunk


def _unpack(states: Array, lengths: Int[Array, " b"], length: int) -> Array:
    """Returns the states [b, L, ...] of a device's captions from those of its chunks; 0 for padding."""
    stream = states.reshape(-1, *states.shape[2:])
    place = (jnp.cumsum(lengths) - lengths)[:, None] + jnp.arange(length)[None]
    kept = jnp.arange(length)[None] < lengths[:, None]
    found = stream[jnp.minimum(place, stream.shape[0] - 1)]
    return jnp.where(kept.reshape(*kept.shape, *[1] * (found.ndim - 2)), found, jnp.zeros((), found.dtype))
