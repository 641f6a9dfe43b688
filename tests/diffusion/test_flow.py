import dataclasses
import hashlib
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.diffusion import flow

CONFIG = flow.FlowConfig(time_mean=0.0, time_std=1.0, dropped_token_weight=0.0)


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def key_bits(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_mean", math.nan),
        ("time_std", 0.0),
        ("time_std", -1.0),
        ("time_std", math.inf),
        ("dropped_token_weight", -0.1),
        ("dropped_token_weight", math.nan),
    ],
)
def test_config_refuses_impossible_values(key, value):
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(CONFIG, **{key: value})


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
def test_times_have_logit_normal_quantiles(mean, std):
    config = dataclasses.replace(CONFIG, time_mean=mean, time_std=std)
    count = 20_000
    times = jax.vmap(flow.sample_time, (0, None))(jax.random.split(jax.random.key(0), count), config)
    assert times.shape == (count,)
    assert times.dtype == jnp.float32
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantile = 1 / (1 + math.exp(-statistics.NormalDist(mean, std).inv_cdf(level)))
        # Four standard errors of an empirical share.
        assert abs(float(jnp.mean(times < quantile)) - level) < 4 * math.sqrt(level * (1 - level) / count)


def test_path_begins_at_data_and_ends_at_noise():
    data, noise = normal(0, (2, 4, 3)), normal(1, (2, 4, 3))
    x = flow.interpolate(data, noise, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(x[0], data[0])
    np.testing.assert_array_equal(x[1], noise[1])


def test_derivative_of_the_path_is_the_velocity_target():
    data, noise, time = normal(0, (3, 4, 2)), normal(1, (3, 4, 2)), jnp.array([0.0, 0.3, 1.0])
    _, velocity = jax.jvp(lambda t: flow.interpolate(data, noise, t), (time,), (jnp.ones(3),))
    np.testing.assert_allclose(velocity, flow.velocity_target(data, noise), rtol=1e-6)


def test_the_velocity_towards_the_data_is_the_target():
    """x_t - data = t (noise - data), at any time from which the division starts."""
    data, noise, time = normal(0, (3, 4, 2)), normal(1, (3, 4, 2)), jnp.array([flow.LEAST_TIME, 0.3, 1.0])
    velocity = flow.velocity_towards(data, flow.interpolate(data, noise, time), time)
    np.testing.assert_allclose(velocity, flow.velocity_target(data, noise), rtol=1e-4, atol=1e-5)


def test_near_the_data_an_error_is_multiplied_by_twenty_at_most():
    data, noisy = jnp.zeros((3, 2)), jnp.ones((3, 2), jnp.bfloat16)
    velocity = flow.velocity_towards(data, noisy, jnp.array([0.0, 0.01, 0.1]))
    assert velocity.dtype == jnp.float32
    np.testing.assert_allclose(velocity[:, 0], [20, 20, 10], rtol=1e-6)


def test_right_data_has_no_loss_at_any_time_and_an_error_counts_twenty_times_at_most():
    """The target of predicted data is as much too small near t = 0 as the velocity; that of velocities is untouched."""
    time = jnp.array([0.0, 1e-4, 0.01, 0.05, 0.1, 1.0])
    data, noise = normal(0, (6, 4, 2)), normal(1, (6, 4, 2))
    noisy, scale = flow.interpolate(data, noise, time), flow.target_scale(time, predicts_data=True)
    target = flow.velocity_target(data, noise) * scale[:, None, None]
    np.testing.assert_allclose(flow.velocity_towards(data, noisy, time), target, rtol=1e-4, atol=1e-5)
    wrong = flow.velocity_towards(data + 1, noisy, time) - target
    np.testing.assert_allclose(wrong[:, 0, 0], [-20, -20, -20, -20, -10, -1], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(flow.target_scale(time, predicts_data=False), np.ones(6))


def test_path_and_target_are_float32_whatever_comes_in():
    narrow = [x.astype(jnp.bfloat16) for x in (normal(0, (2, 4)), normal(1, (2, 4)), jnp.array([0.3, 0.6]))]
    data, noise, time = (x.astype(jnp.float32) for x in narrow)
    x, target = flow.interpolate(*narrow), flow.velocity_target(*narrow[:2])
    assert x.dtype == target.dtype == jnp.float32
    np.testing.assert_array_equal(x, flow.interpolate(data, noise, time))
    np.testing.assert_array_equal(target, flow.velocity_target(data, noise))


# Squared errors of the tokens of two examples: [(1, 9), (4, 4), (0, 16)] and [(25, 1), (0, 0), (36, 4)].
PREDICTED = jnp.array([[[1.0, 3.0], [-2.0, 2.0], [0.0, 4.0]], [[5.0, 0.0], [1.0, 1.0], [7.0, 3.0]]])
TARGET = jnp.array([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
KEPT = jnp.array([[1, 0, 1], [0, 0, 1]], jnp.float32)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.0, [26 / 4, 40 / 2]),
        (0.5, [26 / 4 + 0.5 * 8 / 2, 40 / 2 + 0.5 * 26 / 4]),
    ],
)
def test_loss_by_hand(weight, expected):
    loss = flow.loss_per_example(PREDICTED, TARGET, KEPT, weight)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("kept", [True, False])
def test_a_mean_over_no_tokens_is_zero(weight, kept):
    mask = jnp.full((2, 3), kept, jnp.float32)
    loss, gradient = jax.value_and_grad(lambda p: flow.loss_per_example(p, TARGET, mask, weight).sum())(PREDICTED)
    squares = 34 / 6 + 66 / 6
    np.testing.assert_allclose(loss, squares if kept else weight * squares, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("broken", [1e6, math.nan])
def test_weight_zero_ignores_dropped_tokens(broken):
    def loss(predicted):
        return flow.loss_per_example(predicted, TARGET, KEPT, 0.0).sum()

    predicted = jnp.where(KEPT[..., None] == 1, PREDICTED, broken)
    gradient = jax.grad(loss)(predicted)
    assert loss(predicted) == loss(PREDICTED)
    np.testing.assert_array_equal(gradient, jax.grad(loss)(PREDICTED))
    assert (gradient[KEPT == 0] == 0).all()
    assert (gradient[0, 0] != 0).all()


def test_loss_is_computed_in_float32():
    ones, offset = jnp.ones((1, 4, 2), jnp.bfloat16), jnp.full((1, 4, 2), 1 + 2**-12, jnp.float32)
    loss = flow.loss_per_example(ones, offset, jnp.ones((1, 4)), 0.0)
    np.testing.assert_array_equal(loss, [2.0**-24])


def test_loss_of_an_example_does_not_depend_on_its_neighbours():
    loss = flow.loss_per_example(PREDICTED, TARGET, KEPT, 0.5)
    alone = flow.loss_per_example(PREDICTED[1:], TARGET[1:], KEPT[1:], 0.5)
    np.testing.assert_array_equal(alone, loss[1:])


def batch_keys(key, step, rows):
    return jax.jit(jax.vmap(flow.example_keys, (None, None, 0)))(key, step, rows)


def test_example_keys_do_not_depend_on_the_batch_split():
    key, rows = jax.random.key(7), jnp.arange(8)
    whole = batch_keys(key, 3, rows)
    parts = [batch_keys(key, 3, part) for part in (rows[:2], rows[2:])]
    for use in flow.ExampleKeys._fields:
        split = np.concatenate([key_bits(getattr(part, use)) for part in parts])
        np.testing.assert_array_equal(key_bits(getattr(whole, use)), split)
    np.testing.assert_array_equal(key_bits(whole.time[5]), key_bits(flow.example_keys(key, 3, 5).time))


def test_example_keys_differ_by_seed_step_row_and_use():
    seen = [
        key_bits(key).tobytes()
        for seed in range(2)
        for step in range(3)
        for row in range(3)
        for key in flow.example_keys(jax.random.key(seed), step, row)
    ]
    assert len(set(seen)) == len(seen) == 2 * 3 * 3 * len(flow.ExampleKeys._fields)


def test_key_recipe_is_the_documented_one():
    fold_in = jax.random.fold_in
    key = jax.random.key(7)
    time_key = fold_in(fold_in(fold_in(key, 3), 5), 1)
    np.testing.assert_array_equal(key_bits(flow.example_keys(key, 3, 5).time), key_bits(time_key))
    digest = hashlib.sha256("ein Füchslein".encode()).digest()
    words = [np.uint32(int.from_bytes(digest[i : i + 4], "big")) for i in (0, 4)]
    expected = fold_in(fold_in(fold_in(jax.random.key(7), words[0]), words[1]), 2)
    np.testing.assert_array_equal(key_bits(flow.sample_key(7, "ein Füchslein", 2)), key_bits(expected))


def test_sample_noise_depends_only_on_seed_prompt_and_repeat():
    prompts, repeats, shape = ["a cat", "", "a cat", "ein Füchslein"], [0, 0, 1, 4], (4, 4, 2)
    noise = flow.sample_noise(flow.sample_keys(3, prompts, repeats), shape)
    assert noise.shape == (4, *shape)
    assert noise.dtype == jnp.float32
    backwards = flow.sample_noise(flow.sample_keys(3, prompts[::-1], repeats[::-1]), shape)
    np.testing.assert_array_equal(backwards[::-1], noise)
    for row, (prompt, repeat) in enumerate(zip(prompts, repeats, strict=True)):
        alone = flow.sample_noise(flow.sample_key(3, prompt, repeat)[None], shape)
        np.testing.assert_array_equal(alone[0], noise[row])


def test_sample_keys_do_not_depend_on_the_default_generator():
    expected = key_bits(flow.sample_key(3, "a cat", 0))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(key_bits(flow.sample_key(3, "a cat", 0)), expected)


def test_sample_noise_differs_by_seed_prompt_and_repeat():
    noise = [
        flow.sample_noise(flow.sample_keys(seed, ["a cat", "a cat ", "a cat"], [0, 0, 1]), (64,)) for seed in (0, 1)
    ]
    correlation = np.corrcoef(np.concatenate(noise))
    assert np.abs(correlation - np.eye(6)).max() < 0.5
