"""Pictures to latents and back. Pixels are float32 in [-1, 1]; the uint8 they come from is 0..255.

A codec is a module with `channels` (None: any), `downsampling`, and, if it `has_pictures`,
`encode(pictures, key) -> latents` and `decode(latents) -> pictures`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8


class IdentityCodec(nnx.Module):
    """Latents are pixels: for pictures small enough to need no autoencoder."""

    channels = 3
    downsampling = 1
    has_pictures = True

    def encode(self, pictures: Float[Array, "B h w 3"], key: jax.Array) -> Float[Array, "B h w 3"]:
        """The pictures themselves; `key` is for codecs whose latents are drawn from a posterior."""
        del key
        return pictures

    def decode(self, latents: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
        """The latents themselves."""
        return latents


class LatentsOnly(nnx.Module):
    """The data holds latents that some autoencoder has made: training never sees a picture, and none can be drawn."""

    channels = None
    downsampling = 8  # of the autoencoders that text-to-image models use
    has_pictures = False


CODECS = {"identity": IdentityCodec, "latents": LatentsOnly}


def to_unit(pictures: UInt8[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """0..255 to [-1, 1], float32."""
    return pictures.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(pictures: Float[Array, "B h w 3"]) -> UInt8[Array, "B h w 3"]:
    """[-1, 1] to 0..255, rounded and clipped."""
    return jnp.clip(jnp.round((pictures + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
