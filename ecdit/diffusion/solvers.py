"""Solves dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0, on uniform times.

The state is float32 for any dtype of the network, so that small steps are not rounded away. The loop is a `scan`, which
compiles the network once for any number of steps.

As in jax.grad, `has_aux` means that `velocity` returns (velocity, aux) with arrays in aux. The solver then returns
(x, aux), with the aux of each step's first call stacked along a new first axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ecdit.diffusion.flow import Velocity

Solver = Callable[..., Any]  # (velocity, x[B, ...], num_steps, has_aux = False) -> float32[B, ...], or with aux


def euler(velocity: Velocity, x: Float[Array, "B ..."], num_steps: int, has_aux: bool = False) -> Any:
    """Integrates to first order, with one call of `velocity` per step. `x` is at t = 1, the result at t = 0."""
    call = _with_aux(velocity, has_aux)
    return _integrate(lambda x, start, end: call(x, start), x, num_steps, has_aux)


def heun(velocity: Velocity, x: Float[Array, "B ..."], num_steps: int, has_aux: bool = False) -> Any:
    """Integrates to second order, with two calls of `velocity` per step. `x` is at t = 1, the result at t = 0.

    The last step is also a full one: it calls `velocity` at t = 0, where a flow is regular. (Solvers for
    parametrisations that divide by the noise level, as in arXiv 2206.00364, must end with an Euler step.)
    """
    call = _with_aux(velocity, has_aux)

    def slope(x: Array, start: Array, end: Array) -> tuple[Array, Any]:
        first, aux = call(x, start)
        first = first.astype(jnp.float32)
        second = call(_step(x, first, num_steps), end)[0].astype(jnp.float32)
        return (first + second) / 2, aux

    return _integrate(slope, x, num_steps, has_aux)


def _with_aux(velocity: Callable[..., Any], has_aux: bool) -> Callable[[Array, Array], tuple[Array, Any]]:
    return velocity if has_aux else lambda x, time: (velocity(x, time), None)


def _step(x: Array, slope: Array, num_steps: int) -> Array:
    return x - slope.astype(jnp.float32) / num_steps


def _integrate(slope: Callable[..., tuple[Array, Any]], x: Array, num_steps: int, has_aux: bool) -> Any:
    """Does `num_steps` steps of x -= slope(x, start, end) / num_steps; times are float32[B]."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")

    def time(step: Array) -> Array:  # from the index, because a running sum would drift and miss t = 0
        return jnp.full(x.shape[:1], 1 - step / num_steps, jnp.float32)

    def body(x: Array, step: Array) -> tuple[Array, Any]:
        direction, aux = slope(x, time(step), time(step + 1))
        return _step(x, direction, num_steps), aux

    x, aux = jax.lax.scan(body, x.astype(jnp.float32), jnp.arange(num_steps))
    return (x, aux) if has_aux else x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}
