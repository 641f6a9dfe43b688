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
from ecdit.models.layers import gelu, layer_norm, named, param, saved_product, xavier, xavier_experts
from ecdit.models.routing import (
    Routing,
    expert_capacity,
    expert_choice,
    experts_per_token,
    renormalize_gates,
    token_choice,
)
from ecdit.partitioning import AXIS_RULES, axis_size, constrain, logical_spec, on_each_shard

# GShard's capacity factor: as many slots as first and second choices (arXiv 2006.16668).
TOKEN_CHOICES = 2


class RoutingReport(NamedTuple):
    """What one sparse layer did with its tokens (with a leading layer axis where layers are stacked)."""

    experts_per_token: Int[Array, "B N"]  # int32
    balance_loss: Float[Array, " G"]  # unweighted, float32
    drop_rate: Float[Array, " G"]  # float32
    z_loss: Float[Array, " G"]  # mean squared logsumexp of the router's logits (arXiv 2202.08906, eq. 5), float32


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
        self.up = param(rngs, xavier, (width, hidden), ("embed", "mlp"))
        self.down = param(rngs, xavier, (hidden, width), ("mlp", "embed"))

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
    ) -> tuple[Float[Array, "B N d"], RoutingReport]:
        """Routes the tokens of x, regrouped row by row to (B N / group_size, group_size, d).

        Args:
          x: what the experts see, and the router where its input is "modulated".
          group_size: tokens that compete for experts.
          decoupled: what a "decoupled" router sees: tokens, and the time's embedding.

        Returns the branch's output in the dtype of x, exactly 0 for a token that no expert took unless there are shared
        experts, and the report.
        """
        grouped = x.reshape(-1, group_size, x.shape[-1])
        grouped = constrain(grouped, "batch", None, None)
        # Saved whatever else is recomputed: rounded differently, a second routing could differ from the first.
        logits = self.router_logits(x, decoupled).reshape(-1, group_size, self.config.num_experts)
        routing = jax.tree.map(lambda x: named(x, "routing"), self.route(logits))
        dispatch, combine = (
            (one_hot_dispatch, one_hot_combine) if self.config.dispatch == "one_hot" else (gather, scatter)
        )
        # Each exchange is a pair of constraints: the slots where their groups are, then where their experts are. With
        # one of them alone the compiler may gather every token everywhere instead.
        slots = on_each_shard(dispatch, (0, 0), out_dim=1)(grouped, routing)
        slots = constrain(slots, "experts", "expert_groups", None, None)
        outputs = self.experts(slots)
        if self.config.moe_output_norm == "expert":
            outputs = layer_norm(outputs)
        # Gates go to the experts, so that their gradient needs no second exchange of the outputs.
        gate = constrain(routing.gate.swapaxes(0, 1), None, "batch", None)
        gate = constrain(gate, "experts", "expert_groups", None)
        outputs = (outputs.astype(jnp.float32) * gate[..., None]).astype(outputs.dtype)
        # Else, on the way back, what the exchange wrote is converted to float32 in a pass of its own.
        outputs = jax.lax.optimization_barrier(outputs)
        outputs = constrain(outputs, "experts", "expert_groups", None, None)
        outputs = constrain(outputs, None, "batch", None, None)
        combine = functools.partial(combine, group_size=group_size)
        combined = on_each_shard(combine, (1, 0))(outputs, routing)
        report = RoutingReport(
            experts_per_token(routing, group_size).reshape(x.shape[:2]),
            routing.balance_loss,
            routing.drop_rate,
            jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1),
        )
        output = named(combined.reshape(x.shape).astype(x.dtype), "expert_sum")  # else its exchange is done again
        if self.config.num_shared_experts:
            shared = self.shared(x)
            output = output + (layer_norm(shared) if self.config.moe_output_norm == "expert" else shared)
        return output, report

    @jax.named_scope("router")
    def router_logits(
        self, x: Float[Array, "B N d"], decoupled: tuple[Float[Array, "B N d"], Float[Array, "B d"]] | None
    ) -> Float[Array, "B N E"]:
        """Of the router, float32; where it is decoupled, a map of (time, tokens) (arXiv 2604.12163)."""
        if self.config.router_input == "modulated":
            return _project_float32(x, self.router)
        tokens, time = decoupled
        return _project_float32(tokens, self.router) + _project_float32(time[:, None], self.time_router)

    @jax.named_scope("router")
    def route(self, logits: Float[Array, "G S E"]) -> Routing:
        """The routing of grouped tokens; softmax and top-k in float32."""
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

    def experts(self, inputs: Float[Array, "E G C d"]) -> Float[Array, "E G C d"]:
        """Every expert on its own slots."""
        up, down = self.up[...].astype(inputs.dtype), self.down[...].astype(inputs.dtype)
        # Groups and slots as one axis t: with two of them, XLA's CPU compiler fuses the GELU's derivative with a
        # transpose for the weight gradient, which takes more than twice the time.
        slots = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        saved = named(slots, "expert_in")
        outputs = (_by_halves if axis_size("fsdp") == 2 else _by_gathering)(slots, saved, up, down)
        return named(outputs, "expert_out").reshape(inputs.shape)


