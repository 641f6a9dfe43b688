"""Counts the floating-point operations of the denoiser, part by part, from its config alone.

A multiply-add counts as two operations, and only matrix products and attention count: the rest (norms, softmax,
GELU, gates, positions) is a few per cent. The products of dispatch = "one_hot" do not count: they only move tokens.
Axes: N tokens of an image, M kept tokens, L text tokens, t text width, p width of the pooled text, d width, f hidden
width, E experts, C capacity.
"""

from ecdit.components import PartFlops, TextWidths
from ecdit.models.config import DiTConfig, group_size
from ecdit.models.embeddings import SINUSOID_WIDTH
from ecdit.models.moe import TOKEN_CHOICES, capacity


def denoiser_parts(
    config: DiTConfig, text_widths: TextWidths, text_length: int, tokens: int, group: str
) -> tuple[PartFlops, ...]:
    """Returns the FLOPs of one forward pass of the DiT on one image.

    Args:
      config: the denoiser's.
      text_widths: t and p.
      text_length: L, with padding: it is computed with, then masked.
      tokens: that the first blocks see: config.num_kept in training, config.num_tokens in sampling.
      group: tokens that compete for experts, config.group in training; where a group holds several images, an
        image's share of its slots is counted.
    """
    width, all_tokens = config.width, config.num_tokens
    rows = config.depth * tokens + config.extra_blocks * all_tokens
    squares = config.depth * tokens**2 + config.extra_blocks * all_tokens**2
    sparse_layers = 0 if config.ffn == "dense" else config.depth // 2
    routed = sparse_layers * tokens
    size = group_size(group, tokens)
    slots = routed * (config.num_experts * capacity(config, size) / size + config.num_shared_experts)
    odd_rows, even_rows = rows - config.depth // 2 * tokens, config.depth // 2 * tokens - routed

    projections = rows * (2 * width**2 + 2 * width * config.kv_heads * config.head_dim)
    layers = config.depth + config.extra_blocks
    text_projections = layers * text_length * 2 * text_widths.states * width
    # Token choice looks up each expert's gate by a product over a token's choices.
    router = routed * config.num_experts * (width + (TOKEN_CHOICES if config.ffn == "token_choice" else 0))
    if config.router_input == "decoupled":
        router += sparse_layers * config.num_experts * width  # of the time
    embeddings = (SINUSOID_WIDTH + text_widths.pooled + 4 * SINUSOID_WIDTH + 3 * width) * width
    counts = (
        ("self_attention", rows, projections + 2 * squares * width),
        ("cross_attention", rows, rows * 2 * width**2 + text_projections + 2 * rows * text_length * width),
        (
            "ffn",
            odd_rows + even_rows,
            2 * width**2 * (odd_rows * config.ffn_multiplier + even_rows * config.even_ffn_multiplier),
        ),
        ("experts", slots, slots * 2 * width * config.expert_hidden),
        ("router", routed, router),
        ("conditioning", 1, embeddings + (6 + 2) * width**2),
        ("head", 2 * all_tokens, 2 * all_tokens * config.patch_dim * width),  # with the embedding of patches
    )
    return tuple(PartFlops(name, float(seen), 2.0 * products) for name, seen, products in counts)


def idle_expert_params(config: DiTConfig) -> int:
    """Returns the parameters of experts that an average token does not use in training."""
    if config.ffn == "dense":
        return 0
    size = group_size(config.group, config.num_kept)
    # Share of the experts that a token uses. With token choice it uses two, however many slots there are.
    met = capacity(config, size) / size if config.ffn == "expert_choice" else TOKEN_CHOICES / config.num_experts
    params = config.depth // 2 * config.num_experts * 2 * config.width * config.expert_hidden
    return round(params * (1 - met))
