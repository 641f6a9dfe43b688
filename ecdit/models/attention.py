"""Computes self-attention with grouped queries and 2D RoPE, and cross-attention to the text.

This is the plain reference. Config fields replace two parts of it by functions of `ecdit.tuned` that are equal up to
rounding: `ATTENTIONS` lists forms of the attention between projections, and `PROJECTIONS` forms of the products around
it. All of them hold heads as [B, H, k, N], with tokens last. Kernels hold their heads joined in one axis.

Axes: B batch, N tokens, M tokens attended to, L text tokens, H heads, K key-value heads, k head width, pairs k / 2, d
width, f joined heads.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ecdit.functions import NORM_EPSILON, named, rotate
from ecdit.models.layers import param, xavier, zeros
from ecdit.models.packing import Chunks
from ecdit.partitioning import constrain
from ecdit.tuned import projections as tuned
from ecdit.tuned.cudnn_attention import cudnn_attention
from ecdit.tuned.fused_attention import fused_attention
from ecdit.tuned.packed_attention import packed_attention

Kind = Literal["plain", "fused", "cudnn"]  # keys of ATTENTIONS
Projections = Literal["plain", "tokens_last"]  # keys of PROJECTIONS

ones = jax.nn.initializers.ones


class SelfAttention(nnx.Module):
    """Grouped-query attention; queries and keys are RMS-normed, then rotated; scale 1 / sqrt(k)."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        rngs: nnx.Rngs,
        kind: Kind = "plain",
        projections: Projections = "plain",
    ):
        self.heads, self.kv_heads = heads, kv_heads
        self.kind: Kind = kind
        self.projections: Projections = projections
        head_dim = width // heads
        self.query = param(rngs, xavier, (width, width), ("embed", "joined_kv"))
        self.key = param(rngs, xavier, (width, kv_heads * head_dim), ("embed", "joined_kv"))
        self.value = param(rngs, xavier, (width, kv_heads * head_dim), ("embed", "joined_kv"))
        self.query_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.key_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.out = param(rngs, xavier, (width, width), ("joined_kv", "embed"))

    def __call__(self, x: Float[Array, "B N d"], angles: Float[Array, "B N pairs"]) -> Float[Array, "B N d"]:
        """Attends within each image; `angles` encode the tokens' positions (see embeddings.rope_angles)."""
        norms = self.query_scale[...], self.key_scale[...]
        query = _project(x, self.query, self.heads, self.projections)
        key, value = (_project(x, kernel, self.kv_heads, self.projections) for kernel in (self.key, self.value))
        return _join(ATTENTIONS[self.kind](query, key, value, norms, angles), self.out, self.projections)


