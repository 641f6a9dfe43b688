"""Implements classifier-free guidance (arXiv 2207.12598), plain and renormalised (STIV, arXiv 2412.07730).

    v = u + s (c - u)            (1)  c conditional, u unconditional (null caption) velocity, s the guidance scale
    v' = v ||c|| / ||v||         (2)  norms per image, over all its elements

s = 1 is the conditional model, s = 0 the unconditional one, and s > 1 guides. (The weight w of 2207.12598 is s - 1.)
Outside an interval of times the velocity is c, as at s = 1 (arXiv 2404.07724, which found that guidance at high noise
costs variety). Both passes are made all the same.
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
    interval_low: float  # times from this one on, and
    interval_high: float  # up to this one, are guided; 0 and 1: all

    def __post_init__(self):
        require(0 <= self.scale < math.inf, "scale", self.scale, "must be finite and at least 0; 1 is no guidance")
        require(self.mode in ("plain", "renormalized"), "mode", self.mode, "must be 'plain' or 'renormalized'")
        low, high = self.interval_low, self.interval_high
        require(0 <= low <= 1, "interval_low", low, "must be in [0, 1]")
        require(low <= high <= 1, "interval_high", high, f"must be in [{low}, 1]: from interval_low on")

    def is_always(self) -> bool:
        """Returns whether all times are guided."""
        return (self.interval_low, self.interval_high) == (0, 1)


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
    conditional: Float[Array, "B ..."],
    unconditional: Float[Array, "B ..."],
    config: GuidanceConfig,
    time: Float[Array, " B"] | None = None,
) -> Float32[Array, "B ..."]:
    """Returns the guided velocity from both passes; at scale 1, and outside the interval, it is the conditional one.

    Args:
      conditional: with the caption.
      unconditional: with the null caption.
      config: how to guide.
      time: of each image; needed where an interval is guided alone.
    """
    velocity = guide(conditional, unconditional, config.scale)
    # At scale 1 the norms agree already; dividing them could round.
    if config.mode == "renormalized" and config.scale != 1:
        velocity = renormalize(velocity, conditional)
    if config.is_always():
        return velocity
    if time is None:
        raise ValueError("guidance in an interval needs the time")
    inside = (time >= config.interval_low) & (time <= config.interval_high)
    inside = inside.reshape(inside.shape + (1,) * (velocity.ndim - 1))
    return jnp.where(inside, velocity, conditional.astype(jnp.float32))
