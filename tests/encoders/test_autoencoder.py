import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.encoders.autoencoder import AUTOENCODERS, to_bytes, to_unit


def test_all_bytes_survive_the_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = jax.jit(to_unit)(images)
    assert unit.dtype == np.float32
    back = jax.jit(to_bytes)(unit)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)


def test_bytes_span_minus_one_to_one():
    unit = to_unit(np.array([[[[0, 51, 204]], [[255, 255, 0]]]], np.uint8))
    np.testing.assert_allclose(np.ravel(unit), [-1, -0.6, 0.6, 1, 1, -1], atol=1e-6)


def test_bytes_are_rounded_and_clipped():
    images = np.array([-7, -1.001, 1.001, 7, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1], np.float32)
    np.testing.assert_array_equal(to_bytes(images.reshape(1, 1, 2, 3)).reshape(6), [0, 0, 255, 255, 0, 1])


def test_identity_is_an_autoencoder():
    autoencoder = AUTOENCODERS["identity"](3)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    latents = autoencoder.encode(images, jax.random.split(jax.random.key(0), 2))
    assert latents.shape[1:] == autoencoder.latent_shape(4)
    assert latents.shape[1] * autoencoder.downsampling == images.shape[1]
    np.testing.assert_array_equal(autoencoder.decode(latents), images)


def test_stored_latents_have_the_shape_that_was_stored_and_no_images():
    latents = AUTOENCODERS["latents"](8)
    assert latents.latent_shape(256) == (32, 32, 8)
    with pytest.raises(NotImplementedError, match="the data holds latents"):
        latents.decode(np.zeros((1, 2, 2, 8), np.float32))


def test_stored_latents_are_drawn_from_their_posterior():
    """Of one mean and one variance a number: 64 000 draws have both, within four standard errors."""
    mean, log_variance = np.full((1000, 8, 8, 1), 0.5, np.float32), np.full((1000, 8, 8, 1), np.log(0.04), np.float32)
    keys, autoencoder = jax.random.split(jax.random.key(0), 1000), AUTOENCODERS["latents"](1)
    drawn = np.asarray(autoencoder.encode(jnp.concatenate([mean, log_variance], axis=-1), keys))
    assert drawn.shape == (1000, 8, 8, 1)
    assert abs(drawn.mean() - 0.5) < 4 * 0.2 / np.sqrt(64_000)
    assert abs(drawn.std() - 0.2) < 4 * 0.2 / np.sqrt(2 * 64_000)
    without = jnp.concatenate([mean, np.full_like(mean, -30.0)], axis=-1)
    np.testing.assert_allclose(autoencoder.encode(without, keys), mean, atol=1e-5)
    again = np.asarray(autoencoder.encode(jnp.concatenate([mean, log_variance], axis=-1)[:2], keys[:2]))
    np.testing.assert_allclose(again, drawn[:2], rtol=1e-6)  # an image's draws are its key's
