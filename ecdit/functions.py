"""Defines functions without learned parameters that `models` and `tuned` share.

Axes: B batch, N tokens, f hidden width, k head width, pairs k / 2.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

NORM_EPSILON = 1e-6  # added to the variance in LayerNorms and RMSNorms


@jax.checkpoint  # the backward pass recomputes it from x instead of reading four saved intermediates
def gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Applies the tanh approximation of GELU (arXiv 1606.08415) as x sigmoid(2 u), which takes fewer operations."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * jax.nn.sigmoid(2 * u)


def exact_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Applies GELU by the error function, in float32. `jax.nn.gelu` takes erfc, which costs a TPU more."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def rotate(x: Float[Array, "B heads k N"], angles: Float[Array, "B N pairs"]) -> Float[Array, "B heads k N"]:
    """Rotates the pairs (x_i, x_{i + k/2}) by `angles` (RoFormer, arXiv 2104.09864), in float32."""
    angles = angles.swapaxes(1, 2)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=2)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=2).astype(x.dtype)


def named(x: Array, name: str) -> Array:
    """Marks an activation that a remat policy can save by name (see `models.layers.REMAT_POLICIES`)."""
    return checkpoint_name(x, name)
