"""Configures the denoiser. `ecdit/recipe.py` has the values with their sources and marks of certainty."""

import dataclasses
from dataclasses import field
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.models.layers import REMAT_POLICIES
from ecdit.tuned.fused_attention import SCORE_BYTES, score_bytes


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """An EC-DIT or one of its baselines."""

    latent_size: int = field(metadata=PHASE)  # latent pixels, side of the square latent
    latent_channels: int
    patch_size: int  # latent pixels, side of a patch
    width: int  # d
    depth: int  # blocks on kept tokens, an even number: odd blocks are dense, even blocks sparse
    extra_blocks: int  # dense blocks on all tokens, after the mask tokens are filled in
    heads: int
    kv_heads: int  # key-value heads of self-attention; cross-attention has `heads`
    rope_theta: float
    # What the head predicts. velocity: v; data: the data, from which v follows (`diffusion.flow.velocity_towards`)
    prediction: Literal["velocity", "data"]
    # Attention between its projections. fused: this project's kernel on TPUs; cudnn: cuDNN's kernel, only on GPUs.
    attention: Literal["plain", "fused", "cudnn"] = field(metadata=RESUME_OR_PHASE)
    # Products around attention. plain: multiplies rows, then transposes; tokens_last: for TPUs, without the transpose.
    projections: Literal["plain", "tokens_last"] = field(metadata=RESUME_OR_PHASE)
    absolute_positions: bool  # adds sine-cosine positions to tokens and mask tokens, because RoPE is only relative
    ffn_multiplier: int  # hidden width of an FFN, and of an expert if expert_width is 0, in multiples of d
    ffn: Literal["dense", "token_choice", "expert_choice"]  # kind of the even blocks
    even_ffn_multiplier: int  # hidden width of even blocks' FFNs if ffn is dense, in multiples of d
    num_experts: int  # E
    capacity_factor: float = field(metadata=PHASE)  # f_c of expert choice
    token_choice_dropless: bool  # token choice has C = S instead of ceil(2 S / E)
    balance_loss_weight: float  # weight of token choice's balance loss
    expert_width: int  # hidden units of an expert; 0: ffn_multiplier d
    num_shared_experts: int  # experts that work on every token, without a gate
    router_input: Literal["modulated", "decoupled"]  # the experts' input, or the time and the unmodulated norm
    gate_norm: Literal["none", "renormalized"]  # renormalized: a token's gates sum to route_scale
    route_scale: float
    router_z_loss: float  # weight of the mean squared logsumexp of the router's logits
    router_init_std: float
    group: str = field(metadata=PHASE)  # tokens that compete for experts in training: "image" or a number of tokens
    # The same for sampling, where each image's conditional and null-caption passes are neighbours in the batch.
    sampling_group: str = field(metadata=RESUME_OR_PHASE)
    # one_hot: moves tokens by matrix products, as a second opinion on gather
    dispatch: Literal["gather", "one_hot"] = field(metadata=RESUME)
    # Experts' products with matrices sharded over mesh.fsdp. plain: the compiler decides. For TPUs: scattered
    # reduce-scatters gradients explicitly; halves (mesh.fsdp = 2) sends one half while it multiplies by the other.
    expert_products: Literal["plain", "scattered", "halves"] = field(metadata=RESUME_OR_PHASE)
    moe_output_norm: Literal["sandwich", "none", "expert"]
    mask_ratio: float = field(metadata=PHASE)  # share of tokens dropped in training
    block_table: bool  # a learned offset of (shift, scale, gate) x 2 per block
    gate_init: float  # initial value of the block table's gates
    remat: Literal["none", "minimal", "offload", "attention_out", "full"] = field(metadata=RESUME_OR_PHASE)
    # pairs of blocks in one iteration of the loop over them; depth / 2 or more unrolls it fully
    scan_unroll: int = field(metadata=RESUME_OR_PHASE)
    dtype: Literal["float32", "bfloat16"]  # dtype of activations; parameters are float32

    def __post_init__(self):
        sizes = ("latent_size", "latent_channels", "patch_size", "width", "heads", "kv_heads")
        for key in (*sizes, "ffn_multiplier", "even_ffn_multiplier"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        for key in ("expert_width", "num_shared_experts", "router_z_loss", "router_init_std", "balance_loss_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        require(
            self.latent_size % self.patch_size == 0, "patch_size", self.patch_size, f"must divide {self.latent_size}"
        )
        require(
            self.depth >= 2 and self.depth % 2 == 0, "depth", self.depth, "must be even, 2 or more: (dense, sparse)"
        )
        require(self.extra_blocks >= 0, "extra_blocks", self.extra_blocks, "must be 0 or more")
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide the width, {self.width}")
        require(self.head_dim % 4 == 0, "heads", self.heads, f"width / heads = {self.head_dim} must be a multiple of 4")
        require(self.width % 4 == 0, "width", self.width, "must be a multiple of 4")
        require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"must divide heads, {self.heads}")
        require(self.num_experts >= 1, "num_experts", self.num_experts, "must be 1 or more")
        if self.ffn == "token_choice":
            require(self.num_experts >= 2, "num_experts", self.num_experts, "token choice picks 2 experts")
        require(
            0 < self.capacity_factor <= self.num_experts,
            "capacity_factor",
            self.capacity_factor,
            f"must be above 0 and at most the number of experts, {self.num_experts}",
        )
        require(0 <= self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "must be in [0, 1)")
        require(
            self.mask_ratio == 0 or self.extra_blocks > 0,
            "extra_blocks",
            self.extra_blocks,
            "masked training needs blocks after the mask tokens are filled in",
        )
        scores = score_bytes(self.heads // self.kv_heads, self.num_tokens, self.num_tokens)
        require(
            self.attention != "fused" or scores <= SCORE_BYTES,
            "attention",
            self.attention,
            f"with {self.num_tokens} tokens and {self.heads // self.kv_heads} heads per key it does not fit a TPU's "
            'VMEM: must be "plain"',
        )
        require(
            self.attention != "cudnn" or (self.dtype == "bfloat16" and self.head_dim % 8 == 0),
            "attention",
            self.attention,
            f"cuDNN takes bfloat16 and heads whose width is a multiple of 8, not {self.dtype} and {self.head_dim}: "
            'must be "plain" or "fused"',
        )
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be above 0")
        require(self.route_scale > 0, "route_scale", self.route_scale, "must be above 0")
        require(self.remat in REMAT_POLICIES, "remat", self.remat, f"must be one of {', '.join(REMAT_POLICIES)}")
        require(self.scan_unroll >= 1, "scan_unroll", self.scan_unroll, "must be 1 or more")
        check_group("group", self.group, self.num_kept)
        check_group("sampling_group", self.sampling_group, self.num_tokens)

    @property
    def head_dim(self) -> int:
        """Returns the width of an attention head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Returns the patches along a side."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Returns N, the patches of an image."""
        return self.grid**2

    @property
    def num_kept(self) -> int:
        """Returns the tokens that training keeps after masking."""
        return max(1, round(self.num_tokens * (1 - self.mask_ratio)))

    @property
    def expert_hidden(self) -> int:
        """Returns the hidden units of an expert."""
        return self.expert_width or self.ffn_multiplier * self.width

    @property
    def patch_dim(self) -> int:
        """Returns the numbers in a patch."""
        return self.patch_size**2 * self.latent_channels


def check_group(key: str, group: str, num_tokens: int) -> None:
    """Raises ConfigError unless `group` is "image", or a multiple or a divisor of `num_tokens`."""
    if group == "image":
        return
    require(group.isdigit() and int(group) > 0, key, group, 'must be "image" or a number of tokens')
    size = int(group)
    require(
        size % num_tokens == 0 or num_tokens % size == 0,
        key,
        group,
        f"must be a multiple or a divisor of the {num_tokens} tokens of an image",
    )


def check_tuned(config: DiTConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if the config chooses functions of `ecdit.tuned` that the mesh or its devices cannot run."""
    fsdp = mesh.shape["fsdp"]
    require(
        config.expert_products != "halves" or config.ffn == "dense" or fsdp == 2,
        "model.expert_products",
        config.expert_products,
        f'must be "scattered" or "plain": "halves" needs mesh.fsdp = 2, not {fsdp}',
    )
    if not isinstance(mesh, Mesh):
        return
    platform = mesh.devices.flat[0].platform
    require(
        config.attention != "cudnn" or platform == "gpu",
        "model.attention",
        config.attention,
        f'must be "plain" or "fused": cuDNN\'s kernel runs on GPUs, and these devices are {platform}s',
    )


def group_size(group: str, num_tokens: int) -> int:
    """Returns S, the tokens of a group, for images of `num_tokens`."""
    return num_tokens if group == "image" else int(group)
