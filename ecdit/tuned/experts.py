"""Computes the experts' products for TPUs, either with hand-written reduce-scatters over `fsdp` or in halves.

Both compute `moe.expert_products`; the config field `model.expert_products` chooses. They save slots as the all-to-all
wrote them (see `saved_product`).

Axes: E experts, T slots of an expert (of all groups and places), d width, f hidden width, i inputs, o outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ecdit.functions import gelu, named
from ecdit.partitioning import AXIS_RULES, axis_size, constrain, logical_spec
from ecdit.tuned.saved_product import saved_product

# Logical axes of slots and hidden units on the devices of their experts, and of the experts' matrices.
_SLOTS = ("experts", "expert_groups", None)
_HIDDEN = ("experts", "expert_groups", "mlp")
_UP = ("experts", "expert_embed", "expert_mlp")
_DOWN = ("experts", "expert_mlp", "expert_embed")


def scattered(
    slots: Float[Array, "E T d"], up: Float[Array, "E d f"], down: Float[Array, "E f d"]
) -> Float[Array, "E T d"]:
    """Lets the compiler gather the matrices over `fsdp`, and reduce-scatters their gradients explicitly."""
    saved = named(slots, "expert_in")
    hidden: Any = saved_product(slots, saved, up, ("etd,edf->etf", "etf,edf->etd"), up_gradient)
    hidden = constrain(gelu(named(hidden, "expert_hidden")), *_HIDDEN)
    return saved_product(hidden, hidden, down, ("etf,efd->etd", "etd,efd->etf"), down_gradient)


def halves(
    slots: Float[Array, "E T d"], up: Float[Array, "E d f"], down: Float[Array, "E f d"]
) -> Float[Array, "E T d"]:
    """Multiplies by the chip's own half of a matrix while the other half is in transit (`fsdp` is 2).

    A TPU can hide a gather only behind a matrix product, and the first product would need the gathered matrix. Each
    half of the second product is rounded to the dtype of the slots.
    """

    def on_each(slots: Array, saved: Array, up: Array, down: Array) -> Array:
        slots, saved = (jax.lax.pcast(x, ("tensor",), to="varying") for x in (slots, saved))
        up, down = (jax.lax.pcast(kernel, ("slices", "data"), to="varying") for kernel in (up, down))
        outputs = []
        for half in ((up, down), jax.lax.ppermute((up, down), "fsdp", [(0, 1), (1, 0)])):
            hidden: Any = saved_product(slots, saved, half[0], ("etd,edf->etf", "etf,edf->etd"), _local_gradient)
            outputs.append(jnp.einsum("etf,efd->etd", gelu(named(hidden, "expert_hidden")), half[1]))
        return jax.lax.psum(sum(outputs), "tensor")

    specs = [logical_spec(axes, "experts") for axes in (_SLOTS, _SLOTS, _UP, _DOWN)]
    run = jax.shard_map(on_each, in_specs=tuple(specs), out_specs=specs[0])
    return run(slots, named(slots, "expert_in"), up, down)


def barrier_before_all_to_all(outputs: Float[Array, "E G C d"]) -> Float[Array, "E G C d"]:
    """Returns the experts' gated outputs, behind a barrier.

    Without it XLA converts the all-to-all result to float32 in a separate pass of the backward pass.
    """
    return jax.lax.optimization_barrier(outputs)


def up_gradient(
    inputs: Float[Array, "E T d"], gradient: Float[Array, "E T f"]
) -> tuple[Float[Array, "E d f"], Float[Array, "E T f"]]:
    """Returns the gradient of the experts' first matrix and the unchanged `gradient` of their hidden units."""
    if axis_size("fsdp") == 1:
        return _local_gradient(inputs, gradient)
    # Computed transposed: scattering over the last dimension makes the TPU copy.
    return down_gradient(gradient, inputs)[0].swapaxes(1, 2), gradient


def down_gradient(
    hidden: Float[Array, "E T f"], gradient: Float[Array, "E T d"]
) -> tuple[Float[Array, "E f d"], Float[Array, "E T d"]]:
    """Returns the gradient of the experts' second matrix and the unchanged `gradient` of their outputs.

    The matrix's gradient is summed over the chips with other slots of the same experts. Each chip keeps its part of the
    hidden units.
    """
    if axis_size("fsdp") == 1:
        return _local_gradient(hidden, gradient)
    others = tuple(axis for axis in AXIS_RULES["expert_groups"] if axis != "fsdp")

    def on_each(hidden: Array, gradient: Array) -> tuple[Array, Array]:
        alone = hidden.shape[0] == 1  # a TPU would all-reduce [1, f, d] instead of scattering it
        product = (
            jnp.einsum("tf,td->fd", hidden[0], gradient[0]) if alone else jnp.einsum("etf,etd->efd", hidden, gradient)
        )
        # The barrier puts this product before the one that needs the gathered matrix, to hide the gather behind it.
        product, gradient = jax.lax.optimization_barrier((product, gradient))
        part = jax.lax.psum_scatter(product, "fsdp", scatter_dimension=product.ndim - 2, tiled=True)
        part = part[None] if alone else part
        return jax.lax.psum(part, others), gradient

    tokens = logical_spec(_SLOTS, "gradient")
    in_specs, out_specs = (logical_spec(_HIDDEN, "hidden"), tokens), (logical_spec(_DOWN, "gradient"), tokens)
    return jax.shard_map(on_each, in_specs=in_specs, out_specs=out_specs, check_vma=False)(hidden, gradient)


def _local_gradient(
    inputs: Float[Array, "E T i"], gradient: Float[Array, "E T o"]
) -> tuple[Float[Array, "E i o"], Float[Array, "E T o"]]:
    return jnp.einsum("eti,eto->eio", inputs, gradient), gradient