# Logical axes of slots and hidden units where they are with their experts, and of the experts' matrices.
_SLOTS = ("experts", "expert_groups", None)
_HIDDEN = ("experts", "expert_groups", "mlp")
_UP = ("experts", "expert_embed", "expert_mlp")
_DOWN = ("experts", "expert_mlp", "expert_embed")


def _by_gathering(
    slots: Float[Array, "E T d"], saved: Float[Array, "E T d"], up: Float[Array, "E d f"], down: Float[Array, "E f d"]
) -> Float[Array, "E T d"]:
    """Experts whose matrices the compiler gathers over `fsdp`."""
    hidden = saved_product(slots, saved, up, ("etd,edf->etf", "etf,edf->etd"), up_gradient)
    hidden = constrain(gelu(named(hidden, "expert_hidden")), *_HIDDEN)
    return saved_product(hidden, hidden, down, ("etf,efd->etd", "etd,efd->etf"), down_gradient)


def _by_halves(
    slots: Float[Array, "E T d"], saved: Float[Array, "E T d"], up: Float[Array, "E d f"], down: Float[Array, "E f d"]
) -> Float[Array, "E T d"]:
    """Experts whose matrices lie on two chips each: products with one's own half, while the other's is on its way.

    A TPU hides a gather behind a matrix product only, and the first product would need what is gathered. Each half of
    the second product is rounded to the dtype of the slots.
    """

    def on_each(slots: Array, saved: Array, up: Array, down: Array) -> Array:
        slots, saved = (jax.lax.pcast(x, ("tensor",), to="varying") for x in (slots, saved))
        up, down = (jax.lax.pcast(kernel, ("slices", "data"), to="varying") for kernel in (up, down))
        outputs = []
        for half in ((up, down), jax.lax.ppermute((up, down), "fsdp", [(0, 1), (1, 0)])):
            hidden = saved_product(slots, saved, half[0], ("etd,edf->etf", "etf,edf->etd"), _local_gradient)
            outputs.append(jnp.einsum("etf,efd->etd", gelu(named(hidden, "expert_hidden")), half[1]))
        return jax.lax.psum(sum(outputs), "tensor")

    specs = [logical_spec(axes, "experts") for axes in (_SLOTS, _SLOTS, _UP, _DOWN)]
    return jax.shard_map(on_each, in_specs=tuple(specs), out_specs=specs[0])(slots, saved, up, down)


def _local_gradient(
    inputs: Float[Array, "E T i"], gradient: Float[Array, "E T o"]
) -> tuple[Float[Array, "E i o"], Float[Array, "E T o"]]:
    return jnp.einsum("eti,eto->eio", inputs, gradient), gradient


