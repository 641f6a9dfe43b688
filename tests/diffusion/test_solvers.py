import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.diffusion.flow import interpolate, sample_keys, sample_noise, velocity_target
from ecdit.diffusion.solvers import CALLS, SOLVERS, add_noise, call_times, euler, multistep, step_times, stochastic_heun

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


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("multistep", 2), ("stochastic_heun", 2)])
def test_halving_the_step_shows_the_order(name, order, shift):
    """Stochastic Heun adds no noise here."""
    steps = (16, 32, 64) if shift == 1 and name != "multistep" else (64, 128, 256)
    errors = [np.abs(SOLVERS[name](gaussian_velocity, NOISE, n, shift=shift) - DATA).max() for n in steps]
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


def test_a_shift_gives_noise_more_steps():
    np.testing.assert_array_equal(step_times(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(step_times(4, 3.0), [1, 0.9, 0.75, 0.5, 0])  # 3 u / (1 + 2 u)
    np.testing.assert_allclose(step_times(4, 1 / 3)[1:-1], 1 - step_times(4, 3.0)[-2:0:-1])


def test_the_solver_steps_at_shifted_times():
    # Times 1, 0.75, 0 of shift 3: Euler's sum of t^2 is 0.25 + 0.75 * 0.5625.
    x = euler(lambda x, time: jnp.broadcast_to(time[:, None] ** 2, x.shape), jnp.zeros((2, 1)), 2, shift=3.0)
    np.testing.assert_allclose(x, jnp.full((2, 1), -(0.25 + 0.75 * 0.5625)), rtol=1e-6)


def test_multistep_by_hand_on_steps_of_two_lengths():
    # Steps of 0.25 and 0.75, velocities t^2: 1 and 0.5625; the second is extrapolated by 0.75 / (2 * 0.25) = 1.5.
    x = multistep(lambda x, time: jnp.broadcast_to(time[:, None] ** 2, x.shape), jnp.zeros((2, 1)), 2, shift=3.0)
    np.testing.assert_allclose(x, jnp.full((2, 1), -(0.25 + 0.75 * (0.5625 + 1.5 * (0.5625 - 1)))), rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_is_called_as_often_as_is_said(name):
    calls = []

    def velocity(x, time):
        jax.debug.callback(lambda _: calls.append(None), time)
        return x

    SOLVERS[name](velocity, NOISE, 5)
    jax.effects_barrier()
    assert len(calls) == 5 * CALLS[name]


def test_added_noise_gives_the_distribution_of_the_later_time():
    """Of data N(MEAN, STD^2), x_t is N((1 - t) MEAN, t^2 + (1 - t)^2 STD^2). The noise level grows by 1.3."""
    time, count = jnp.array([0.5, 0.8, 1.0]), 200_000
    data, noise, more = (jax.random.normal(jax.random.key(i), (3, count)) for i in range(3))
    x, later = add_noise(interpolate(MEAN + STD * data, noise, time), time, more, 0.3)
    np.testing.assert_allclose((later / (1 - later))[:2], 1.3 * (time / (1 - time))[:2], rtol=1e-5)
    np.testing.assert_allclose(x.mean(axis=1), (1 - later) * MEAN, atol=0.01)
    np.testing.assert_allclose(x.std(axis=1), jnp.sqrt(later**2 + (1 - later) ** 2 * STD**2), rtol=0.01)
    np.testing.assert_array_equal(x[2], noise[2])  # at t = 1 there is nothing but noise


def test_without_churn_stochastic_heun_is_heun():
    keys = sample_keys(0, ["a"] * 8, range(8))
    drawn = stochastic_heun(gaussian_velocity, NOISE, 5, churn=0.0, keys=keys)
    np.testing.assert_array_equal(drawn, SOLVERS["heun"](gaussian_velocity, NOISE, 5))


def test_stochastic_heun_draws_the_data_s_distribution():
    keys = sample_keys(0, ["a"] * 20_000, range(20_000))
    noise = sample_noise(keys, (1,))
    drawn = stochastic_heun(gaussian_velocity, noise, 16, churn=6.0, keys=keys)
    assert abs(float(drawn.mean()) - MEAN) < 0.01
    np.testing.assert_allclose(drawn.std(), STD, rtol=0.02)
    kept = np.corrcoef(drawn[:, 0], noise[:, 0])[0, 1]
    assert kept < 0.95, "noise that is added changes which data a noise leads to"


def test_each_step_adds_noise_of_its_own():
    """Along no velocity x keeps all noise that was added; two steps' alike would double, not add in squares."""
    keys = sample_keys(0, ["a"] * 20_000, range(20_000))
    drawn = stochastic_heun(lambda x, time: jnp.zeros_like(x), jnp.zeros((20_000, 1)), 3, churn=0.9, keys=keys)
    variance, gamma = 0.0, 0.3
    for t in (2 / 3, 1 / 3):
        variance = (variance + t**2 * gamma * (2 + gamma)) / (1 + gamma * t) ** 2
    np.testing.assert_allclose(drawn.std(), variance**0.5, rtol=0.02)


def test_added_noise_depends_on_the_example_s_key_alone():
    keys, churn = sample_keys(0, list("abcdefgh"), range(8)), 6.0
    x = stochastic_heun(gaussian_velocity, NOISE, 5, churn=churn, keys=keys)
    order = jnp.arange(8)[::-1]
    np.testing.assert_allclose(
        stochastic_heun(gaussian_velocity, NOISE[order], 5, churn=churn, keys=keys[order]), x[order], rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs keys"):
        stochastic_heun(gaussian_velocity, NOISE, 5, churn=churn)


def test_noise_is_never_more_than_doubled_in_its_square():
    keys = sample_keys(0, list("abcdefgh"), range(8))
    drawn = [stochastic_heun(gaussian_velocity, NOISE, 4, churn=churn, keys=keys) for churn in (2.0, 1e6)]
    np.testing.assert_array_equal(*drawn)  # 2 / 4 is above sqrt(2) - 1 already


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_call_times_are_those_at_which_a_step_first_calls_the_network(solver, churn):
    more = {"churn": churn, "keys": sample_keys(0, ["a"] * 8, range(8))} if solver == "stochastic_heun" else {}
    velocity = lambda x, time: (gaussian_velocity(x, time), time[0])  # noqa: E731
    _, times = SOLVERS[solver](velocity, NOISE, 10, has_aux=True, shift=2.0, **more)
    np.testing.assert_allclose(call_times(10, 2.0, churn if more else 0.0), times, rtol=1e-6)
