"""A causal text tower in the manner of CLIP's (arXiv 2103.00020). Axes: B batch, L tokens, t width."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ecdit.components import TextStates
from ecdit.config import require
from ecdit.models.attention import CausalAttention
from ecdit.models.layers import Linear, layer_norm, param, scan_stack, stack, zeros

PAD_ID = 0  # T5's SentencePiece ids: padding 0, end of sequence 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Size of the text tower."""

    vocab_size: int
    width: int  # t
    layers: int
    heads: int
    activation: Literal["gelu", "quick_gelu"]  # quick_gelu: x sigmoid(1.702 x), OpenAI's CLIP
    frozen: bool  # not trained: neither gradient nor moments nor EMA

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be 1 or more")
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide the width, {self.width}")


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
        self.attention = CausalAttention(config.width, config.heads, rngs)
        self.up = Linear(config.width, 4 * config.width, ("embed", "mlp"), rngs)
        self.down = Linear(4 * config.width, config.width, ("mlp", "embed"), rngs)

    def __call__(self, x: Float[Array, "B L t"]) -> Float[Array, "B L t"]:
        """The block's output, in the dtype of x."""
        x = x + self.attention(self.attention_norm(x))
        hidden = self.up(self.ffn_norm(x))
        hidden = (
            jax.nn.gelu(hidden, approximate=False)
            if self.activation == "gelu"
            else hidden * jax.nn.sigmoid(1.702 * hidden)
        )
        return x + self.down(hidden)


class TextTower(nnx.Module):
    """Tokens to states, and to the state of the last token that is not padding."""

    def __init__(self, config: TextConfig, max_length: int, rngs: nnx.Rngs):
        self.config = config
        self.tokens = param(
            rngs, jax.nn.initializers.normal(0.02), (config.vocab_size, config.width), ("vocab", "embed")
        )
        self.positions = param(rngs, jax.nn.initializers.normal(0.01), (max_length, config.width), ("length", "embed"))
        self.blocks = stack(lambda rngs: TextBlock(config, rngs), config.layers, rngs)
        self.final_norm = Norm(config.width, rngs)

    @jax.named_scope("text_tower")
    def __call__(self, tokens: Int[Array, "B L"], dtype: str, remat: str) -> TextStates:
        """Encodes captions; padding (id 0) comes last and changes nothing, as attention is causal.

        Args:
          tokens: int32, ending in EOS, then padded with 0. Every row has at least its EOS.
          dtype: of activations.
          remat: policy of `layers.REMAT_POLICIES`.
        """
        mask = tokens != PAD_ID
        x = self.tokens[...].astype(dtype)[tokens] + self.positions[...].astype(dtype)[None, : tokens.shape[1]]
        x, _ = scan_stack(self.blocks, lambda block, x: (block(x), None), x, remat)
        states = self.final_norm(x)
        last = jnp.maximum(mask.sum(axis=1) - 1, 0)
        return TextStates(states, mask, jax.vmap(lambda row, i: row[i])(states, last))
