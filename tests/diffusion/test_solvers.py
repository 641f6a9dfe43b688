import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.diffusion.flow import interpolate, velocity_target
from ecdit.diffusion.solvers import SOLVERS, euler

MEAN, STD = 0.7, 0.4
NOISE = jax.random.normal(jax.random.key(0), (8, 3))


def gaussian_velocity(x, time):
    """E[noise - data | x_t] for data ~ N(MEAN, STD^2).

    x_t ~ N(m, s^2) with m = (1 - t) MEAN, s^2 = t^2 + (1 - t)^2 STD^2, and Cov(noise - data, x_t) = t - (1 - t) STD^2.
    """
    time = time[:, None]
    variance = time**2 + (1 - time) ** 2 * STD**2
    return -MEAN + (time - (1 - time) * STD**2) / variance * (x - (1 - time) * MEAN)


# The flow of `gaussian_velocity` carries m_t + s_t z along with z fixed: noise z at t = 1 is MEAN + STD z at t = 0.
DATA = MEAN + STD * NOISE


def test_the_exact_velocity_is_the_conditional_mean_of_the_target():
    count = 400_000
    data = MEAN + STD * jax.random.normal(jax.random.key(1), (count, 1))
    noise = jax.random.normal(jax.random.key(2), (count, 1))
    time = jnp.full(count, 0.4)
    x = interpolate(data, noise, time)
    residual = velocity_target(data, noise) - gaussian_velocity(x, time)
    # A conditional mean leaves a residual that no function of x explains.
    assert abs(float(residual.mean())) < 0.01
    assert abs(float((residual * x).mean())) < 0.01


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_shows_the_order(name, order):
    errors = [np.abs(SOLVERS[name](gaussian_velocity, NOISE, steps) - DATA).max() for steps in (16, 32, 64)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.2)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_a_straight_path_is_solved_exactly(name, num_steps):
    velocity = NOISE - DATA
    x = SOLVERS[name](lambda x, time: velocity, NOISE, num_steps)
    np.testing.assert_allclose(x, DATA, atol=1e-6)


def test_heun_is_exact_for_a_velocity_linear_in_time():
    # dx/dt = 2 t: x(0) = x(1) - 1. Only a last step that is a full Heun step gets it.
    for num_steps in (1, 3):
        x = SOLVERS["heun"](lambda x, time: jnp.broadcast_to(2 * time[:, None], x.shape), NOISE, num_steps)
        np.testing.assert_allclose(x, NOISE - 1, atol=1e-6)


def test_times_go_from_one_down_in_equal_steps():
    # Euler's sum of f(t) / n over t = 1, 3/4, 1/2, 1/4; with f = t^2 any other times give another sum.
    x = euler(lambda x, time: jnp.broadcast_to(time[:, None] ** 2, x.shape), jnp.zeros((2, 1)), 4)
    np.testing.assert_allclose(x, jnp.full((2, 1), -(16 + 9 + 4 + 1) / 64), rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_state_is_float32_whatever_the_networks_dtype(name):
    def velocity(x, time):
        assert x.dtype == time.dtype == jnp.float32
        assert time.shape == x.shape[:1]
        return jnp.full(x.shape, 2.0**-6, jnp.bfloat16)

    # In bfloat16, 1 - 2^-6 / 64 rounds back to 1.
    x = SOLVERS[name](velocity, jnp.ones((8, 3), jnp.bfloat16), 64)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, jnp.full((8, 3), 1 - 2.0**-6))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_is_traced_as_often_for_many_steps_as_for_few(name):
    def count_traces(num_steps):
        traces = []

        def velocity(x, time):
            traces.append(None)
            return x

        jax.jit(lambda x: SOLVERS[name](velocity, x, num_steps)).lower(NOISE)
        return len(traces)

    assert count_traces(3) == count_traces(50)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_example_does_not_depend_on_its_neighbours(name):
    order = jnp.arange(8)[::-1]
    x = SOLVERS[name](gaussian_velocity, NOISE, 5)
    np.testing.assert_allclose(SOLVERS[name](gaussian_velocity, NOISE[order], 5), x[order], rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="num_steps = 0"):
        SOLVERS[name](gaussian_velocity, NOISE, 0)
