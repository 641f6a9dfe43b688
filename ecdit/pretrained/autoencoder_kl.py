"""Implements the autoencoder of latent diffusion (arXiv 2112.10752), with the weights of SD, SDXL, SD3 and Flux.

Modules have the names of diffusers' AutoencoderKL. Axes: B batch, H W pixels, h w c a latent's height, width, channels.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ecdit.components import PartFlops
from ecdit.config import require
from ecdit.encoders.vae_flops import VaeSizes, vae_part
from ecdit.pretrained.config_json import read_config
from ecdit.pretrained.layers import Conv, Dtype, GroupNorm, Linear, attention
from ecdit.pretrained.layout import Layout

EPSILON = 1e-6
LOG_VARIANCES = (-30.0, 20.0)  # log variances are clipped to this range
# Defaults of diffusers' AutoencoderKL.
DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder, and the scaling of its latents."""

    widths: tuple[int, ...]  # channels of the levels, from the full resolution down
    resnets: int  # per level of the encoder; the decoder has one more
    latent_channels: int  # c
    norm_groups: int
    quant_convs: bool  # SD and SDXL: a 1x1 convolution after the encoder and one before the decoder
    shift: float  # latents are (z - shift) scale
    scale: float
    posterior: Literal[
        "sample", "mode"
    ]  # whether `encode` draws from the encoder's normal distribution or returns its mean
    dtype: Dtype

    @property
    def downsampling(self) -> int:
        """Returns the number of pixels along a side for each latent pixel."""
        return 2 ** (len(self.widths) - 1)

    def __post_init__(self):
        for width in self.widths:
            allowed = f"must be multiples of norm_groups, {self.norm_groups}"
            require(width % self.norm_groups == 0, "widths", self.widths, allowed)


def read_autoencoder(folder: Path, posterior: Literal["sample", "mode"], dtype: Dtype) -> AutoencoderConfig:
    """Returns the config in a folder of diffusers' AutoencoderKL.

    Raises:
      WeightsError: the config cannot be read, or is for another architecture.
    """
    config = read_config(folder, ("AutoencoderKL",), "_class_name", DEFAULTS)
    widths = config.numbers("block_out_channels")
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        config.choose(key, [[block] * len(widths)])
    for key in ("in_channels", "out_channels"):
        config.choose(key, (3,))
    config.choose("act_fn", ("silu", "swish"))
    config.choose("mid_block_add_attention", (True,))
    for key in ("latents_mean", "latents_std"):
        config.choose(key, (None,))
    quant_convs = config.choose("use_quant_conv", (True, False))
    config.choose("use_post_quant_conv", (quant_convs,))
    shifted = config.values["shift_factor"] is not None
    return config.make(
        AutoencoderConfig,
        widths=widths,
        resnets=config.number("layers_per_block"),
        latent_channels=config.number("latent_channels"),
        norm_groups=config.number("norm_num_groups"),
        quant_convs=quant_convs,
        shift=config.number("shift_factor", float, float("-inf")) if shifted else 0.0,
        scale=config.number("scaling_factor", float, 1e-6),
        posterior=posterior,
        dtype=dtype,
    )


