import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.diffusion import guidance
from ecdit.diffusion.guidance import GuidanceConfig

SHAPE = (3, 4, 4, 2)
CONDITIONAL = jax.random.normal(jax.random.key(0), SHAPE)
UNCONDITIONAL = 3 * jax.random.normal(jax.random.key(1), SHAPE)


def norms(velocity):
    return np.linalg.norm(np.asarray(velocity, np.float64).reshape(SHAPE[0], -1), axis=1)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("scale", {"scale": -1.0, "mode": "plain"}),
        ("scale", {"scale": math.inf, "mode": "plain"}),
        ("mode", {"scale": 1.0, "mode": "rescaled"}),
        ("interval_low", {"scale": 1.0, "mode": "plain", "interval_low": -0.1}),
        ("interval_high", {"scale": 1.0, "mode": "plain", "interval_high": 1.1}),
        ("interval_high", {"scale": 1.0, "mode": "plain", "interval_low": 0.5, "interval_high": 0.4}),
    ],
)
def test_config_refuses_impossible_values(key, values):
    with pytest.raises(ConfigError, match=key):
        GuidanceConfig(**{"interval_low": 0.0, "interval_high": 1.0} | values)


def test_guidance_by_hand():
    conditional, unconditional = jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 1.0]])
    np.testing.assert_array_equal(guidance.guide(conditional, unconditional, 2.5), [[6.0, -1.5]])


@pytest.mark.parametrize("mode", ["plain", "renormalized"])
def test_scale_one_is_the_conditional_model_bitwise(mode):
    conditional = CONDITIONAL.at[0].mul(1e25)  # its norm overflows, and must not matter
    velocity = guidance.combine(conditional, UNCONDITIONAL, GuidanceConfig(1.0, mode, 0.0, 1.0))
    np.testing.assert_array_equal(velocity, conditional)
    # Else the test would say nothing: the formula rounds.
    assert (UNCONDITIONAL + (CONDITIONAL - UNCONDITIONAL) != CONDITIONAL).any()


def test_scale_zero_is_the_unconditional_model():
    np.testing.assert_array_equal(guidance.guide(CONDITIONAL, UNCONDITIONAL, 0.0), UNCONDITIONAL)


def test_guidance_is_linear_in_its_scale():
    at = {scale: guidance.guide(CONDITIONAL, UNCONDITIONAL, scale) for scale in (2.0, 5.0, 8.0)}
    np.testing.assert_allclose(at[5.0], (at[2.0] + at[8.0]) / 2, rtol=1e-5, atol=1e-5)
    assert not np.allclose(at[2.0], at[8.0], atol=1.0)


def test_renormalized_velocity_has_the_norm_of_the_conditional_one():
    plain = guidance.combine(CONDITIONAL, UNCONDITIONAL, GuidanceConfig(7.5, "plain", 0.0, 1.0))
    renormalized = guidance.combine(CONDITIONAL, UNCONDITIONAL, GuidanceConfig(7.5, "renormalized", 0.0, 1.0))
    assert (norms(plain) > 2 * norms(CONDITIONAL)).all()
    np.testing.assert_allclose(norms(renormalized), norms(CONDITIONAL), rtol=1e-6)
    ratio = renormalized / plain
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1, :1], SHAPE), rtol=1e-5)


def test_renormalization_of_an_image_does_not_depend_on_its_neighbours():
    changed = UNCONDITIONAL.at[1:].mul(100)
    config = GuidanceConfig(7.5, "renormalized", 0.0, 1.0)
    np.testing.assert_allclose(
        guidance.combine(CONDITIONAL, changed, config)[0],
        guidance.combine(CONDITIONAL, UNCONDITIONAL, config)[0],
        rtol=1e-6,
    )


def test_a_velocity_of_norm_zero_stays_zero():
    velocity = UNCONDITIONAL.at[1].set(0)
    renormalized = guidance.renormalize(velocity, CONDITIONAL)
    assert (renormalized[1] == 0).all()
    np.testing.assert_allclose(norms(renormalized)[[0, 2]], norms(CONDITIONAL)[[0, 2]], rtol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "renormalized"])
def test_bfloat16_velocities_are_combined_in_float32(mode):
    narrow = CONDITIONAL.astype(jnp.bfloat16), UNCONDITIONAL.astype(jnp.bfloat16)
    wide = [velocity.astype(jnp.float32) for velocity in narrow]
    for scale in (1.0, 7.5):
        config = GuidanceConfig(scale, mode, 0.0, 1.0)
        combined = guidance.combine(*narrow, config)
        assert combined.dtype == jnp.float32
        np.testing.assert_array_equal(combined, guidance.combine(*wide, config))


@pytest.mark.parametrize("mode", ["plain", "renormalized"])
def test_outside_the_interval_the_velocity_is_the_conditional_one(mode):
    """Times of three images: below, at the lower end of, and above the interval; its ends are inside."""
    always, part = GuidanceConfig(7.5, mode, 0.0, 1.0), GuidanceConfig(7.5, mode, 0.25, 0.75)
    guided = guidance.combine(CONDITIONAL, UNCONDITIONAL, always)
    for times, inside in [([0.2, 0.25, 0.8], [0, 1, 0]), ([0.75, 0.76, 0.5], [1, 0, 1])]:
        found = guidance.combine(CONDITIONAL, UNCONDITIONAL, part, jnp.array(times))
        for image, guides in enumerate(inside):
            np.testing.assert_array_equal(found[image], (guided if guides else CONDITIONAL)[image])
    with pytest.raises(ValueError, match="needs the time"):
        guidance.combine(CONDITIONAL, UNCONDITIONAL, part)


def test_an_interval_of_all_times_changes_nothing():
    always = GuidanceConfig(7.5, "plain", 0.0, 1.0)
    found = guidance.combine(CONDITIONAL, UNCONDITIONAL, always, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(found, guidance.guide(CONDITIONAL, UNCONDITIONAL, 7.5))
