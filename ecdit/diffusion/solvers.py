"""Solvers of dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0, on uniform times.

The state is float32 whatever the network's dtype, so that small steps are not rounded away. The loop is a
`fori_loop`: the network is compiled once, however many steps there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from ecdit.diffusion.flow import Velocity

Solver = Callable[[Velocity, Float[Array, "B ..."], int], Float32[Array, "B ..."]]


def euler(velocity: Velocity, x: Float[Array, "B ..."], num_steps: int) -> Float32[Array, "B ..."]:
    """First order, one call of `velocity` a step. `x` is at t = 1, the result at t = 0."""
    return _integrate(lambda x, start, end: velocity(x, start), x, num_steps)


def heun(velocity: Velocity, x: Float[Array, "B ..."], num_steps: int) -> Float32[Array, "B ..."]:
    """Second order, two calls of `velocity` a step. `x` is at t = 1, the result at t = 0.

    The last step is a full one as well: it calls `velocity` at t = 0, where a flow is regular. (Solvers for
    parametrisations that divide by the noise level, as arXiv 2206.00364, must end with an Euler step.)
    """

    def slope(x: Array, start: Array, end: Array) -> Array:
        first = velocity(x, start).astype(jnp.float32)
        second = velocity(_step(x, first, num_steps), end).astype(jnp.float32)
        return (first + second) / 2

    return _integrate(slope, x, num_steps)


def _step(x: Float32[Array, "B ..."], slope: Float[Array, "B ..."], num_steps: int) -> Float32[Array, "B ..."]:
    return x - slope.astype(jnp.float32) / num_steps


def _integrate(slope: Callable[[Array, Array, Array], Array], x: Array, num_steps: int) -> Array:
    """`num_steps` steps of x -= slope(x, start, end) / num_steps; times are float32[B]."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")

    def time(step: Array) -> Array:  # from the index: a running sum would drift, and miss t = 0
        return jnp.full(x.shape[:1], 1 - step / num_steps, jnp.float32)

    def body(step: Array, x: Array) -> Array:
        return _step(x, slope(x, time(step), time(step + 1)), num_steps)

    return jax.lax.fori_loop(0, num_steps, body, x.astype(jnp.float32))


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}
