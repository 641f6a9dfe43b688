"""Implements classifier-free guidance (arXiv 2207.12598), plain and renormalised (STIV, arXiv 2412.07730).

    v = u + s (c - u)            (1)  c conditional, u unconditional (null caption) velocity, s the guidance scale
    v' = v ||c|| / ||v||         (2)  norms per image, over all its elements

s = 1 is the conditional model, s = 0 the unconditional one, and s > 1 guides. (The weight w of 2207.12598 is s - 1.)
Arithmetic is float32 for any dtype of the network, because at s = 7.5 a bfloat16 difference is mostly rounding.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from ecdit.config import require


@dataclass(frozen=True)
class GuidanceConfig:
    """Configures how strongly a sample follows its caption."""

    scale: float  # s in (1)
    mode: Literal["plain", "renormalized"]  # (1), or (1) and (2)

    def __post_init__(self):
        require(0 <= self.scale < math.inf, "scale", self.scale, "must be finite and at least 0; 1 is no guidance")
        require(self.mode in ("plain", "renormalized"), "mode", self.mode, "must be 'plain' or 'renormalized'")


def guide(
    conditional: Float[Array, "B ..."], unconditional: Float[Array, "B ..."], scale: float
) -> Float32[Array, "B ..."]:
    """Applies equation (1). `scale` is a Python number."""
    conditional = conditional.astype(jnp.float32)
    if scale == 1:  # u + (c - u) would round
        return conditional
    unconditional = unconditional.astype(jnp.float32)
    return unconditional + scale * (conditional - unconditional)


def renormalize(velocity: Float[Array, "B ..."], conditional: Float[Array, "B ..."]) -> Float32[Array, "B ..."]:
    """Applies equation (2). A velocity of norm 0 stays 0."""
    norm = _norm(velocity)
    ratio = _norm(conditional) / jnp.where(norm > 0, norm, 1)
    return velocity.astype(jnp.float32) * ratio


def _norm(velocity: Float[Array, "B ..."]) -> Float32[Array, "B ..."]:
    """Returns each image's Euclidean norm, [B, 1, ..., 1]."""
    axes = tuple(range(1, velocity.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(velocity.astype(jnp.float32)), axis=axes, keepdims=True))


def combine(
    conditional: Float[Array, "B ..."], unconditional: Float[Array, "B ..."], config: GuidanceConfig
) -> Float32[Array, "B ..."]:
    """Returns the guided velocity from both passes. At scale 1 it is the conditional one."""
    velocity = guide(conditional, unconditional, config.scale)
    if config.mode == "plain" or config.scale == 1:  # at scale 1 the norms are equal, and dividing them could round
        return velocity
    return renormalize(velocity, conditional)
