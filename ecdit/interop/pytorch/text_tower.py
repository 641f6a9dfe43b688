"""The text tower that EC-DIT trains with its denoiser, in PyTorch: a causal transformer as CLIP's text encoder.

This file needs torch and safetensors alone. `TextTower.from_pretrained(folder)` reads a folder with `config.json` and
safetensors files, such as `text_encoder/` of what `ecdit.checkpoint export --format=diffusers` writes.

Axes: B captions, L tokens, t width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

PAD = 0  # the id that fills a caption
EPS = 1e-5  # of the norms


@dataclass(frozen=True)
class TextConfig:
    """The text tower's sizes."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    length: int  # tokens of a caption, padding included
    activation: str  # gelu | quick_gelu

    def __post_init__(self):
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation = {self.activation!r} is not supported: must be gelu or quick_gelu")


class TextTower(nn.Module):
    """A causal transformer as CLIP's text encoder."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, EPS)

    @classmethod
    def from_pretrained(cls, folder, torch_dtype: torch.dtype | None = None):
        """Returns the network of a folder's `config.json`, with the weights of its safetensors files.

        A field of the config that this file does not know is an error that names it.
        """
        values = json.loads((Path(folder) / "config.json").read_text())
        values = {key: value for key, value in values.items() if not key.startswith("_")}  # those are diffusers'
        config = TextConfig(**values)
        with torch.device("meta"):  # which allocates nothing
            network = cls(config)
        weights = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(file)
        network.load_state_dict(weights, assign=True)
        return network.to(torch_dtype or torch.float32).eval()

    @property
    def device(self) -> torch.device:
        """Returns where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the weights."""
        return next(self.parameters()).dtype

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns states [B, L, t], the mask of those that are no padding, and the last one of them, [B, t]."""
        x = self.tokens(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        states, mask = self.final_norm(x), tokens != PAD
        last = mask.sum(-1, keepdim=True) - 1
        return states, mask, states.take_along_dim(last[..., None], 1)[:, 0]


class TextBlock(nn.Module):
    """Causal self-attention and a feed-forward network, each of its normed input and added to it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c, self.heads, self.quick = config, config.heads, config.activation == "quick_gelu"
        self.attention_norm, self.ffn_norm = nn.LayerNorm(c.width, EPS), nn.LayerNorm(c.width, EPS)
        self.attention = nn.ModuleDict({name: nn.Linear(c.width, c.width) for name in ("query", "key", "value", "out")})
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, L, t]."""
        y = self.attention_norm(x)
        split = (
            self.attention[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.attention["out"](y.transpose(1, 2).flatten(-2))
        y = self.up(self.ffn_norm(x))
        return x + self.down(y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))
