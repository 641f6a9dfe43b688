"""Implements CLIP's text encoder (arXiv 2103.00020) for weights of OpenAI and OpenCLIP.

Axes: B batch, L tokens, t width.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from ecdit.components import Mode, PartFlops, TextStates, TextWidths
from ecdit.config import require
from ecdit.models.layers import scan_stack, stack
from ecdit.models.packing import PADDED, Chunks, Packing, encode_packed, mean_sizes
from ecdit.partitioning import constrain
from ecdit.pretrained.config_json import read_config
from ecdit.pretrained.layers import ACTIVATIONS, Dtype, LayerNorm, Linear, attention, param
from ecdit.pretrained.layout import Layout
from ecdit.tuned.packed_attention import packed_attention

# Defaults of transformers' CLIPTextConfig, which omits them from config.json.
DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a text encoder, and which of its states it returns."""

    vocab_size: int
    width: int  # t
    mlp_width: int
    layers: int
    heads: int
    positions: int  # the largest number of tokens of a caption
    projection_width: int  # width of the projected pooled state; 0 does not project it
    activation: Literal["gelu", "quick_gelu"]
    epsilon: float  # added to variances in norms
    states: Literal["last", "penultimate"]  # penultimate: the input of the last block without a norm, for SDXL and SD3
    dtype: Dtype

    def __post_init__(self):
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide the width, {self.width}")


def read_clip_text(
    folder: Path, projection: bool, states: Literal["last", "penultimate"], dtype: Dtype
) -> ClipTextConfig:
    """Returns the config in a folder of a text encoder or of a whole CLIP.

    Args:
      folder: folder with config.json.
      projection: whether to project the pooled state; the folder must then have the projection's weights.
      states: which states to return.
      dtype: dtype of parameters and activations.

    Raises:
      WeightsError: the config cannot be read, or is for another architecture.
    """
    config = read_config(folder, ("clip_text_model", "clip"), "model_type", DEFAULTS)
    text = config.group("text_config", DEFAULTS) if config.values["model_type"] == "clip" else config
    return config.make(
        ClipTextConfig,
        vocab_size=text.number("vocab_size"),
        width=text.number("hidden_size"),
        mlp_width=text.number("intermediate_size"),
        layers=text.number("num_hidden_layers"),
        heads=text.number("num_attention_heads"),
        positions=text.number("max_position_embeddings"),
        projection_width=config.number("projection_dim") if projection else 0,
        activation=text.choose("hidden_act", ACTIVATIONS),
        epsilon=text.number("layer_norm_eps", float, 0),
        states=states,
        dtype=dtype,
    )


