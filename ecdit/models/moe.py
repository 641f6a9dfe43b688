"""The feed-forward branches: dense, and a mixture of experts behind a routing rule (arXiv 2410.02098, Algorithm 1).

Axes: B batch, N tokens of an image, G groups, S tokens of a group, E experts, C capacity, d width, f hidden width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ecdit.models.config import DiTConfig
from ecdit.models.layers import gelu, layer_norm, matrix, named, param, xavier_experts
from ecdit.models.routing import Routing, expert_capacity, expert_choice, experts_per_token, token_choice
from ecdit.partitioning import constrain, on_each_shard

# GShard's capacity factor: as many slots as first and second choices (arXiv 2006.16668).
TOKEN_CHOICES = 2


class RoutingReport(NamedTuple):
    """What one sparse layer did with its tokens (with a leading layer axis where layers are stacked)."""

    experts_per_token: Int[Array, "B N"]  # int32
    balance_loss: Float[Array, " G"]  # unweighted, float32
    drop_rate: Float[Array, " G"]  # float32


def capacity(config: DiTConfig, group_size: int) -> int:
    """C: the slots of an expert in a group of `group_size` tokens."""
    if config.ffn == "expert_choice":
        return expert_capacity(group_size, config.num_experts, config.capacity_factor)
    return (
        group_size if config.token_choice_dropless else expert_capacity(group_size, config.num_experts, TOKEN_CHOICES)
    )


class FeedForward(nnx.Module):
    """GELU(x W1) W2 without biases: what each expert is, too."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = matrix(rngs, (width,), (hidden,), ("embed", "mlp"))
        self.down = matrix(rngs, (hidden,), (width,), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
        """Maps every token alone, in the dtype of x."""
        tokens = x.reshape(-1, x.shape[-1])  # flat: see MixtureOfExperts.experts
        hidden = gelu(tokens @ self.up[...].astype(x.dtype))
        hidden = constrain(hidden, "batch", "mlp")
        return (hidden @ self.down[...].astype(x.dtype)).reshape(x.shape)


class MixtureOfExperts(nnx.Module):
    """E experts, each a `FeedForward`, over the tokens that a routing rule gives them."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.config = config
        width, hidden, experts = config.width, config.ffn_multiplier * config.width, config.num_experts
        router_init = jax.nn.initializers.normal(config.router_init_std)
        self.router = matrix(rngs, (width,), (experts,), ("embed", "features"), router_init)
        self.up = param(rngs, xavier_experts, (experts, width, hidden), ("experts", "expert_embed", "mlp"))
        self.down = param(rngs, xavier_experts, (experts, hidden, width), ("experts", "mlp", "expert_embed"))

    def __call__(self, x: Float[Array, "B N d"], group_size: int) -> tuple[Float[Array, "B N d"], RoutingReport]:
        """Routes the tokens of x, regrouped row by row to (B N / group_size, group_size, d).

        Returns the branch's output in the dtype of x, exactly 0 for a token that no expert took, and the report.
        """
        grouped = x.reshape(-1, group_size, x.shape[-1])
        grouped = constrain(grouped, "batch", None, None)
        # Saved whatever else is recomputed: rounded differently, a second routing could differ from the first.
        routing = jax.tree.map(lambda x: named(x, "routing"), self.route(grouped))
        dispatch, combine = (
            (one_hot_dispatch, one_hot_combine) if self.config.dispatch == "one_hot" else (gather, scatter)
        )
        # Each exchange is a pair of constraints: the slots where their groups are, then where their experts are. With
        # one of them alone the compiler may gather every token everywhere instead.
        slots = constrain(dispatch(grouped, routing), None, "batch", None, None)
        outputs = self.experts(constrain(slots, "experts", "expert_groups", None, None))
        if self.config.moe_output_norm == "expert":
            outputs = layer_norm(outputs)
        outputs = constrain(outputs, "experts", "expert_groups", None, None)
        outputs = constrain(outputs, None, "batch", None, None)
        combined = constrain(combine(outputs, routing, group_size), "batch", None, None)
        report = RoutingReport(
            experts_per_token(routing, group_size).reshape(x.shape[:2]), routing.balance_loss, routing.drop_rate
        )
        return combined.reshape(x.shape).astype(x.dtype), report

    def route(self, x: Float[Array, "G S d"]) -> Routing:
        """The routing of grouped tokens; logits, softmax and top-k in float32 whatever the dtype of x."""
        config, group_size = self.config, x.shape[1]
        # HIGHEST: a TPU multiplies float32 in bfloat16 passes otherwise, and near-ties would flip.
        logits = jnp.einsum(
            "gsd,de->gse",
            x.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        slots = capacity(config, group_size)
        if config.ffn == "expert_choice":
            return on_each_shard(functools.partial(expert_choice, capacity=slots))(logits)
        return on_each_shard(functools.partial(token_choice, capacity=slots, num_choices=TOKEN_CHOICES))(logits)

    def experts(self, inputs: Float[Array, "E G C d"]) -> Float[Array, "E G C d"]:
        """Every expert on its own slots."""
        up, down = self.up[...].astype(inputs.dtype), self.down[...].astype(inputs.dtype)
        # Groups and slots as one axis t: with two of them, XLA's CPU compiler fuses the GELU's derivative with a
        # transpose for the weight gradient, which takes more than twice the time.
        slots = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        hidden = gelu(jnp.einsum("etd,edf->etf", slots, up))
        hidden = constrain(hidden, "experts", "expert_groups", "mlp")
        return jnp.einsum("etf,efd->etd", hidden, down).reshape(inputs.shape)


def gather(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """The token of every slot, by index."""
    return jax.vmap(lambda tokens, index: tokens[index], out_axes=1)(x, routing.index)


def scatter(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """Adds gate * y of every slot to its token, in float32."""

    def add(slots: Float[Array, "E C d"], index: Int[Array, "E C"]) -> Float[Array, "S d"]:
        return jnp.zeros((group_size, slots.shape[-1]), jnp.float32).at[index].add(slots)

    weighted = y.astype(jnp.float32) * routing.gate.swapaxes(0, 1)[..., None]
    return jax.vmap(add, in_axes=(1, 0))(weighted, routing.index)


def one_hot_dispatch(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """`gather` as a matrix product, except that slots which took no token get zeros."""
    chosen = jax.nn.one_hot(routing.index, x.shape[1], dtype=x.dtype) * routing.taken[..., None].astype(x.dtype)
    return jnp.einsum("gecs,gsd->egcd", chosen, x)


def one_hot_combine(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """`scatter` as a matrix product that accumulates in float32."""
    chosen = jax.nn.one_hot(routing.index, group_size, dtype=y.dtype) * routing.taken[..., None].astype(y.dtype)
    weighted = (y.astype(jnp.float32) * routing.gate.swapaxes(0, 1)[..., None]).astype(y.dtype)
    return jnp.einsum("gecs,egcd->gsd", chosen, weighted, preferred_element_type=jnp.float32)
