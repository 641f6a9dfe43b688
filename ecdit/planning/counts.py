"""Counts parameters and floating-point operations of an experiment without allocating them."""

import dataclasses
import math
from typing import Any

import jax

from ecdit.config import ConfigError, require
from ecdit.encoders.vae_flops import VAE_PARAMS
from ecdit.experiment import Experiment
from ecdit.models.config import DiTConfig
from ecdit.system import SystemConfig, make_system

# Sizes that the paper's Table 1 counts beside the denoiser [A].
TABLE_TEXT_WIDTH, TABLE_TEXT_PARAMS, TABLE_VAE_PARAMS = 1280, 32 * 12 * 1280**2 + 32128 * 1280, 84e6


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of a model, and FLOPs of a forward pass in training for one image and its caption."""

    total_params: int  # includes the text encoder and the autoencoder, as in the paper
    denoiser_params: int
    activated_params: int  # parameters of the denoiser with the average number of experts per token
    text_params: int
    vae_params: int  # of the autoencoder, which may be another program's that has made the latents; 0 without one
    flops_per_image: dict[str, dict[str, float]]  # by part: flops, and tokens, the rows it sees over all its layers
    encoding_flops_per_image: float  # of the autoencoder, once, when latents are prepared: then no step runs it


def count(experiment: Experiment) -> Counts:
    """Counts an experiment's abstract parameters and its FLOPs. `models.flops` says which operations count."""
    config = experiment.system
    system = make_system(config)
    abstract = system.shapes()
    denoiser, text = (_size(abstract[name]) for name in ("denoiser", "text"))
    parts, encoding = system.forward_flops("train"), 0.0
    vae = VAE_PARAMS if config.autoencoder == "latents" else _size(abstract.get("autoencoder", {}))
    if config.reads_latents:
        encoding = system.parts.autoencoder.flops(config.image_size).flops
    return Counts(
        total_params=denoiser + text + vae,
        denoiser_params=denoiser,
        activated_params=denoiser - system.parts.denoiser.idle_params(),
        text_params=text,
        vae_params=vae,
        flops_per_image={part.name: {"flops": part.flops, "tokens": part.tokens} for part in parts},
        encoding_flops_per_image=encoding,
    )


def table_params(system: SystemConfig) -> int:
    """Counts parameters by the rule that reproduces all totals of the paper's Table 1 to their last digit [A].

    The rule has two grouped-query modules per block, whereas this model has one. It checks the table, not the model.

    Raises:
      ConfigError: the config has an option that the paper's table does not have.
    """
    model = system.model
    if not isinstance(model, DiTConfig):
        raise ConfigError("denoiser", system.denoiser, "the table has only the paper's denoiser")
    options = {"expert_width": 0, "num_shared_experts": 0, "router_input": "modulated", "extra_blocks": 2}
    for key, wanted in (options | {"ffn_multiplier": 4, "even_ffn_multiplier": 4}).items():
        require(getattr(model, key) == wanted, f"model.{key}", getattr(model, key), f"Table 1 has {wanted}")
    d, blocks = model.width, model.depth + model.extra_blocks
    attention = 2 * d**2 + 2 * model.head_dim * model.kv_heads * d
    block = 8 * d**2 + (2 * d**2 + 2 * TABLE_TEXT_WIDTH * d) + 2 * attention
    experts = 0 if model.ffn == "dense" else model.num_experts * (8 * d**2 + d) - 8 * d**2
    total = blocks * block + model.depth // 2 * experts + 11 * d**2
    return round(total + TABLE_TEXT_PARAMS + TABLE_VAE_PARAMS)


def report(counts: Counts) -> list[str]:
    """Returns the counts as lines of text."""
    lines = [
        f"parameters       {_billions(counts.total_params)} in all: denoiser {_billions(counts.denoiser_params)}, "
        f"text tower {_billions(counts.text_params)}, autoencoder {_billions(counts.vae_params)}",
        f"activated        {_billions(counts.activated_params)} of the denoiser's",
        "FLOPs of an image, forward, and the rows that each part sees:",
    ]
    total = sum(part["flops"] for part in counts.flops_per_image.values())
    for name, part in counts.flops_per_image.items():
        share = part["flops"] / total
        lines.append(f"  {name:16} {part['flops'] / 1e9:12.3f} GFLOP {share:7.2%} {part['tokens']:12,.0f} rows")
    lines.append(f"  {'total':16} {total / 1e9:12.3f} GFLOP")
    if counts.encoding_flops_per_image:
        lines.append(
            f"The autoencoder takes {counts.encoding_flops_per_image / 1e9:.3f} GFLOP an image once, when latents are "
            f"stored; no step runs it."
        )
    return lines


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f} B"
