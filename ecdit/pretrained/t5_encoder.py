"""Implements T5's encoder (arXiv 1910.10683), versions 1.0 and 1.1.

Axes: B batch, L tokens, t width, H heads, k head width.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from ecdit.components import Mode, PartFlops, TextStates, TextWidths
from ecdit.config import require
from ecdit.models.layers import scan_stack, stack
from ecdit.partitioning import constrain
from ecdit.pretrained.config_json import read_config
from ecdit.pretrained.layers import Dtype, Linear, RmsNorm, attention, param, tanh_gelu
from ecdit.pretrained.layout import Layout

PAD_ID = 0
# Defaults of transformers' T5Config.
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder."""

    vocab_size: int
    width: int  # t
    mlp_width: int
    layers: int
    heads: int
    head_width: int  # k; H k need not be t
    buckets: int  # buckets of relative positions
    max_distance: int  # larger distances share a bucket
    mlp: Literal["relu", "gated-gelu"]  # versions 1.0 and 1.1
    epsilon: float  # added to variances in norms
    dtype: Dtype


def read_t5(folder: Path, dtype: Dtype) -> T5Config:
    """Returns the config in a folder of a T5 encoder or of a whole T5.

    Raises:
      WeightsError: the config cannot be read, or is for another architecture.
    """
    config = read_config(folder, ("t5",), "model_type", DEFAULTS)
    return T5Config(
        vocab_size=config.number("vocab_size"),
        width=config.number("d_model"),
        mlp_width=config.number("d_ff"),
        layers=config.number("num_layers"),
        heads=config.number("num_heads"),
        head_width=config.number("d_kv"),
        buckets=config.number("relative_attention_num_buckets", least=4),
        max_distance=config.number("relative_attention_max_distance", least=2),
        mlp=config.choose("feed_forward_proj", ("relu", "gated-gelu")),
        epsilon=config.number("layer_norm_epsilon", float, 0),
        dtype=dtype,
    )


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each (query, key), int32[length, length].

    Half of the buckets are for keys after the query. In each half, one half is for single distances and the other for
    ranges whose bounds grow geometrically up to `max_distance`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    # The published networks were trained with float32 here, whose rounding decides for distances on a bound.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    return (np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)).astype(np.int32)


class T5Attention(nnx.Module):
    """Attention without biases and without a scale, which the published weights include."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.heads = config.heads
        joined, dtype = config.heads * config.head_width, config.dtype
        self.q = Linear(config.width, joined, ("embed", "joined_kv"), rngs, dtype, bias=False)
        self.k = Linear(config.width, joined, ("embed", "joined_kv"), rngs, dtype, bias=False)
        self.v = Linear(config.width, joined, ("embed", "joined_kv"), rngs, dtype, bias=False)
        self.o = Linear(joined, config.width, ("joined_kv", "embed"), rngs, dtype, bias=False)

    def __call__(self, x: Float[Array, "B L t"], bias: Float[Array, "B H L L"]) -> Float[Array, "B L t"]:
        """Returns the attention's output; `bias` has relative positions and masks padding."""
        query, key, value = (
            constrain(project(x).reshape(*x.shape[:2], self.heads, -1), "batch", None, "heads", None)
            for project in (self.q, self.k, self.v)
        )
        return self.o(attention(query, key, value, bias, scale=1.0))