class CrossAttention(nnx.Module):
    """Attention of image tokens to text states with all heads. Its output starts at zero (arXiv 2310.00426)."""

    def __init__(
        self,
        width: int,
        text_width: int,
        heads: int,
        rngs: nnx.Rngs,
        kind: Kind = "plain",
        projections: Projections = "plain",
    ):
        self.heads = heads
        self.kind: Kind = kind
        self.projections: Projections = projections
        head_dim = width // heads
        self.query = param(rngs, xavier, (width, width), ("embed", "joined_kv"))
        self.key = param(rngs, xavier, (text_width, width), ("features", "embed"))
        self.value = param(rngs, xavier, (text_width, width), ("features", "embed"))
        self.query_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.key_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.out = param(rngs, zeros, (width, width), ("joined_kv", "embed"))

    def __call__(
        self, x: Float[Array, "B N d"], states: Float[Array, "B L t"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B N d"]:
        """Attends to the states whose `mask` is True. A row without any gets the mean of its padding."""
        norms = self.query_scale[...], self.key_scale[...]
        query = _project(x, self.query, self.heads, self.projections)
        key, value = (_project(states, kernel, self.heads, self.projections) for kernel in (self.key, self.value))
        attended = ATTENTIONS[self.kind](query, key, value, norms, None, mask[:, None, :])
        return _join(attended, self.out, self.projections)


class CausalAttention(nnx.Module):
    """A text tower's causal attention, with biases and without norms."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, projections: Projections = "plain"):
        self.heads = heads
        self.projections: Projections = projections
        for name in ("query", "key", "value"):
            setattr(self, name, param(rngs, xavier, (width, width), ("embed", "joined_kv")))
            setattr(self, f"{name}_bias", param(rngs, zeros, (width,), ("joined_kv",)))
        self.out = param(rngs, xavier, (width, width), ("joined_kv", "embed"))
        self.out_bias = param(rngs, zeros, (width,), ("embed",))

    def __call__(self, x: Float[Array, "B L d"], chunks: Chunks | None = None) -> Float[Array, "B L d"]:
        """Attends from each token to itself and to earlier tokens; `chunks` says where packed captions are."""
        query, key, value = (
            _project(x, getattr(self, name), self.heads, self.projections, getattr(self, f"{name}_bias"))
            for name in ("query", "key", "value")
        )
        if chunks is None:
            attended = attend(query, key, value, None, jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None])
        elif chunks.attention == "plain":
            attended = attend(query, chunks.reach(key, 3), chunks.reach(value, 3), None, chunks.mask)
        else:
            attended = packed_attention(query, key, value, chunks.positions)
        joined = _join(attended, self.out, self.projections)
        return joined + self.out_bias[...].astype(x.dtype)[None, None]


def normed_attention(
    query: Float[Array, "B H k N"],
    key: Float[Array, "B K k M"],
    value: Float[Array, "B K k M"],
    norms: tuple[Float[Array, " k"], Float[Array, " k"]],
    angles: Float[Array, "B N pairs"] | None = None,
    mask: Bool[Array, "B 1 M"] | None = None,
) -> Float[Array, "B H k N"]:
    """Applies RMSNorm to each head of queries and keys, rotates them if there are angles, and calls `attend`.

    Args:
      query: heads of the queries.
      key: heads of the keys; K divides H.
      value: heads of the values.
      norms: learned scales of queries and of keys.
      angles: rotations of queries and keys, which encode positions.
      mask: True where a token may be attended to.
    """
    scales = _inverse_rms(query), _inverse_rms(key)
    if angles is None:  # without a rotation between them, both scales apply to the key in one pass
        key = _scaled(_scaled(key, norms[1]), norms[0])
    else:
        query, key = rotate(_scaled(query, norms[0]), angles), rotate(_scaled(key, norms[1]), angles)
    return attend(query, key, value, scales, mask)


ATTENTIONS = {"plain": normed_attention, "fused": fused_attention, "cudnn": cudnn_attention}


def attend(
    query: Float[Array, "B H k N"],
    key: Float[Array, "B K k M"],
    value: Float[Array, "B K k M"],
    scales: tuple[Float[Array, "B H N"], Float[Array, "B K M"]] | None = None,
    mask: Bool[Array, "#B #N M"] | None = None,
) -> Float[Array, "B H k N"]:
    """Returns softmax(query key / sqrt(k)) value. Scores and softmax are float32.

    Query head h reads key head h // (H / K).

    Args:
      query: heads of the queries.
      key: heads of the keys; K divides H.
      value: heads of the values.
      scales: factors of each query and each key, float32. A norm's factor belongs here, because it costs nothing on
        scores, and a pass over the queries otherwise.
      mask: True where a token may attend.
    """
    (batch, heads, width, tokens), kv_heads = query.shape, key.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads)
    query = query.reshape(*grouped, width, tokens)
    scores = jnp.einsum("bxgkn,bxkm->bxgnm", query, key, preferred_element_type=jnp.float32) * width**-0.5
    if scales is not None:
        scores = scores * scales[0].reshape(*grouped, tokens)[..., None] * scales[1][:, :, None, None]
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bxgnm,bxkm->bxgkn", weights, value).reshape(batch, heads, width, tokens)


def to_heads(x: Float[Array, "B N d"], kernel: Float[Array, "d f"]) -> Float[Array, "B f N"]:
    """Returns x @ kernel with tokens last, by one product of all rows and a transpose."""
    batch, tokens, width = x.shape
    return (x.reshape(batch * tokens, width) @ kernel).reshape(batch, tokens, -1).swapaxes(1, 2)


def from_heads(heads: Float[Array, "B f N"], kernel: Float[Array, "f d"]) -> Float[Array, "B N d"]:
    """Returns the tokens' joined heads @ kernel."""
    batch, width, tokens = heads.shape
    rows = named(heads, "attention_out").swapaxes(1, 2).reshape(batch * tokens, width)
    return (rows @ kernel).reshape(batch, tokens, -1)


PROJECTIONS = {"plain": (to_heads, from_heads), "tokens_last": (tuned.to_heads, tuned.from_heads)}


def _project(
    x: Float[Array, "B N d"], kernel: nnx.Param, heads: int, projections: Projections, bias: nnx.Param | None = None
) -> Float[Array, "B H k N"]:
    to_heads, _ = PROJECTIONS[projections]
    joined = to_heads(x, kernel[...].astype(x.dtype))
    if bias is not None:
        joined = joined + bias[...].astype(x.dtype)[None, :, None]
    return constrain(joined.reshape(x.shape[0], heads, -1, x.shape[1]), "batch", "heads", None, None)


def _join(attended: Float[Array, "B H k N"], kernel: nnx.Param, projections: Projections) -> Float[Array, "B N d"]:
    _, from_heads = PROJECTIONS[projections]
    joined = attended.reshape(attended.shape[0], -1, attended.shape[-1])
    return constrain(from_heads(joined, kernel[...].astype(attended.dtype)), "batch", None, None)


def _inverse_rms(x: Float[Array, "B H k N"], epsilon: float = NORM_EPSILON) -> Float[Array, "B H N"]:
    """Returns the factor of an RMSNorm over each head, float32."""
    return jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(axis=2) + epsilon)


def _scaled(x: Float[Array, "B H k N"], scale: Float[Array, " k"]) -> Float[Array, "B H k N"]:
    """Multiplies by the learned scale of an RMSNorm."""
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)[None, None, :, None]).astype(x.dtype)
