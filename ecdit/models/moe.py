"""Implements the feed-forward branches: dense, and a mixture of experts with a routing rule (arXiv 2410.02098, Alg. 1).

This is the plain reference. `model.expert_products` replaces the experts' products by functions of `ecdit.tuned` that
are equal up to rounding.

Axes: B batch, N tokens of an image, G groups, S tokens of a group, E experts, C capacity, T slots of an expert in all
groups, d width, f hidden width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ecdit.functions import gelu, named
from ecdit.models.config import DiTConfig
from ecdit.models.layers import layer_norm, param, xavier, xavier_experts
from ecdit.models.routing import (
    Routing,
    expert_capacity,
    expert_choice,
    experts_per_token,
    gates_per_token,
    renormalize_gates,
    token_choice,
)
from ecdit.partitioning import constrain, on_each_shard
from ecdit.tuned import experts as tuned

# Choices per token, and GShard's capacity factor, with as many slots as choices (arXiv 2006.16668).
TOKEN_CHOICES = 2


class RoutingReport(NamedTuple):
    """Describes how a sparse layer routed its tokens, with a leading layer axis if layers are stacked."""

    experts_per_token: Int[Array, "B N"]  # int32
    balance_loss: Float[Array, " G"]  # unweighted, float32
    drop_rate: Float[Array, " G"]  # float32
    z_loss: Float[Array, " G"]  # mean squared logsumexp of the router's logits (arXiv 2202.08906, eq. 5), float32
    expert_gates: Float[Array, "B N E"] | None = None  # see `routing.gates_per_token`; only if asked for


def capacity(config: DiTConfig, group_size: int) -> int:
    """Returns C, the slots of an expert in a group of `group_size` tokens."""
    if config.ffn == "expert_choice":
        return expert_capacity(group_size, config.num_experts, config.capacity_factor)
    return (
        group_size if config.token_choice_dropless else expert_capacity(group_size, config.num_experts, TOKEN_CHOICES)
    )


class FeedForward(nnx.Module):
    """Computes GELU(x W1) W2 without biases, as does each expert."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = param(rngs, xavier, (width, hidden), ("embed", "mlp"))
        self.down = param(rngs, xavier, (hidden, width), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
        """Maps each token independently; returns the dtype of x."""
        tokens = x.reshape(-1, x.shape[-1])  # flat for the reason in MixtureOfExperts.experts
        hidden = gelu(tokens @ self.up[...].astype(x.dtype))
        hidden = constrain(hidden, "batch", "mlp")
        return (hidden @ self.down[...].astype(x.dtype)).reshape(x.shape)


class MixtureOfExperts(nnx.Module):
    """Applies E experts, each a feed-forward network, to the tokens that a routing rule assigns to them."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.config = config
        width, hidden, experts = config.width, config.expert_hidden, config.num_experts
        router_init = jax.nn.initializers.normal(config.router_init_std)
        self.router = param(rngs, router_init, (width, experts), ("small_embed", "features"))
        if config.router_input == "decoupled":
            self.time_router = param(rngs, router_init, (width, experts), ("small_embed", "features"))
        self.up = param(rngs, xavier_experts, (experts, width, hidden), ("experts", "expert_embed", "expert_mlp"))
        self.down = param(rngs, xavier_experts, (experts, hidden, width), ("experts", "expert_mlp", "expert_embed"))
        if config.num_shared_experts:
            self.shared = FeedForward(width, config.num_shared_experts * hidden, rngs)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        group_size: int,
        decoupled: tuple[Float[Array, "B N d"], Float[Array, "B d"]] | None = None,
        with_gates: bool = False,
    ) -> tuple[Float[Array, "B N d"], RoutingReport]:
        """Routes the tokens of x in groups, (B N / group_size, group_size, d), and applies the experts.

        Args:
          x: input of the experts and of a "modulated" router.
          group_size: tokens that compete for experts.
          decoupled: input of a "decoupled" router: tokens and the time's embedding.
          with_gates: whether to report each expert's gate for each token.

        Returns:
          The branch's output in the dtype of x, and the report. Without shared experts, the output of a token that no
          expert took is exactly 0.
        """
        config = self.config
        grouped = x.reshape(-1, group_size, x.shape[-1])
        grouped = constrain(grouped, "batch", None, None)  # a device routes the groups of its own images
        logits = self.router_logits(x, decoupled).reshape(-1, group_size, config.num_experts)
        # Softmax over experts, transpose and top-k yield gates and token indices, (G, E, C). Every remat policy saves
        # them, because a recomputed routing could round differently and choose other tokens.
        routing = jax.tree.map(lambda x: named(x, "routing"), self.route(logits))
        dispatch, combine = DISPATCHES[config.dispatch]
        slots = on_each_shard(dispatch, (0, 0), out_dim=1)(grouped, routing)  # the experts' tokens, (E, G, C, d)
        outputs = self.experts(_to_experts(slots), routing.gate)  # gate GELU(slots W1) W2
        combine = functools.partial(combine, group_size=group_size)
        combined = on_each_shard(combine, (1, 0))(_to_groups(outputs), routing)  # summed for each token, (G, S, d)

        gates = None
        if with_gates:
            gates = on_each_shard(functools.partial(gates_per_token, group_size=group_size))(routing)
            gates = gates.reshape(*x.shape[:2], config.num_experts)
        report = RoutingReport(
            experts_per_token(routing, group_size).reshape(x.shape[:2]),
            routing.balance_loss,
            routing.drop_rate,
            jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1),
            gates,
        )
        # Saving it spares the backward pass a repeated all-to-all.
        output = named(combined.reshape(x.shape).astype(x.dtype), "expert_sum")
        if config.num_shared_experts:
            shared = self.shared(x)
            output = output + (layer_norm(shared) if config.moe_output_norm == "expert" else shared)
        return output, report

    @jax.named_scope("router")
    def router_logits(
        self, x: Float[Array, "B N d"], decoupled: tuple[Float[Array, "B N d"], Float[Array, "B d"]] | None
    ) -> Float[Array, "B N E"]:
        """Returns float32 logits. A decoupled router maps tokens and time (arXiv 2604.12163)."""
        if self.config.router_input == "modulated":
            return _project_float32(x, self.router)
        assert decoupled is not None  # the block passes it to decoupled routers
        tokens, time = decoupled
        return _project_float32(tokens, self.router) + _project_float32(time[:, None], self.time_router)

    @jax.named_scope("router")
    def route(self, logits: Float[Array, "G S E"]) -> Routing:
        """Routes grouped tokens. Softmax and top-k are float32."""
        config, group_size = self.config, logits.shape[1]
        slots = capacity(config, group_size)

        def rule(logits: Float[Array, "G S E"]) -> Routing:
            if config.ffn == "expert_choice":
                routing = expert_choice(logits, slots)
            else:
                routing = token_choice(logits, slots, num_choices=TOKEN_CHOICES)
            if config.gate_norm == "renormalized":
                routing = renormalize_gates(routing, group_size, config.route_scale)
            return routing

        return on_each_shard(rule)(logits)

    def experts(self, slots: Float[Array, "E G C d"], gate: Float[Array, "G E C"]) -> Float[Array, "E G C d"]:
        """Applies each expert to its slots, norms the outputs if configured, and multiplies them by the gates."""
        up, down = self.up[...].astype(slots.dtype), self.down[...].astype(slots.dtype)
        # Groups and slots become one axis T. With two axes, XLA's CPU compiler fuses the GELU's derivative with a
        # transpose for the weight gradient, which takes more than twice the time.
        inputs = slots.reshape(slots.shape[0], -1, slots.shape[-1])
        outputs = EXPERT_PRODUCTS[self.config.expert_products](inputs, up, down)
        outputs = named(outputs, "expert_out").reshape(slots.shape)
        if self.config.moe_output_norm == "expert":
            outputs = layer_norm(outputs)
        # Gates are sent to the experts, so that their gradient needs no second all-to-all of the outputs.
        gate = _to_experts(constrain(gate.swapaxes(0, 1), None, "batch", None))
        outputs = (outputs.astype(jnp.float32) * gate[..., None]).astype(outputs.dtype)
        return outputs if self.config.expert_products == "plain" else tuned.barrier_before_all_to_all(outputs)


def expert_products(
    slots: Float[Array, "E T d"], up: Float[Array, "E d f"], down: Float[Array, "E f d"]
) -> Float[Array, "E T d"]:
    """Returns GELU(slots up) down for every expert. The compiler chooses how to gather the matrices."""
    hidden = jnp.einsum("etd,edf->etf", named(slots, "expert_in"), up)
    # Hidden units stay on the devices of their slots; `fsdp` shards only the matrices.
    hidden = constrain(gelu(named(hidden, "expert_hidden")), "experts", "expert_groups", "mlp")
    return jnp.einsum("etf,efd->etd", hidden, down)


EXPERT_PRODUCTS = {"plain": expert_products, "scattered": tuned.scattered, "halves": tuned.halves}


# A pair of constraints makes the all-to-all: slots are first on the devices of their groups, then on those of their
# experts, or the reverse. With only one of them the compiler may gather all tokens on every device instead.


def _to_experts(x: Float[Array, "E G C *d"]) -> Float[Array, "E G C *d"]:
    """Sends slots to the devices of their experts. `on_each_shard` or a constraint has left them with their groups."""
    return constrain(x, "experts", "expert_groups", *[None] * (x.ndim - 2))


def _to_groups(x: Float[Array, "E G C d"]) -> Float[Array, "E G C d"]:
    """Sends slots back to the devices of their groups."""
    return constrain(constrain(x, "experts", "expert_groups", None, None), None, "batch", None, None)


def _project_float32(x: Float[Array, "B N d"], kernel: nnx.Param) -> Float[Array, "B N E"]:
    # Without HIGHEST a TPU multiplies float32 in bfloat16 passes, and near-ties would flip.
    kernel = kernel[...].astype(jnp.float32)
    return jnp.einsum("bnd,de->bne", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def gather(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """Returns the token in every slot, by indexing."""
    # Takes rows of one flat array in output order, because a gather inside each group would need a transpose.
    return jnp.take(x.reshape(-1, x.shape[-1]), _flat_index(routing, x.shape[1]), axis=0, mode="clip")


def scatter(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """Returns the float32 sum of each token's slots."""
    tokens = jnp.zeros((y.shape[1] * group_size, y.shape[-1]), jnp.float32)
    slots = tokens.at[_flat_index(routing, group_size)].add(y.astype(jnp.float32))
    return slots.reshape(y.shape[1], group_size, -1)


def _flat_index(routing: Routing, group_size: int) -> Int[Array, "E G C"]:
    """Returns the index of every slot's token among the tokens of all groups."""
    first = jnp.arange(routing.index.shape[0], dtype=jnp.int32) * group_size
    return jnp.swapaxes(routing.index + first[:, None, None], 0, 1)


def one_hot_dispatch(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """Computes `gather` as a matrix product, except that empty slots are zero.

    It stays as a second opinion on `gather`, and for compilers that make gathers slow.
    """
    chosen = jax.nn.one_hot(routing.index, x.shape[1], dtype=x.dtype) * routing.taken[..., None].astype(x.dtype)
    return jnp.einsum("gecs,gsd->egcd", chosen, x)


def one_hot_combine(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """Computes `scatter` as a matrix product that accumulates in float32."""
    chosen = jax.nn.one_hot(routing.index, group_size, dtype=y.dtype) * routing.taken[..., None].astype(y.dtype)
    return jnp.einsum("gecs,egcd->gsd", chosen, y, preferred_element_type=jnp.float32)


DISPATCHES = {"gather": (gather, scatter), "one_hot": (one_hot_dispatch, one_hot_combine)}
