"""Embeds positions and scalars as vectors. Axes: B batch, N tokens, M kept tokens, d width."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

SINUSOID_WIDTH = 256  # width of the sinusoids of times, sizes and crops


def sinusoid(x: Real[Array, " B"], width: int, max_period: float = 10_000.0) -> Float[Array, "B {width}"]:
    """Returns cosines, then sines, of x at width / 2 frequencies from 1 to about 1 / max_period.

    Source: DiT, arXiv 2212.09748.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = x.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_positions(grid: int, width: int) -> Float[Array, "{grid**2} {width}"]:
    """Returns sine-cosine embeddings of patches' positions (ViT): half of the width for rows, half for columns."""
    position = jnp.arange(grid * grid)
    return jnp.concatenate([sinusoid(position // grid, width // 2), sinusoid(position % grid, width // 2)], axis=-1)


def rope_angles(grid: int, head_dim: int, theta: float) -> Float[Array, "{grid**2} {head_dim//2}"]:
    """Returns angles of 2D rotary positions: the first half of the pairs turns with rows, the rest with columns."""
    pairs = head_dim // 4
    frequencies = theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    position = jnp.arange(grid * grid)
    row, column = (position // grid).astype(jnp.float32), (position % grid).astype(jnp.float32)
    return jnp.concatenate([row[:, None] * frequencies[None, :], column[:, None] * frequencies[None, :]], axis=-1)


def take_tokens(x: Float[Array, "B N d"], index: Int[Array, "B M"]) -> Float[Array, "B M d"]:
    """Returns the tokens at `index` of every image."""
    return jax.vmap(lambda tokens, kept: tokens[kept])(x, index)


def put_tokens(
    x: Float[Array, "B M d"], index: Int[Array, "B M"], into: Float[Array, "B N d"]
) -> Float[Array, "B N d"]:
    """Returns `into` with the tokens at `index` of every image replaced by those of x."""
    return jax.vmap(lambda base, kept, tokens: base.at[kept].set(tokens))(into, index, x)
