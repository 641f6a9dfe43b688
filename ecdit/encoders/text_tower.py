"""A causal text tower in the manner of CLIP's (arXiv 2103.00020). Axes: B batch, L tokens, t width."""

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from ecdit.components import Mode, PartFlops, TextStates, TextWidths
from ecdit.config import RESUME, RESUME_OR_PHASE, require
from ecdit.functions import exact_gelu
from ecdit.models.attention import CausalAttention
from ecdit.models.layers import Linear, layer_norm, param, scan_stack, stack, zeros
from ecdit.models.packing import PADDED, Attention, Chunks, Packing, encode_packed, mean_sizes

RANDOM = "random"  # as configs write it in place of a folder
PAD_ID = 0  # T5's SentencePiece ids: padding 0, end of sequence 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Selects the text encoder. A folder's encoder has its own size and ignores the sizes here."""

    # "random", or a folder of public weights: see `pretrained.text_encoders`. It may move: its contents are compared.
    weights: str = field(metadata=RESUME)
    second_weights: str = field(metadata=RESUME)  # of an encoder beside that one; "" for none
    clip_states: Literal["last", "penultimate"]  # of a folder of CLIP: normed, or the input of the last block
    clip_projection: bool  # whether CLIP's pooled state is projected, by weights that the folder must have
    # online: every step encodes its captions; prepared: the column data.text_states has what a folder's encoder gives,
    # by `ecdit.prepare --what=text`.
    encode: Literal["online", "prepared"]
    stored: Literal["bfloat16", "int8"]  # of prepared states; int8 has a scale a token
    frozen_random_ok: bool = field(metadata=RESUME)  # train on the states of a tower that is random and stays so
    vocab_size: int
    width: int  # t
    layers: int
    heads: int
    activation: Literal["gelu", "quick_gelu"]  # quick_gelu: x sigmoid(1.702 x), OpenAI's CLIP
    frozen: bool  # not trained: neither gradient nor moments nor EMA
    # Tokens that a caption takes on average in training, where captions are packed; 0 pads each: see `models.packing`.
    packed_length: int = field(metadata=RESUME_OR_PHASE)
    # Their attention. plain: by a mask; fused: in one kernel on TPUs, for data.caption_length up to packing.CHUNK.
    packed_attention: Attention = field(metadata=RESUME_OR_PHASE)
    # What the backward pass finds saved: see `layers.REMAT_POLICIES`.
    remat: Literal["none", "minimal", "offload", "attention_out", "full"] = field(metadata=RESUME_OR_PHASE)
    projections: Literal["plain", "tokens_last"] = field(metadata=RESUME_OR_PHASE)  # as DiTConfig.projections
    dtype: Literal["float32", "bfloat16"]  # of activations, and of a folder's parameters; others are float32

    def __post_init__(self):
        for key in ("vocab_size", "width", "layers", "heads"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide the width, {self.width}")
        require(self.weights != "", "weights", "", f'must be a folder of public weights, or "{RANDOM}"')
        both = self.public or not self.second_weights
        require(both, "second_weights", self.second_weights, f'must be "": text.weights is "{RANDOM}"')
        prepared = self.public or self.encode == "online"
        require(prepared, "encode", self.encode, f'must be "online": text.weights is "{RANDOM}"')
        require(self.packed_length >= 0, "packed_length", self.packed_length, "must be 0 or more")
        packs = self.frozen or self.packed_length == 0
        require(packs, "packed_length", self.packed_length, "must be 0: text.frozen is False")
        required = "must be True: the weights of a folder are not trained"
        require(self.frozen or not self.public, "frozen", self.frozen, required)

    @property
    def public(self) -> bool:
        """Returns True if the weights are those of a folder."""
        return self.weights != RANDOM

    @property
    def packing(self) -> Packing:
        """Returns how captions are packed in training."""
        return Packing(self.packed_length, self.packed_attention)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Returns the folders of public weights, one for each encoder."""
        return tuple(Path(folder) for folder in (self.weights, self.second_weights) if folder) if self.public else ()


class Norm(nnx.Module):
    """LayerNorm with scale and bias."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), ("embed",))
        self.bias = param(rngs, zeros, (width,), ("embed",))

    def __call__(self, x: Float[Array, "B L t"]) -> Float[Array, "B L t"]:
        """Norms over the last axis, in the dtype of x."""
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return layer_norm(x, epsilon=1e-5) * scale[None, None] + bias[None, None]


class TextBlock(nnx.Module):
    """Pre-norm causal attention and FFN."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.attention_norm, self.ffn_norm = Norm(config.width, rngs), Norm(config.width, rngs)
        self.attention = CausalAttention(config.width, config.heads, rngs, config.projections)
        self.up = Linear(config.width, 4 * config.width, ("embed", "mlp"), rngs)
        self.down = Linear(4 * config.width, config.width, ("mlp", "embed"), rngs)

    def __call__(self, x: Float[Array, "B L t"], chunks: Chunks | None) -> Float[Array, "B L t"]:
        """Returns the block's output, in the dtype of x; `chunks` says where captions are if they are packed."""
        x = x + self.attention(self.attention_norm(x), chunks)
        hidden = self.up(self.ffn_norm(x))
        hidden = exact_gelu(hidden) if self.activation == "gelu" else hidden * jax.nn.sigmoid(1.702 * hidden)
        # Without this barrier the TPU compiler fuses both products into one, which takes longer.
        return x + self.down(jax.lax.optimization_barrier(hidden))


class TextTower(nnx.Module):
    """Tokens to states, and to the state of the last token that is not padding."""

    Config = TextConfig

    def __init__(self, config: TextConfig, max_length: int, rngs: nnx.Rngs):
        config.packing.check(max_length)
        self.config = config
        self.tokens = param(
            rngs, jax.nn.initializers.normal(0.02), (config.vocab_size, config.width), ("vocab", "embed")
        )
        self.positions = param(rngs, jax.nn.initializers.normal(0.01), (max_length, config.width), ("length", "embed"))
        self.blocks = stack(lambda rngs: TextBlock(config, rngs), config.layers, rngs)
        self.final_norm = Norm(config.width, rngs)

    @property
    def widths(self) -> TextWidths:
        """Returns the widths of states and pooled state."""
        return TextWidths(self.config.width, self.config.width)

    @jax.named_scope("text_tower")
    def __call__(self, tokens: Int[Array, "B L"], mode: Mode = "sample") -> TextStates:
        """Encodes captions; padding (id 0) comes last and changes nothing, as attention is causal.

        Args:
          tokens: int32, ending in EOS, then padded with 0. Every row has at least its EOS.
          mode: captions are packed in training alone.
        """
        mask = tokens != PAD_ID
        lengths = jnp.maximum(mask.sum(axis=1), 1)
        packing = self.config.packing if mode == "train" else PADDED
        states = encode_packed(
            tokens, lengths, packing, self._states, lambda chunks: self._states(chunks.tokens, chunks)
        )
        return TextStates(states, mask, jax.vmap(lambda row, i: row[i])(states, lengths - 1))

    def _states(self, tokens: Int[Array, "B L"], chunks: Chunks | None = None) -> Float[Array, "B L t"]:
        dtype, positions = self.config.dtype, self.positions[...].astype(self.config.dtype)
        placed = positions[None, : tokens.shape[1]] if chunks is None else positions[chunks.positions]
        x = self.tokens[...].astype(dtype)[tokens] + placed
        x, _ = scan_stack(self.blocks, lambda block, x: (block(x, chunks), None), x, self.config.remat)
        return self.final_norm(x)

    def check_layout(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ConfigError if the heads do not divide over the mesh."""
        heads, tensor = self.config.heads, mesh.shape["tensor"]
        require(heads % tensor == 0, "text.heads", heads, f"must be a multiple of mesh.tensor, {tensor}")

    def flops(self, length: int, mode: Mode = "sample") -> PartFlops:
        """Returns the work on one caption, padding included; causal attention counts as a full one."""
        config = self.config
        rows, keys = mean_sizes(config.packing if mode == "train" else PADDED, length)
        layer = rows * 12 * config.width**2 + 2 * rows * keys * config.width
        return PartFlops("text_tower", float(config.layers * rows), 2.0 * config.layers * layer)
