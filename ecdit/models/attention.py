"""Self-attention with grouped queries and 2D RoPE, and cross-attention to the text.

Axes: B batch, N tokens, L text tokens, H heads, K key-value heads, k head width, d width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ecdit.models.embeddings import rotate
from ecdit.models.layers import Initializer, matrix, named, param, rms_norm, xavier, zeros
from ecdit.partitioning import constrain

ones = jax.nn.initializers.ones


class SelfAttention(nnx.Module):
    """Grouped-query attention; queries and keys are RMS-normed, then rotated; scale 1 / sqrt(k)."""

    def __init__(self, width: int, heads: int, kv_heads: int, rngs: nnx.Rngs):
        head_dim = width // heads
        self.query = matrix(rngs, (width,), (heads, head_dim), ("embed", "heads", "kv"))
        self.key = matrix(rngs, (width,), (kv_heads, head_dim), ("embed", "kv_heads", "kv"))
        self.value = matrix(rngs, (width,), (kv_heads, head_dim), ("embed", "kv_heads", "kv"))
        self.query_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.key_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.out = matrix(rngs, (heads, head_dim), (width,), ("heads", "kv", "embed"))

    def __call__(self, x: Float[Array, "B N d"], angles: Float[Array, "B N k/2"]) -> Float[Array, "B N d"]:
        """Attends within each image; `angles` are the tokens' positions (see embeddings.rope_angles)."""
        query = rotate(rms_norm(_project(x, self.query, "heads"), self.query_scale[...]), angles)
        key = rotate(rms_norm(_project(x, self.key, "kv_heads"), self.key_scale[...]), angles)
        attended = jax.nn.dot_product_attention(query, key, _project(x, self.value, "kv_heads"))
        attended = named(attended, "attention_out")
        return _merge(attended, self.out)


class CrossAttention(nnx.Module):
    """Attention of image tokens to text states, all heads; its output is zero at the start (arXiv 2310.00426)."""

    def __init__(self, width: int, text_width: int, heads: int, rngs: nnx.Rngs, out_init: Initializer = zeros):
        head_dim = width // heads
        self.query = matrix(rngs, (width,), (heads, head_dim), ("embed", "heads", "kv"))
        self.key = matrix(rngs, (text_width,), (heads, head_dim), ("embed", "heads", "kv"))
        self.value = matrix(rngs, (text_width,), (heads, head_dim), ("embed", "heads", "kv"))
        self.query_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.key_scale = param(rngs, ones, (head_dim,), ("norm",))
        self.out = matrix(rngs, (heads, head_dim), (width,), ("heads", "kv", "embed"), out_init)

    def __call__(
        self, x: Float[Array, "B N d"], states: Float[Array, "B L t"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B N d"]:
        """Attends to the states whose `mask` is True: one a row at least, or the row gets the padding's mean."""
        query = rms_norm(_project(x, self.query, "heads"), self.query_scale[...])
        key = rms_norm(_project(states, self.key, "heads"), self.key_scale[...])
        value = _project(states, self.value, "heads")
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return _merge(named(attended, "attention_out"), self.out)


class CausalAttention(nnx.Module):
    """A text tower's attention: with biases, no norm, every token sees itself and those before it."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        head_dim = width // heads
        for name in ("query", "key", "value"):
            setattr(self, name, matrix(rngs, (width,), (heads, head_dim), ("embed", "heads", "kv"), xavier))
            setattr(self, f"{name}_bias", param(rngs, zeros, (heads, head_dim), ("heads", "kv")))
        self.out = matrix(rngs, (heads, head_dim), (width,), ("heads", "kv", "embed"))
        self.out_bias = param(rngs, zeros, (width,), ("embed",))

    def __call__(self, x: Float[Array, "B L d"]) -> Float[Array, "B L d"]:
        """Attends to earlier tokens and the token itself."""
        query, key, value = (
            _project(x, getattr(self, name), "heads") + getattr(self, f"{name}_bias")[...].astype(x.dtype)[None, None]
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return _merge(attended, self.out) + self.out_bias[...].astype(x.dtype)[None, None]


def _project(x: Float[Array, "B N d"], kernel: nnx.Param, heads: str) -> Float[Array, "B N H k"]:
    return constrain(jnp.einsum("bnd,dhk->bnhk", x, kernel[...].astype(x.dtype)), "batch", None, heads, None)


def _merge(attended: Float[Array, "B N H k"], kernel: nnx.Param) -> Float[Array, "B N d"]:
    return constrain(jnp.einsum("bnhk,hkd->bnd", attended, kernel[...].astype(attended.dtype)), "batch", None, None)