class T5Mlp(nnx.Module):
    """Computes wo relu(wi x), or the gated wo (gelu(wi_0 x) wi_1 x)."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        def inner() -> Linear:
            return Linear(config.width, config.mlp_width, ("embed", "mlp"), rngs, config.dtype, bias=False)

        self.gated = config.mlp == "gated-gelu"
        if self.gated:
            self.wi_0, self.wi_1 = inner(), inner()
        else:
            self.wi = inner()
        self.wo = Linear(config.mlp_width, config.width, ("mlp", "embed"), rngs, config.dtype, bias=False)

    def __call__(self, x: Float[Array, "B L t"]) -> Float[Array, "B L t"]:
        """Returns the output for each token."""
        return self.wo(tanh_gelu(self.wi_0(x)) * self.wi_1(x) if self.gated else jax.nn.relu(self.wi(x)))


class T5Block(nnx.Module):
    """A block of pre-norm attention and MLP."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = (
            RmsNorm(config.width, config.epsilon, rngs, config.dtype) for _ in range(2)
        )
        self.attention, self.mlp = T5Attention(config, rngs), T5Mlp(config, rngs)

    def __call__(self, x: Float[Array, "B L t"], bias: Float[Array, "B H L L"]) -> Float[Array, "B L t"]:
        """Returns the block's output; `bias` is added to the scores of the attention."""
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Maps tokens to states, a `components.TextEncoder`. The pooled state is the mean, because T5 has none."""

    Config = T5Config

    def __init__(self, config: T5Config, max_length: int, rngs: nnx.Rngs):
        del max_length  # positions are relative
        self.config = config
        self.shared = param(rngs, (config.vocab_size, config.width), ("vocab", "embed"), config.dtype)
        self.relative_attention_bias = param(rngs, (config.buckets, config.heads), ("features", "heads"), config.dtype)
        self.block = stack(lambda rngs: T5Block(config, rngs), config.layers, rngs)
        self.final_layer_norm = RmsNorm(config.width, config.epsilon, rngs, config.dtype)

    @property
    def widths(self) -> TextWidths:
        """Returns the widths of states and pooled state."""
        return TextWidths(self.config.width, self.config.width)

    @jax.named_scope("t5_encoder")
    def __call__(self, tokens: Int[Array, "B L"], mode: Mode = "sample") -> TextStates:
        """Returns the states of captions.

        Args:
          tokens: int32; rows end in EOS and are padded with 0, to which no token attends.
          mode: makes no difference.
        """
        del mode
        config, mask, length = self.config, tokens != PAD_ID, tokens.shape[1]
        buckets = relative_buckets(length, config.buckets, config.max_distance)
        positions = self.relative_attention_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        bias = jnp.where(mask[:, None, None, :], positions, jnp.finfo(jnp.float32).min)
        x, _ = scan_stack(self.block, lambda block, x: (block(x, bias), None), self.shared[...][tokens], "none")
        states = self.final_layer_norm(x)
        kept = mask[..., None].astype(jnp.float32)
        pooled = (states.astype(jnp.float32) * kept).sum(axis=1) / jnp.maximum(kept.sum(axis=1), 1)
        return TextStates(states, mask, pooled.astype(states.dtype))

    def check_layout(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ConfigError if the heads do not divide over the mesh."""
        heads, tensor = self.config.heads, mesh.shape["tensor"]
        require(heads % tensor == 0, "text.heads", heads, f"must be a multiple of mesh.tensor, {tensor}")

    def flops(self, length: int, mode: Mode = "sample") -> PartFlops:
        """Returns the FLOPs of one caption, including padding."""
        del mode
        config, joined = self.config, self.config.heads * self.config.head_width
        matrices = 3 if config.mlp == "gated-gelu" else 2
        token = 4 * config.width * joined + matrices * config.width * config.mlp_width
        layer = length * token + 2 * length**2 * joined
        return PartFlops("t5_encoder", float(config.layers * length), 2.0 * config.layers * layer)


# A whole T5 also has a decoder; encoder.embed_tokens is the same matrix as `shared`.
T5_LAYOUT = Layout(
    names=(
        (r"^block\.", "encoder.block.{layer}."),
        (r"\.attention_norm\.", ".layer.0.layer_norm."),
        (r"\.attention\.", ".layer.0.SelfAttention."),
        (r"\.mlp_norm\.", ".layer.1.layer_norm."),
        (r"\.mlp\.", ".layer.1.DenseReluDense."),
        (r"^final_layer_norm\.", "encoder.final_layer_norm."),
        (r"^relative_attention_bias$", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (r"^shared$", "shared.weight"),
    ),
    renamed=((r"^encoder\.embed_tokens\.", "shared."),),
    unused=(r"^decoder\.", r"^lm_head\."),
)
