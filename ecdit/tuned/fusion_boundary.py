"""Keeps XLA from computing a value anew in every fusion that uses it, on CPUs."""

import jax
from jaxtyping import Array


def fusion_boundary(x: Array) -> Array:
    """Returns x, which CPUs then compute once and store; the same holds for its gradient.

    XLA's CPU compiler copies cheap computations into all fusions that use their result. A residual stream through
    unrolled blocks is a chain of additions with many uses, so each block would compute all earlier additions again, and
    in the backward pass all later ones: work that grows with the square of the depth. That compiler drops
    `jax.lax.optimization_barrier` before it fuses, but it fuses nothing across a conditional. Both branches are the
    identity, so the condition does not matter; it must only be unknown to the compiler.

    Other platforms do not do this: there, it is the identity.
    """

    def store(x: Array) -> Array:
        # JAX drops a conditional whose branches both return the argument, so one of them multiplies it by 1.
        return jax.lax.cond(x[(0,) * x.ndim] < 0, lambda x: x, lambda x: x * 1, x)

    return jax.lax.platform_dependent(x, cpu=store, default=lambda x: x)
