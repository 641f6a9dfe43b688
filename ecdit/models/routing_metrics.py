"""Computes the routing metrics and the auxiliary losses of a denoiser with experts.

Axes: P sparse layers, B batch, N tokens of an image.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ecdit.components import Metrics
from ecdit.models.config import DiTConfig
from ecdit.models.moe import RoutingReport


def routing_losses(report: RoutingReport, config: DiTConfig) -> tuple[Float[Array, ""], Metrics]:
    """Returns the weighted sum of the configured auxiliary losses, and each unweighted loss as a metric."""
    loss, metrics = jnp.float32(0.0), {}
    if config.ffn == "token_choice":
        metrics["balance_loss"] = report.balance_loss.mean()
        metrics["drop_rate"] = report.drop_rate.mean()
        loss = loss + config.balance_loss_weight * metrics["balance_loss"]
    if config.router_z_loss:
        metrics["router_z_loss"] = report.z_loss.mean()
        loss = loss + config.router_z_loss * metrics["router_z_loss"]
    return loss, metrics


def coverage(report: RoutingReport) -> Metrics:
    """Returns, per sparse layer, the share of tokens with 0, 1, 2 and 3 or more experts, and the most on one token.

    All are float32[P].
    """
    counts = report.experts_per_token
    shares = {f"coverage_{n}": (counts == n).mean(axis=(1, 2)) for n in range(3)}
    return shares | {
        "coverage_3_or_more": (counts >= 3).mean(axis=(1, 2)),
        "coverage_most": counts.max(axis=(1, 2)).astype(jnp.float32),
    }


def router_grad_norm(gradients: dict[str, Any]) -> Float[Array, " P"]:
    """Returns the norm of the router's gradient in every sparse layer, float32; empty without experts."""
    experts = gradients["pairs"]["even"].get("experts")
    if experts is None:
        return jnp.zeros((0,))
    routers = [experts[name] for name in ("router", "time_router") if name in experts]
    return jnp.sqrt(sum(jnp.square(router).sum(axis=(1, 2)) for router in routers))
