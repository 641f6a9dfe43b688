"""Autoencoders, and pixels as numbers: float32 in [-1, 1] of uint8 in 0..255. See `components.Autoencoder`."""

import dataclasses
from dataclasses import field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from ecdit.components import PartFlops
from ecdit.config import RESUME
from ecdit.encoders.vae_flops import vae_part


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The autoencoder of `autoencoder = "vae"`; others ignore it."""

    weights: str = field(metadata=RESUME)  # a folder of AutoencoderKL; it may move: its contents are compared
    # prepared: the column data.latents has what the encoder gives, by `ecdit.prepare --what=latents`; online: every
    # step encodes its images.
    encode: Literal["prepared", "online"]
    posterior: Literal["sample", "mode"]  # what training takes of the encoder's normal distribution: a draw or the mean
    dtype: Literal["float32", "bfloat16"]  # of parameters and activations


class IdentityAutoencoder(nnx.Module):
    """Latents are pixels: for images small enough to need no autoencoder."""

    downsampling = 1

    def __init__(self, latent_channels: int):
        del latent_channels  # always 3

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the image's own height, width and channels."""
        return image_size, image_size, 3

    def encode(self, images: Float[Array, "B H W 3"], keys: Key[Array, " B"]) -> Float[Array, "B H W 3"]:
        """Returns the images themselves."""
        del keys
        return images

    def decode(self, latents: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Returns the latents themselves."""
        return latents

    def flops(self, image_size: int) -> PartFlops:
        """Returns no work."""
        return PartFlops("vae", float(image_size**2), 0.0)


class StoredLatents(nnx.Module):
    """The data holds latents that some autoencoder has made: training never sees an image, and none can be decoded."""

    downsampling = 8  # of the autoencoders that text-to-image models use

    def __init__(self, latent_channels: int):
        self.latent_channels = latent_channels

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns height, width and channels of the latents of square images of `image_size` pixels."""
        side = image_size // self.downsampling
        return side, side, self.latent_channels

    def encode(self, content: Float[Array, "B h w k"], keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
        """Draws latents from their stored posteriors: mean and log variance, side by side in the last dimension."""
        mean, log_variance = jnp.split(content, 2, axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
        return mean + jnp.exp(0.5 * log_variance) * noise

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Raises NotImplementedError: the autoencoder is not here."""
        raise NotImplementedError("the data holds latents: there is no autoencoder to decode with")

    def flops(self, image_size: int) -> PartFlops:
        """Returns the work of the autoencoder that made the latents, which the paper's notes describe."""
        return vae_part(image_size)


AUTOENCODERS = {"identity": IdentityAutoencoder, "latents": StoredLatents}


def to_unit(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Maps 0..255 to [-1, 1], float32."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(images: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Maps [-1, 1] to 0..255, rounded and clipped."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
