"""EC-DIT's denoiser in PyTorch: for sampling and fine-tuning without JAX.

This file needs torch and safetensors alone. `Denoiser.from_pretrained(folder)` reads a folder with `config.json` and
safetensors files, such as `transformer/` of what `ecdit.checkpoint export --format=diffusers` writes.

The network predicts v = noise - data of x_t = t noise + (1 - t) data, where t = 1 is noise. Every second block has
experts in place of a feed-forward network. With `expert_choice` each expert takes the C tokens of a group that fit it
best; with `token_choice` each token takes two experts. (The losses that balance routers in training are not here.)

Axes: B images, N tokens, d width, G groups, S tokens of a group, E experts, C capacity (tokens that an expert takes),
H heads, L text tokens, t text width, p width of the pooled caption.
"""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

EPS = 1e-6  # of the norms
TIME_SCALE = 1000  # the embedding of time t is that of the number 1000 t


@dataclass(frozen=True)
class DenoiserConfig:
    """The denoiser's sizes and options, as in `config.json` beside its weights."""

    latent_size: int  # along a side, as patch_size
    latent_channels: int
    patch_size: int
    width: int
    depth: int  # blocks, dense ones and those with experts in turn
    extra_blocks: int  # dense blocks that also see dropped tokens
    heads: int
    kv_heads: int  # of self-attention
    rope_theta: float
    prediction: str  # of the head: velocity | data, from which the velocity follows
    absolute_positions: bool
    ffn_multiplier: int  # hidden units of a feed-forward network, in widths
    ffn: str  # of even blocks: dense | expert_choice | token_choice
    even_ffn_multiplier: int  # of even blocks if they are dense
    num_experts: int
    expert_width: int  # hidden units of an expert; 0: as a feed-forward network has
    num_shared_experts: int  # work on every token, without a gate
    capacity_factor: float  # of expert choice
    token_choice_dropless: bool  # of token choice: no expert refuses a token
    router_input: str  # modulated | decoupled
    gate_norm: str  # none | renormalized
    route_scale: float
    moe_output_norm: str  # sandwich | none | expert
    group: str  # of tokens that compete for experts in training: image, or a number of tokens
    sampling_group: str  # the same in sampling
    block_table: bool  # each block adds offsets of its own to the modulation
    text_width: int
    pooled_width: int

    def __post_init__(self):
        allowed = {
            "prediction": ("velocity", "data"),
            "ffn": ("dense", "expert_choice", "token_choice"),
            "router_input": ("modulated", "decoupled"),
            "gate_norm": ("none", "renormalized"),
            "moe_output_norm": ("sandwich", "none", "expert"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key} = {getattr(self, key)!r} is not supported: must be one of {', '.join(values)}")


class Denoiser(nn.Module):
    """Predicts the velocity of noisy latents."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = c = config
        numbers = c.patch_size**2 * c.latent_channels
        self.patches = nn.Linear(numbers, c.width)
        self.time = embedding(256, c.width)
        self.caption = embedding(c.pooled_width, c.width)
        self.size_crop = embedding(4 * 256, c.width)
        self.modulation = nn.Linear(c.width, 6 * c.width)
        # Blocks are counted from 1, so even ones stand at odd places of the list.
        self.blocks = nn.ModuleList(Block(c, even=place % 2 == 1) for place in range(c.depth))
        self.extra = nn.ModuleList(Block(c, even=False) for _ in range(c.extra_blocks))
        if c.extra_blocks:
            self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.head_modulation = nn.Linear(c.width, 2 * c.width)
        self.head = _Head(c.width, numbers)

    @classmethod
    def from_pretrained(cls, folder, torch_dtype: torch.dtype | None = None):
        """Returns the network of a folder's `config.json`, with the weights of its safetensors files.

        A field of the config that this file does not know is an error that names it.
        """
        values = json.loads((Path(folder) / "config.json").read_text())
        values = {key: value for key, value in values.items() if not key.startswith("_")}  # those are diffusers'
        config = DenoiserConfig(**values)
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

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        states: Tensor,
        mask: Tensor,
        pooled: Tensor,
        size_crop: Tensor,
        kept: Tensor | None = None,
        group: str | None = None,
    ) -> Tensor:
        """Returns the velocity, [B, c, h, w].

        Args:
          latents: x_t, [B, c, h, w].
          time: t of each image, [B].
          states: of the caption's tokens, [B, L, t].
          mask: whether a text token is one of the caption, and no padding, [B, L].
          pooled: one vector of the whole caption, [B, p].
          size_crop: the original's height and width, the crop's top and left in pixels, [B, 4].
          kept: numbers of the tokens that are not dropped, [B, n], ascending; None for all.
          group: of tokens that compete for experts; None for that of sampling.
        """
        c, dtype = self.config, self.dtype
        time_embedding = self.time(sinusoid(TIME_SCALE * time, 256).to(dtype))
        sizes = sinusoid(size_crop.flatten(), 256).reshape(len(size_crop), -1)
        embeddings = (time_embedding, self.caption(pooled.to(dtype)), self.size_crop(sizes.to(dtype)))
        time_embedding = norm(time_embedding)
        condition = F.silu(sum(norm(embedding) for embedding in embeddings))
        modulation = self.modulation(condition).unflatten(-1, (6, c.width))
        text, mask = states.to(dtype), mask[:, None, None]  # the same for all heads and queries

        def run(blocks, x, places):
            rotation = rotations(places, c.width // c.heads, c.rope_theta)
            for block in blocks:
                x = block(x, text, mask, modulation, time_embedding, rotation, group or c.sampling_group)
            return x

        side = c.latent_size // c.patch_size
        steps = torch.arange(side, device=latents.device)
        grid = torch.cartesian_prod(steps, steps).expand(len(latents), -1, -1)  # row and column of each token
        places = [sinusoid(grid[..., axis], c.width // 2) for axis in (0, 1)]
        positions = torch.cat(places, -1).to(dtype) * c.absolute_positions
        x = self.patches(patchify(latents, c.patch_size).to(dtype)) + positions
        if kept is None:
            x = run(self.blocks, x, grid)
        else:
            index = kept[..., None]
            x = run(self.blocks, x.take_along_dim(index, 1), grid.take_along_dim(index, 1))
            gaps = (self.mask_token + positions).expand(len(x), side * side, -1)
            x = gaps.scatter(1, index.expand(x.shape), x)
        x = run(self.extra, x, grid)
        shift, scale = self.head_modulation(condition).float().unflatten(-1, (2, c.width)).unbind(1)
        x = modulate(norm(x.float()), shift, scale)  # float32, because guidance takes differences of velocities
        x = unpatchify(self.head(x), c.patch_size, c.latent_channels)
        if c.prediction == "data":  # v = (x_t - data) / t; near t = 0 the division would multiply errors
            x = (latents.float() - x) / time.float().clamp(min=0.05)[:, None, None, None]
        return x


class _Head(nn.Linear):  # called as a module, for hooks that bring its weights from the host
    def forward(self, x: Tensor) -> Tensor:  # in float32, whatever the weights are
        return F.linear(x, self.weight.float(), self.bias.float())


class Block(nn.Module):
    """Self-attention, attention to the caption, and a feed-forward network or experts, each added to its input."""

    def __init__(self, config: DenoiserConfig, even: bool):
        super().__init__()
        c, head = config, config.width // config.heads
        self.attention = Attention(c.width, c.width, c.heads, c.kv_heads, head)
        self.cross_attention = Attention(c.width, c.text_width, c.heads, c.heads, head)
        self.has_experts = even and c.ffn != "dense"
        if self.has_experts:
            self.experts = Experts(c)
        else:
            multiplier = c.even_ffn_multiplier if even else c.ffn_multiplier
            self.feed_forward = FeedForward(c.width, multiplier * c.width)
        if c.block_table:
            self.table = nn.Parameter(torch.zeros(6, c.width))

    def forward(self, x, text, mask, modulation, time_embedding, rotation, group):
        """Returns x after the block, [B, N, d]."""
        if hasattr(self, "table"):
            modulation = modulation + self.table
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(1)
        y = modulate(norm(x), shift_1, scale_1)
        x = x + gate_1[:, None] * norm(self.attention(y, y, rotation=rotation))
        x = x + self.cross_attention(norm(x), text, mask=mask)
        y = modulate(norm(x), shift_2, scale_2)
        y = self.experts(y, norm(x), time_embedding, group) if self.has_experts else norm(self.feed_forward(y))
        return x + gate_2[:, None] * y


class Attention(nn.Module):
    """Attention of a sequence to itself or another, with normed queries and keys; several heads may share a key."""

    def __init__(self, width: int, context_width: int, heads: int, kv_heads: int, head: int):
        super().__init__()
        self.query = nn.Linear(width, heads * head, bias=False)
        self.key = nn.Linear(context_width, kv_heads * head, bias=False)
        self.value = nn.Linear(context_width, kv_heads * head, bias=False)
        self.out = nn.Linear(heads * head, width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(head))
        self.key_scale = nn.Parameter(torch.ones(head))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, rotation=None) -> Tensor:
        """Returns [B, N, d]; where `mask` is False nothing is attended to."""
        head = len(self.query_scale)
        split = lambda y: y.unflatten(-1, (-1, head)).transpose(1, 2)  # noqa: E731  [B, H, N, head]
        query = rms_norm(split(self.query(x)), self.query_scale)
        key = rms_norm(split(self.key(context)), self.key_scale)
        value = split(self.value(context))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        shared = query.shape[1] // key.shape[1]
        key, value = (y.repeat_interleave(shared, dim=1) for y in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., d]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Experts(nn.Module):
    """Feed-forward networks of which each works on some tokens; its output is multiplied by a gate."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = c = config
        hidden = c.expert_width or c.ffn_multiplier * c.width
        self.router = nn.Parameter(torch.zeros(c.width, c.num_experts))
        self.up = nn.Parameter(torch.zeros(c.num_experts, c.width, hidden))
        self.down = nn.Parameter(torch.zeros(c.num_experts, hidden, c.width))
        if c.router_input == "decoupled":
            self.time_router = nn.Parameter(torch.zeros(c.width, c.num_experts))
        if c.num_shared_experts:
            self.shared = FeedForward(c.width, c.num_shared_experts * hidden)

    def forward(self, x: Tensor, unmodulated: Tensor, time_embedding: Tensor, group: str) -> Tensor:
        """Returns the sum over experts, [B, N, d]; tokens that no expert takes get 0."""
        c = self.config
        size = x.shape[1] if group == "image" else int(group)
        if x.shape[0] * x.shape[1] % size:
            raise ValueError(f"{x.shape[0]} images of {x.shape[1]} tokens do not divide into groups of {size}")
        grouped = x.reshape(-1, size, x.shape[-1])
        if c.router_input == "decoupled":
            logits = unmodulated.float() @ self.router.float()
            logits = logits + (time_embedding.float() @ self.time_router.float())[:, None]
        else:
            logits = x.float() @ self.router.float()
        index, gate = self.route(logits.reshape(-1, size, c.num_experts))
        rows = torch.arange(len(grouped), device=x.device)[:, None, None]
        y = grouped[rows, index]  # [G, E, C, d]
        y = torch.einsum("gecd,edh->gech", y, self.up)
        y = torch.einsum("gech,ehd->gecd", F.gelu(y, approximate="tanh"), self.down)
        y = norm(y) if c.moe_output_norm == "expert" else y
        y = gate[..., None].to(y.dtype) * y
        slots = index.flatten(1)[..., None].expand(-1, -1, y.shape[-1])
        y = torch.zeros_like(grouped).scatter_add(1, slots, y.flatten(1, 2)).reshape(x.shape)
        if c.num_shared_experts:
            shared = self.shared(x)
            y = y + (norm(shared) if c.moe_output_norm == "expert" else shared)
        return norm(y) if c.moe_output_norm == "sandwich" else y

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the token in each slot of each expert, and the gate of its output, both [G, E, C]."""
        c, size = self.config, logits.shape[1]
        if c.ffn == "expert_choice":
            index, gate = expert_choice(logits, capacity(size, c.num_experts, c.capacity_factor))
        else:
            index, gate = token_choice(logits, size if c.token_choice_dropless else capacity(size, c.num_experts, 2))
        if c.gate_norm == "renormalized":
            total = torch.zeros_like(logits[..., 0]).scatter_add(1, index.flatten(1), gate.flatten(1))
            total = total[torch.arange(len(index), device=index.device)[:, None, None], index]
            gate = c.route_scale * gate / torch.where(total > 0, total, 1)
        return index, gate


def capacity(size: int, num_experts: int, factor: float) -> int:
    """Returns how many tokens of a group of `size` an expert takes."""
    # The subtraction keeps products such as 1.1 * 10, which is 11.000000000000002 in binary, from adding a token.
    return min(max(math.ceil(size * factor / num_experts - 1e-9), 1), size)


def expert_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Routes by Algorithm 1 of the paper: each expert takes the tokens with the largest affinity, which is the gate.

    Takes [G, S, E]; returns index and gate, [G, E, C]. Of equal tokens the first is taken.
    """
    affinity = logits.softmax(-1).transpose(1, 2)
    gate, index = affinity.sort(dim=-1, descending=True, stable=True)
    return index[..., :capacity], gate[..., :capacity]


def token_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Routes as GShard does: each token takes two experts, with gates that sum to 1.

    An expert with more tokens than it has room for takes first choices before second ones, and the larger affinity
    before the smaller. Slots that stay empty have gate 0. Takes and returns the same shapes as `expert_choice`.
    """
    affinity = logits.softmax(-1)
    top, choice = (y[..., :2] for y in affinity.sort(dim=-1, descending=True, stable=True))
    gates = torch.zeros_like(affinity).scatter(-1, choice, top / top.sum(-1, keepdim=True))
    # First choices have priorities in (0, 1], second ones in (-1, 0].
    priority = top.detach() - torch.arange(2.0, device=top.device)
    priority = torch.full_like(affinity, -torch.inf).scatter(-1, choice, priority)
    index = priority.transpose(1, 2).sort(dim=-1, descending=True, stable=True)[1][..., :capacity]
    return index, gates.transpose(1, 2).take_along_dim(index, -1)


def embedding(numbers: int, width: int) -> nn.Sequential:
    """Returns the network that embeds one part of the condition."""
    parts = {"hidden": nn.Linear(numbers, width), "silu": nn.SiLU(), "out": nn.Linear(width, width)}
    return nn.Sequential(OrderedDict(parts))


def norm(x: Tensor) -> Tensor:
    """Returns x with mean 0 and variance 1 over its width, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x with mean square 1 over a head, in float32, times a scale."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=EPS) * scale.float()).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x (1 + scale) + shift, with shift and scale of each image."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sinusoid(x: Tensor, width: int) -> Tensor:
    """Returns cosines and sines of numbers x at frequencies from 1 down to 1 / 10000, [..., width]."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=x.device) / (width // 2))
    angles = x.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotations(places: Tensor, head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the angles by which 2D RoPE turns, [B, 1, N, head / 2].

    The first half of the angles follows the token's row, the second one its column.
    """
    frequencies = theta ** (-torch.arange(head // 4, device=places.device) / (head // 4))
    angles = (places[..., None] * frequencies).flatten(-2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns queries or keys, [B, H, N, head]: number i together with number i + head / 2."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cuts latents [B, c, h, w] into patches, row by row, [B, N, patch^2 c]; channels come last in a patch."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(x: Tensor, patch: int, channels: int) -> Tensor:
    """Returns the square latents whose `patchify` is x."""
    side = math.isqrt(x.shape[1])
    x = x.reshape(len(x), side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, side * patch, side * patch)
