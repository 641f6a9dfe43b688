"""Implements CLIP's image encoder (arXiv 2103.00020) for CLIP scores and CMMD.

Axes: B batch, p width of the projected features.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ecdit.config import require
from ecdit.models.layers import scan_stack, stack
from ecdit.pretrained.clip_text import ClipBlock
from ecdit.pretrained.config_json import read_config
from ecdit.pretrained.layers import ACTIVATIONS, Conv, Dtype, LayerNorm, Linear, param
from ecdit.pretrained.layout import Layout

# By channel, for images in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# Defaults of transformers' CLIPVisionConfig.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of an image encoder."""

    image_size: int  # pixels
    patch_size: int
    width: int  # d
    mlp_width: int
    layers: int
    heads: int
    projection_width: int
    activation: Literal["gelu", "quick_gelu"]
    epsilon: float  # added to variances in norms
    dtype: Dtype

    def __post_init__(self):
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide the width, {self.width}")

    @property
    def grid(self) -> int:
        """Returns the patches along a side. The encoder ignores pixels beyond the last whole patch."""
        return self.image_size // self.patch_size


def read_clip_vision(folder: Path, dtype: Dtype) -> ClipVisionConfig:
    """Returns the config in a folder of an image encoder or of a whole CLIP.

    Raises:
      WeightsError: the config cannot be read, or is for another architecture.
    """
    config = read_config(folder, ("clip_vision_model", "clip"), "model_type", DEFAULTS)
    whole = config.values["model_type"] == "clip"
    vision = config.group("vision_config", DEFAULTS) if whole else config
    vision.choose("num_channels", (3,))
    return config.make(
        ClipVisionConfig,
        image_size=vision.number("image_size"),
        patch_size=vision.number("patch_size"),
        width=vision.number("hidden_size"),
        mlp_width=vision.number("intermediate_size"),
        layers=vision.number("num_hidden_layers"),
        heads=vision.number("num_attention_heads"),
        projection_width=config.number("projection_dim"),
        activation=vision.choose("hidden_act", ACTIVATIONS),
        epsilon=vision.number("layer_norm_eps", float, 0),
        dtype=dtype,
    )


class ClipVision(nnx.Module):
    """Maps images to projected features."""

    Config = ClipVisionConfig

    def __init__(self, config: ClipVisionConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        self.class_embedding = param(rngs, (width,), ("embed",), dtype)
        self.patch_embedding = Conv(3, width, config.patch_size, rngs, dtype, stride=config.patch_size, bias=False)
        self.position_embedding = param(rngs, (config.grid**2 + 1, width), ("length", "embed"), dtype)
        self.pre_layrnorm = LayerNorm(width, config.epsilon, rngs, dtype)  # the files' spelling
        sizes = (width, config.mlp_width, config.heads, config.activation, config.epsilon)
        self.layers = stack(lambda rngs: ClipBlock(*sizes, rngs, dtype), config.layers, rngs)
        self.post_layernorm = LayerNorm(width, config.epsilon, rngs, dtype)
        self.visual_projection = Linear(width, config.projection_width, ("embed", "mlp"), rngs, dtype, bias=False)

    @jax.named_scope("clip_vision")
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B p"]:
        """Returns the features of images of config.image_size pixels, normalised by `normalise`."""
        patches = self.patch_embedding(images.astype(self.config.dtype))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (patches.shape[0], 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + self.position_embedding[...][None]
        x, _ = scan_stack(self.layers, lambda block, x: (block(x, None), None), self.pre_layrnorm(x), "none")
        return self.visual_projection(self.post_layernorm(x[:, 0]))


def normalise(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns images in [0, 1] with each channel normalised by MEAN and DEVIATION, as the encoder expects them."""
    mean, deviation = (jnp.array(values, jnp.float32)[None, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def cosines(first: Float[Array, "B p"], second: Float[Array, "B p"]) -> Float[Array, " B"]:
    """Returns the cosine of each pair of features, such as an image's and its caption's, float32."""
    first, second = (
        x.astype(jnp.float32) / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True) for x in (first, second)
    )
    return (first * second).sum(axis=-1)


CLIP_VISION_LAYOUT = Layout(
    names=(
        (r"^layers\.", "encoder.layers.{layer}."),
        (r"^class_embedding$", "embeddings.class_embedding"),
        (r"^position_embedding$", "embeddings.position_embedding.weight"),
        (r"^patch_embedding\.", "embeddings.patch_embedding."),
        (r"^(?!visual_projection)", "vision_model."),
    ),
    renamed=((r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),),
    unused=(r"\.position_ids$", r"^text_model\.", r"^text_projection\.", r"^logit_scale$"),
)