def up_gradient(
    inputs: Float[Array, "E T d"], gradient: Float[Array, "E T f"]
) -> tuple[Float[Array, "E d f"], Float[Array, "E T f"]]:
    """Of the experts' first matrix, by their inputs and the gradient of their hidden units; and that gradient."""
    if axis_size("fsdp") == 1:
        return _local_gradient(inputs, gradient)
    # As the other one's, with hidden units before the width: of the last dimension a TPU scatters copies.
    return down_gradient(gradient, inputs)[0].swapaxes(1, 2), gradient


def down_gradient(
    hidden: Float[Array, "E T f"], gradient: Float[Array, "E T d"]
) -> tuple[Float[Array, "E f d"], Float[Array, "E T d"]]:
    """Of the experts' second matrix, by their hidden units and the gradient of their outputs; and that gradient.

    Summed over the chips that have other slots of the same experts, each of which keeps its part of the hidden units.
    """
    if axis_size("fsdp") == 1:
        return _local_gradient(hidden, gradient)
    others = tuple(axis for axis in AXIS_RULES["expert_groups"] if axis != "fsdp")

    def on_each(hidden: Array, gradient: Array) -> tuple[Array, Array]:
        alone = hidden.shape[0] == 1  # of an array [1, f, d] a TPU would send the whole sum to every chip
        product = (
            jnp.einsum("tf,td->fd", hidden[0], gradient[0]) if alone else jnp.einsum("etf,etd->efd", hidden, gradient)
        )
        # This product comes before the one that needs the gathered matrix, so that the gather can go on behind it.
        product, gradient = jax.lax.optimization_barrier((product, gradient))
        part = jax.lax.psum_scatter(product, "fsdp", scatter_dimension=product.ndim - 2, tiled=True)
        part = part[None] if alone else part
        return jax.lax.psum(part, others), gradient

    tokens = logical_spec(_SLOTS, "gradient")
    in_specs, out_specs = (logical_spec(_HIDDEN, "hidden"), tokens), (logical_spec(_DOWN, "gradient"), tokens)
    return jax.shard_map(on_each, in_specs=in_specs, out_specs=out_specs, check_vma=False)(hidden, gradient)


def _project_float32(x: Float[Array, "B N d"], kernel: nnx.Param) -> Float[Array, "B N E"]:
    # HIGHEST: a TPU multiplies float32 in bfloat16 passes otherwise, and near-ties would flip.
    kernel = kernel[...].astype(jnp.float32)
    return jnp.einsum("bnd,de->bne", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def gather(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """The token of every slot, by index."""
    # Rows of one flat array, in the order that they leave in: a gather inside each group is transposed afterwards.
    return jnp.take(x.reshape(-1, x.shape[-1]), _flat_index(routing, x.shape[1]), axis=0, mode="clip")


def scatter(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """Adds every slot to its token, in float32."""
    tokens = jnp.zeros((y.shape[1] * group_size, y.shape[-1]), jnp.float32)
    slots = tokens.at[_flat_index(routing, group_size)].add(y.astype(jnp.float32))
    return slots.reshape(y.shape[1], group_size, -1)


def _flat_index(routing: Routing, group_size: int) -> Int[Array, "E G C"]:
    """The token of every slot, among those of all groups."""
    first = jnp.arange(routing.index.shape[0], dtype=jnp.int32) * group_size
    return jnp.swapaxes(routing.index + first[:, None, None], 0, 1)


def one_hot_dispatch(x: Float[Array, "G S d"], routing: Routing) -> Float[Array, "E G C d"]:
    """`gather` as a matrix product, except that slots which took no token get zeros."""
    chosen = jax.nn.one_hot(routing.index, x.shape[1], dtype=x.dtype) * routing.taken[..., None].astype(x.dtype)
    return jnp.einsum("gecs,gsd->egcd", chosen, x)


def one_hot_combine(y: Float[Array, "E G C d"], routing: Routing, group_size: int) -> Float[Array, "G S d"]:
    """`scatter` as a matrix product that accumulates in float32."""
    chosen = jax.nn.one_hot(routing.index, group_size, dtype=y.dtype) * routing.taken[..., None].astype(y.dtype)
    return jnp.einsum("gecs,egcd->gsd", chosen, y, preferred_element_type=jnp.float32)