class Resnet(nnx.Module):
    """Two normalized convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, config: AutoencoderConfig, rngs: nnx.Rngs):
        groups, dtype = config.norm_groups, config.dtype
        self.norm1 = GroupNorm(inputs, groups, EPSILON, rngs, dtype)
        self.conv1 = Conv(inputs, outputs, 3, rngs, dtype, padding=1)
        self.norm2 = GroupNorm(outputs, groups, EPSILON, rngs, dtype)
        self.conv2 = Conv(outputs, outputs, 3, rngs, dtype, padding=1)
        self.conv_shortcut = Conv(inputs, outputs, 1, rngs, dtype) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        """Returns the block's output."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nnx.Module):
    """Single-head attention between all pixels."""

    def __init__(self, width: int, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, config.norm_groups, EPSILON, rngs, config.dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(width, width, ("features", "features"), rngs, config.dtype) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w i"]:
        """Returns the input plus the attention's output."""
        batch, height, width, channels = x.shape
        pixels = self.group_norm(x).reshape(batch, height * width, channels)
        query, key, value = (project(pixels)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(attention(query, key, value, None, scale=channels**-0.5)).reshape(x.shape)


class Middle(nnx.Module):
    """A resnet, attention and a resnet at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.resnets = nnx.List([Resnet(width, width, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(width, config, rngs)])

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w i"]:
        """Returns the blocks' output."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nnx.Module):
    """A level of the encoder. All levels but the last halve the resolution."""

    def __init__(self, inputs: int, outputs: int, halve: bool, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * (config.resnets - 1)
        self.resnets = nnx.List([Resnet(width, outputs, config, rngs) for width in widths])
        # As in diffusers, the padding is below and to the right only.
        halving = Conv(outputs, outputs, 3, rngs, config.dtype, stride=2, padding=((0, 1), (0, 1))) if halve else None
        self.downsampler = halving

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the level's output."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsampler is None else self.downsampler(x)


class Up(nnx.Module):
    """A level of the decoder. All levels but the last double the resolution."""

    def __init__(self, inputs: int, outputs: int, double: bool, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * config.resnets
        self.resnets = nnx.List([Resnet(width, outputs, config, rngs) for width in widths])
        self.upsampler = Conv(outputs, outputs, 3, rngs, config.dtype, padding=1) if double else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the level's output."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsampler is None:
            return x
        return self.upsampler(x.repeat(2, axis=1).repeat(2, axis=2))


class Encoder(nnx.Module):
    """Maps images to the mean and log variance of latents."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths, dtype = config.widths, config.dtype
        self.conv_in = Conv(3, widths[0], 3, rngs, dtype, padding=1)
        self.down_blocks = nnx.List(
            [
                Down(widths[max(level - 1, 0)], width, level < len(widths) - 1, config, rngs)
                for level, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(config, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, EPSILON, rngs, dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs, dtype, padding=1)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2*c"]:
        """Returns mean and log variance, joined along the channels."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Maps latents to images."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths, dtype = config.widths[::-1], config.dtype
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs, dtype, padding=1)
        self.mid_block = Middle(config, rngs)
        self.up_blocks = nnx.List(
            [
                Up(widths[max(level - 1, 0)], width, level < len(widths) - 1, config, rngs)
                for level, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, EPSILON, rngs, dtype)
        self.conv_out = Conv(widths[-1], 3, 3, rngs, dtype, padding=1)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Returns the images."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Maps images to latents and back, a `components.Autoencoder`. Its results are float32."""

    Config = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.downsampling = config.downsampling
        self.encoder, self.decoder = Encoder(config, rngs), Decoder(config, rngs)
        channels = config.latent_channels
        quant_convs = config.quant_convs
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs, config.dtype) if quant_convs else None
        self.post_quant_conv = Conv(channels, channels, 1, rngs, config.dtype) if quant_convs else None

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns height, width and channels of the latents of square images of `image_size` pixels."""
        side = image_size // self.downsampling
        return side, side, self.config.latent_channels

    @jax.named_scope("vae_encoder")
    def moments(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Returns mean and log variance of the latents, neither shifted nor scaled."""
        y = self.encoder(images.astype(self.config.dtype))
        if self.quant_conv is not None:
            y = self.quant_conv(y)
        mean, log_variance = jnp.split(y.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCES)

    def latents(
        self, mean: Float[Array, "B h w c"], log_variance: Float[Array, "B h w c"], keys: Key[Array, " B"]
    ) -> Float[Array, "B h w c"]:
        """Returns scaled latents: drawn with each image's key, or the mean, according to `config.posterior`."""
        z = mean
        if self.config.posterior == "sample":
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
            z = mean + jnp.exp(0.5 * log_variance) * noise
        return (z - self.config.shift) * self.config.scale

    def encode(self, content: Float[Array, "B H W 3"], keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
        """Returns the latents of images (see `latents`)."""
        return self.latents(*self.moments(content), keys)

    def flops(self, image_size: int) -> PartFlops:
        """Returns the work of the encoder on one image."""
        config = self.config
        sizes = VaeSizes(config.widths, config.resnets, config.latent_channels, config.quant_convs)
        return vae_part(image_size, sizes)

    @jax.named_scope("vae_decoder")
    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Returns the images of latents."""
        z = (latents / self.config.scale + self.config.shift).astype(self.config.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


class PreparedLatents(AutoencoderKL):
    """The same with what its encoder has given at preparation in place of images."""

    def encode(self, content: Float[Array, "B h w k"], keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
        """Returns latents of stored means and log variances, side by side in the last dimension; see `latents`."""
        mean, log_variance = jnp.split(content, 2, axis=-1)
        return self.latents(mean, log_variance, keys)


AUTOENCODER_LAYOUT = Layout(
    names=(
        (r"\.(down|up)sampler\.", r".\1samplers.0.conv."),
        (r"\.to_out\.", ".to_out.0."),
    ),
    # Names before diffusers 0.18.
    renamed=(
        (r"\.query\.", ".to_q."),
        (r"\.key\.", ".to_k."),
        (r"\.value\.", ".to_v."),
        (r"\.proj_attn\.", ".to_out.0."),
    ),
    unused=(),
)
