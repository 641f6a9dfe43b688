"""Computes normed and rotated attention with cuDNN's kernel, which keeps scores out of a GPU's main memory.

Axes: B batch, H heads, K key-value heads, k head width, pairs k / 2, N tokens, M tokens attended to.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ecdit.functions import NORM_EPSILON, rotate
from ecdit.partitioning import AXIS_RULES


def cudnn_attention(
    query: Float[Array, "B H k N"],
    key: Float[Array, "B K k M"],
    value: Float[Array, "B K k M"],
    norms: tuple[Float[Array, " k"], Float[Array, " k"]],
    angles: Float[Array, "B N pairs"] | None = None,
    mask: Bool[Array, "B 1 M"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H k N"]:
    """Computes `attention.normed_attention`, with queries and keys rounded to their dtype after norm and rotation.

    The mask may hide only the end of a row, like the padding of a caption, because cuDNN takes lengths.
    `implementation` "xla" is the same call without the kernel; it needs no GPU and also takes float32.
    """
    query, key = (_normed(x, scale) for x, scale in zip((query, key), norms, strict=True))
    if angles is not None:
        query, key = rotate(query, angles), rotate(key, angles)
    lengths = None if mask is None else mask[:, 0].sum(axis=-1, dtype=jnp.int32)
    return _on_shards(functools.partial(_attend, implementation=implementation))(query, key, value, lengths)


def _attend(
    query: Array, key: Array, value: Array, lengths: Int[Array, " B"] | None, implementation: Literal["cudnn", "xla"]
) -> Array:
    """Calls the kernel, whose order of axes is [B, N, H, k]."""
    query, key, value = (jnp.transpose(x, (0, 3, 1, 2)) for x in (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation=implementation)
    return jnp.transpose(out, (0, 2, 3, 1))


def _on_shards(function: Callable[..., Array]) -> Callable[..., Any]:
    """Maps `function` over each device's images and heads, because the compiler cannot shard a custom kernel itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    heads, images = PartitionSpec(AXIS_RULES["batch"], AXIS_RULES["heads"]), PartitionSpec(AXIS_RULES["batch"])
    # JAX cannot infer over which mesh axes a kernel's results vary.
    return jax.shard_map(function, in_specs=(heads, heads, heads, images), out_specs=heads, check_vma=False)


def _normed(x: Float[Array, "B H k N"], scale: Float[Array, " k"]) -> Float[Array, "B H k N"]:
    """Applies RMSNorm over each head, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=2, keepdims=True) + NORM_EPSILON)
    return (y * scale.astype(jnp.float32)[None, None, :, None]).astype(x.dtype)
