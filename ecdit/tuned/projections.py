"""Computes the projections around attention for TPUs, by products that write and read heads with tokens last.

The plain forms multiply rows and then transpose, which is a separate pass over the activations on a TPU.

Axes: B batch, N tokens, d width, f joined heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ecdit.functions import named
from ecdit.tuned.saved_product import saved_product


def to_heads(x: Float[Array, "B N d"], kernel: Float[Array, "d f"]) -> Float[Array, "B f N"]:
    """Computes `attention.to_heads` in one product."""
    return jnp.einsum("bnd,df->bfn", x, kernel)


def from_heads(heads: Float[Array, "B f N"], kernel: Float[Array, "f d"]) -> Float[Array, "B N d"]:
    """Computes `attention.from_heads` in one product; saves the attention's output as its kernel wrote it."""
    saved = named(heads, "attention_out")
    return saved_product(heads, saved, kernel, ("bfn,fd->bnd", "bnd,fd->bfn"), _kernel_gradient)


def _kernel_gradient(
    heads: Float[Array, "B f N"], gradient: Float[Array, "B N d"]
) -> tuple[Float[Array, "f d"], Float[Array, "B N d"]]:
    return jnp.einsum("bfn,bnd->fd", heads, gradient), gradient