class ClipAttention(nnx.Module):
    """Multi-head attention with biases."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, dtype: Dtype):
        self.heads = heads
        self.q_proj = Linear(width, width, ("embed", "joined_kv"), rngs, dtype)
        self.k_proj = Linear(width, width, ("embed", "joined_kv"), rngs, dtype)
        self.v_proj = Linear(width, width, ("embed", "joined_kv"), rngs, dtype)
        self.out_proj = Linear(width, width, ("joined_kv", "embed"), rngs, dtype)

    def __call__(
        self, x: Float[Array, "B L t"], bias: Float[Array, "#B 1 L M"] | None, chunks: Chunks | None = None
    ) -> Float[Array, "B L t"]:
        """Returns the attention's output; `bias` is added to the scores. `chunks` says where packed captions are."""
        query, key, value = (
            constrain(project(x).reshape(*x.shape[:2], self.heads, -1), "batch", None, "heads", None)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if chunks is not None and chunks.attention == "fused":
            heads = (x.transpose(0, 2, 3, 1) for x in (query, key, value))
            attended = packed_attention(*heads, chunks.positions).transpose(0, 3, 1, 2)
            return self.out_proj(attended.reshape(x.shape))
        if chunks is not None:
            key, value = chunks.reach(key, 1), chunks.reach(value, 1)
        return self.out_proj(attention(query, key, value, bias, scale=query.shape[-1] ** -0.5))


class ClipMlp(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, width: int, mlp_width: int, activation: str, rngs: nnx.Rngs, dtype: Dtype):
        self.activation = activation
        self.fc1 = Linear(width, mlp_width, ("embed", "mlp"), rngs, dtype)
        self.fc2 = Linear(mlp_width, width, ("mlp", "embed"), rngs, dtype)

    def __call__(self, x: Float[Array, "B L t"]) -> Float[Array, "B L t"]:
        """Returns the output for each token."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class ClipBlock(nnx.Module):
    """A block of pre-norm attention and MLP, in CLIP's text encoder and in its image encoder."""

    def __init__(
        self, width: int, mlp_width: int, heads: int, activation: str, epsilon: float, rngs: nnx.Rngs, dtype: Dtype
    ):
        self.layer_norm1, self.layer_norm2 = (LayerNorm(width, epsilon, rngs, dtype) for _ in range(2))
        self.self_attn = ClipAttention(width, heads, rngs, dtype)
        self.mlp = ClipMlp(width, mlp_width, activation, rngs, dtype)

    def __call__(
        self, x: Float[Array, "B L t"], bias: Float[Array, "#B 1 L M"] | None, chunks: Chunks | None = None
    ) -> Float[Array, "B L t"]:
        """Returns the block's output; `bias` and `chunks` are the attention's."""
        x = x + self.self_attn(self.layer_norm1(x), bias, chunks)
        return x + self.mlp(self.layer_norm2(x))


class ClipText(nnx.Module):
    """Maps tokens to states and to the state of the end token, a `components.TextEncoder`."""

    Config = ClipTextConfig

    def __init__(self, config: ClipTextConfig, max_length: int, rngs: nnx.Rngs, packing: Packing = PADDED):
        """Makes the parameters. `packing` is for training."""
        allowed = f"the text encoder's weights have {config.positions} positions"
        require(max_length <= config.positions, "data.caption_length", max_length, allowed)
        packing.check(max_length)
        self.config, self.packing = config, packing
        width, dtype = config.width, config.dtype
        self.token_embedding = param(rngs, (config.vocab_size, width), ("vocab", "embed"), dtype)
        self.position_embedding = param(rngs, (config.positions, width), ("length", "embed"), dtype)
        sizes = (width, config.mlp_width, config.heads, config.activation, config.epsilon)
        self.layers = stack(lambda rngs: ClipBlock(*sizes, rngs, dtype), config.layers, rngs)
        self.final_layer_norm = LayerNorm(width, config.epsilon, rngs, dtype)
        projected = config.projection_width
        self.text_projection = (
            Linear(width, projected, ("embed", "mlp"), rngs, dtype, bias=False) if projected else None
        )

    @property
    def widths(self) -> TextWidths:
        """Returns the widths of states and pooled state."""
        return TextWidths(self.config.width, self.config.projection_width or self.config.width)

    @jax.named_scope("clip_text")
    def __call__(self, tokens: Int[Array, "B L"], mode: Mode = "sample") -> TextStates:
        """Returns the states of captions. Attention is causal, so padding after the end token changes nothing.

        Args:
          tokens: int32; each row has an end token, whose id is the largest of all. Files disagree about the ids of the
            end and of padding, so both are ignored: the end is the first position of the largest id in the row.
          mode: captions are packed in training alone.
        """
        end, packing = jnp.argmax(tokens, axis=1), self.packing if mode == "train" else PADDED
        last, *before = encode_packed(
            tokens, end + 1, packing, self._states, lambda chunks: self._states(chunks.tokens, chunks)
        )
        pooled = jax.vmap(lambda row, i: row[i])(last, end)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        mask = jnp.arange(tokens.shape[1])[None] <= end[:, None]
        return TextStates(before[0] if before else last, mask, pooled)

    def _states(self, tokens: Int[Array, "B L"], chunks: Chunks | None = None) -> tuple[Float[Array, "B L t"], ...]:
        """Returns the normed states, and those before the last block if the config wants them."""
        length, places = tokens.shape[1], self.position_embedding[...]
        if chunks is None:
            seen, placed = jnp.tril(jnp.ones((length, length), bool))[None, None], places[None, :length]
        else:
            seen, placed = chunks.mask[:, None], places[chunks.positions]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        x = self.token_embedding[...][tokens] + placed
        (x, before), _ = scan_stack(
            self.layers, lambda block, xs: ((block(xs[0], bias, chunks), xs[0]), None), (x, x), "none"
        )
        states = self.final_layer_norm(x)
        return (states,) if self.config.states == "last" else (states, before)

    def check_layout(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ConfigError if the heads do not divide over the mesh."""
        heads, tensor = self.config.heads, mesh.shape["tensor"]
        require(heads % tensor == 0, "text.heads", heads, f"must be a multiple of mesh.tensor, {tensor}")

    def flops(self, length: int, mode: Mode = "sample") -> PartFlops:
        """Returns the FLOPs of one caption, including padding. Causal attention counts as full attention."""
        config = self.config
        rows, keys = mean_sizes(self.packing if mode == "train" else PADDED, length)
        layer = rows * (4 * config.width**2 + 2 * config.width * config.mlp_width) + 2 * rows * keys * config.width
        return PartFlops("clip_text", float(config.layers * rows), 2.0 * config.layers * layer)


# transformers 5 writes a CLIPTextModel without the prefix text_model. A whole CLIP also has the image encoder.
CLIP_TEXT_LAYOUT = Layout(
    names=(
        (r"^layers\.", "encoder.layers.{layer}."),
        (r"^(token|position)_embedding$", r"embeddings.\1_embedding.weight"),
        (r"^(?!text_projection)", "text_model."),
    ),
    renamed=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    unused=(r"\.position_ids$", r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$", r"^text_projection\."),
)
