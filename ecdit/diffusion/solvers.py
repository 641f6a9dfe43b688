"""Solvers of dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0.

Step i goes from time t_i to t_(i+1). Times are uniform, or shifted towards noise (arXiv 2403.03206, equation 23):

    t_i = s u_i / (1 + (s - 1) u_i),  u_i = 1 - i / num_steps      (1)  s the shift; 1 leaves times uniform

    euler            order 1, one call of the network a step
    heun             order 2, two calls
    multistep        order 2, one call: Adams and Bashforth's formula, with the velocity of the step before
    stochastic_heun  heun that adds noise before each step (arXiv 2206.00364, algorithm 2)

The state is float32 for any dtype of the network, so that small steps are not rounded away. The loop is a `scan`, which
compiles the network once for any number of steps.

As in jax.grad, `has_aux` means that `velocity` returns (velocity, aux) with arrays in aux. The solver then returns
(x, aux), with the aux of each step's first call stacked along a new first axis.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Key

from ecdit.diffusion.flow import Velocity

# (velocity, x[B, ...], num_steps, has_aux = False, shift = 1) -> float32[B, ...], or that and aux
Solver = Callable[..., Any]
MOST_CHURN = math.sqrt(2) - 1  # of one step: at most as much noise is added as there is


class Step(NamedTuple):
    """One step."""

    number: Int[Array, ""]  # from 0
    start: Float32[Array, " B"]
    end: Float32[Array, " B"]
    length: Float32[Array, ""]  # end - start, below 0; from float64, because a difference of float32 times is rounded
    extrapolation: Float32[Array, ""]  # half the length over that of the step before; 0 in the first step


def step_times(num_steps: int, shift: float = 1.0) -> Float64[np.ndarray, " times"]:
    """Returns the num_steps + 1 times between steps, from 1 down to 0, equation (1)."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")
    uniform = 1 - np.arange(num_steps + 1) / num_steps
    return shift * uniform / (1 + (shift - 1) * uniform)


def call_times(num_steps: int, shift: float = 1.0, churn: float = 0.0) -> Float64[np.ndarray, " steps"]:
    """Returns the time at which each step first calls the network: later than it starts where `churn` adds noise."""
    return _raised(step_times(num_steps, shift)[:-1], _growth(num_steps, churn))


def euler(
    velocity: Velocity, x: Float[Array, "B ..."], num_steps: int, has_aux: bool = False, shift: float = 1.0
) -> Any:
    """Integrates to first order, with one call of `velocity` a step. `x` is at t = 1, the result at t = 0."""
    call = _with_aux(velocity, has_aux)

    def move(x: Array, step: Step) -> tuple[Array, Any]:
        slope, aux = call(x, step.start)
        return _moved(x, slope, step.length), aux

    return _integrate(move, x, step_times(num_steps, shift), has_aux)


def heun(
    velocity: Velocity, x: Float[Array, "B ..."], num_steps: int, has_aux: bool = False, shift: float = 1.0
) -> Any:
    """Integrates to second order, with two calls of `velocity` a step. `x` is at t = 1, the result at t = 0.

    The last step is also a full one: it calls `velocity` at t = 0, where a flow is regular. (Solvers for
    parametrisations that divide by the noise level, as in arXiv 2206.00364, must end with an Euler step.)
    """
    call = _with_aux(velocity, has_aux)
    move = lambda x, step: _heun_step(call, x, step.start, step.end, step.length)  # noqa: E731
    return _integrate(move, x, step_times(num_steps, shift), has_aux)


def multistep(
    velocity: Velocity, x: Float[Array, "B ..."], num_steps: int, has_aux: bool = False, shift: float = 1.0
) -> Any:
    """Integrates to second order, with one call of `velocity` a step. `x` is at t = 1, the result at t = 0.

    Step i moves along v_i + h_i / (2 h_(i-1)) (v_i - v_(i-1)), with h the lengths of steps (Adams and Bashforth, for
    steps of any lengths); the first one is Euler's.
    """
    call = _with_aux(velocity, has_aux)

    def move(carry: tuple[Array, Array], step: Step) -> tuple[tuple[Array, Array], Any]:
        x, before = carry
        slope, aux = call(x, step.start)
        slope = slope.astype(jnp.float32)
        extrapolated = slope + step.extrapolation * (slope - before)
        return (_moved(x, extrapolated, step.length), slope), aux

    first = jnp.zeros(x.shape, jnp.float32)  # its factor is 0
    solved = _integrate(move, x, step_times(num_steps, shift), has_aux, (first,))
    return (solved[0][0], solved[1]) if has_aux else solved[0]


