"""Layers with annotated parameters, norms, and stacks of equal blocks. Axes: B batch, i inputs, o outputs, d width."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ecdit.functions import NORM_EPSILON, named
from ecdit.tuned.fusion_boundary import fusion_boundary

Block = TypeVar("Block", bound=nnx.Module)
Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]

zeros = jax.nn.initializers.zeros
xavier = jax.nn.initializers.xavier_uniform()
# Initialises [E, in, out], each expert as if it were alone.
xavier_experts = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=0)

# Activations that the forward pass saves; the backward pass recomputes the others. Every policy saves "routing" (see
# moe.MixtureOfExperts). Products with a batch dimension (the expert, or image and head) are saved only by name.
SAVED_NAMES = ("routing", "norm", "attention_out", "expert_in", "expert_hidden", "expert_out", "expert_sum")
ON_CHIP = ("routing", "norm")  # policy "offload" keeps these on the chip and sends the others to the host
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=ON_CHIP,
        names_which_can_be_offloaded=[name for name in SAVED_NAMES if name not in ON_CHIP],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention_out": jax.checkpoint_policies.save_only_these_names("attention_out", "routing"),
    "full": jax.checkpoint_policies.save_only_these_names("routing"),
}


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """Makes a float32 parameter whose dimensions have the logical `axes` (see partitioning.AXIS_RULES)."""
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), out_sharding=tuple(axes))


class Linear(nnx.Module):
    """Computes x @ kernel + bias in the dtype of x."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Initializer = xavier,
    ):
        self.kernel = param(rngs, init, (inputs, outputs), axes)
        self.bias = param(rngs, zeros, (outputs,), axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Maps the last axis."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class Mlp(nnx.Module):
    """Maps a condition: inputs -> width -> width, with SiLU between them."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.hidden = Linear(inputs, width, ("features", "embed"), rngs)
        self.out = Linear(width, width, ("embed", "mlp"), rngs)

    def __call__(self, x: Float[Array, "B i"]) -> Float[Array, "B d"]:
        """Maps the last axis."""
        return self.out(jax.nn.silu(self.hidden(x)))


def layer_norm(x: Float[Array, "*b d"], epsilon: float = NORM_EPSILON) -> Float[Array, "*b d"]:
    """Applies LayerNorm without parameters, in float32; returns the dtype of x."""
    y = x.astype(jnp.float32)
    # Computes both moments in one pass over x. The centred form reads x twice, which costs more than the arithmetic.
    mean, square = y.mean(axis=-1, keepdims=True), jnp.square(y).mean(axis=-1, keepdims=True)
    # Both are small. Without saving them the backward pass would read x once more.
    mean, square = named(mean, "norm"), named(square, "norm")
    variance = jnp.maximum(square - jnp.square(mean), 0.0)
    return ((y - mean) * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], Block], count: int, rngs: nnx.Rngs) -> Block:
    """Makes `count` independently initialised blocks as one, whose parameters have a leading "layers" axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make_all(rngs: nnx.Rngs) -> Block:
        return make(rngs)

    return make_all(rngs)


def scan_stack(
    blocks: Block, apply: Callable[[Block, Any], tuple[Any, Any]], carry: Any, remat: str, unroll: int = 1
) -> tuple[Any, Any]:
    """Runs the blocks of a `stack` in order: apply(block, carry) -> (carry, output); outputs are stacked.

    `remat` names one of REMAT_POLICIES; `unroll` is the number of blocks in one iteration of the loop, which
    `fusion_boundary` keeps apart.
    """
    graphdef, params = nnx.split(blocks)

    def step(carry: Any, params: nnx.State) -> tuple[Any, Any]:
        if unroll > 1:
            carry = jax.tree.map(fusion_boundary, carry)
        return apply(nnx.merge(graphdef, params), carry)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, params, unroll=unroll)