def stochastic_heun(
    velocity: Velocity,
    x: Float[Array, "B ..."],
    num_steps: int,
    has_aux: bool = False,
    shift: float = 1.0,
    churn: float = 0.0,
    keys: Key[Array, " B"] | None = None,
) -> Any:
    """Does what `heun` does, but raises the noise before each step: see `add_noise`.

    The noise level grows by the factor 1 + churn / num_steps, by sqrt(2) at most. Noise that is added later makes up
    for errors that steps before it have made; with too much of it detail is lost.

    Args:
      velocity: as for the other solvers.
      x: at t = 1.
      num_steps: how many steps.
      has_aux: as for the other solvers.
      shift: of times, equation (1).
      churn: S_churn of arXiv 2206.00364; 0 is `heun`.
      keys: of each example, for the noise; needed where churn is above 0.
    """
    times, call = step_times(num_steps, shift), _with_aux(velocity, has_aux)
    gamma = _growth(num_steps, churn)
    if gamma > 0 and keys is None:
        raise ValueError(f"churn = {churn}: needs keys to draw noise")

    def move(x: Array, step: Step) -> tuple[Array, Any]:
        if gamma == 0 or keys is None:
            return _heun_step(call, x, step.start, step.end, step.length)
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, step.number), x.shape[1:], jnp.float32)  # noqa: E731
        x, start = add_noise(x, step.start, jax.vmap(draw)(keys), gamma)
        return _heun_step(call, x, start, step.end, step.end[0] - start[0])

    return _integrate(move, x, times, has_aux)


def add_noise(
    x: Float32[Array, "B ..."], time: Float32[Array, " B"], noise: Float32[Array, "B ..."], gamma: float
) -> tuple[Float32[Array, "B ..."], Float32[Array, " B"]]:
    """Returns x_t with more noise, and the later time to which it belongs.

    Of x_t = t noise + (1 - t) data the noise level is t / (1 - t), as data is scaled. It grows by 1 + gamma:

        t' = (1 + gamma) t / (1 + gamma t),  x' = (x + t sqrt(gamma (2 + gamma)) noise) / (1 + gamma t)

    so that x' is distributed as x_t' is. At t = 1, which is noise alone, nothing changes.
    """
    later = _raised(time, gamma)
    t = time.reshape(time.shape + (1,) * (x.ndim - 1))
    raised = (x + t * math.sqrt(gamma * (2 + gamma)) * noise) / (1 + gamma * t)
    unchanged = t == 1
    return jnp.where(unchanged, x, raised), later


def _growth(num_steps: int, churn: float) -> float:
    return min(churn / num_steps, MOST_CHURN)


def _raised(time: Any, gamma: float) -> Any:
    """Returns the times at which the noise level is 1 + gamma times as high."""
    return (1 + gamma) * time / (1 + gamma * time)


def _with_aux(velocity: Callable[..., Any], has_aux: bool) -> Callable[[Array, Array], tuple[Array, Any]]:
    return velocity if has_aux else lambda x, time: (velocity(x, time), None)


def _moved(x: Array, slope: Array, length: Array) -> Array:
    return x + length * slope.astype(jnp.float32)


def _heun_step(
    call: Callable[[Array, Array], tuple[Array, Any]], x: Array, start: Array, end: Array, length: Array
) -> tuple[Array, Any]:
    first, aux = call(x, start)
    first = first.astype(jnp.float32)
    second = call(_moved(x, first, length), end)[0].astype(jnp.float32)
    return _moved(x, (first + second) / 2, length), aux


def _integrate(
    move: Callable[..., tuple[Any, Any]],
    x: Array,
    times: Float64[np.ndarray, " times"],
    has_aux: bool,
    more: tuple[Array, ...] = (),
) -> Any:
    """Scans `move(x, Step)` over the steps between `times`, or `move((x, *more), Step)` if there is more to carry."""
    lengths = np.diff(times)
    ratios = np.concatenate([[0.0], lengths[1:] / lengths[:-1] / 2])
    ends = np.stack([times[:-1], times[1:], lengths, ratios]).astype(np.float32)

    def body(carry: Any, step: tuple[Array, Array]) -> tuple[Any, Any]:
        number, (start, end, length, ratio) = step
        time = lambda value: jnp.full(x.shape[:1], value, jnp.float32)  # noqa: E731
        return move(carry, Step(number, time(start), time(end), length, ratio))

    carry = x.astype(jnp.float32)
    steps = jnp.arange(len(lengths)), jnp.asarray(ends.T)
    solved, aux = jax.lax.scan(body, (carry, *more) if more else carry, steps)
    return (solved, aux) if has_aux else solved


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "multistep": multistep,
    "stochastic_heun": stochastic_heun,
}
CALLS = {"euler": 1, "heun": 2, "multistep": 1, "stochastic_heun": 2}  # of the network in a step
