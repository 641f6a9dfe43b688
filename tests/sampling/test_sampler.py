"""Tests sampling by hand: the network's inputs, the null caption, and the order of images."""

import dataclasses

import jax
import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.data.text import EOS, PAD, train_vocabulary
from ecdit.diffusion.flow import sample_keys, sample_noise, velocity_towards
from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.diffusion.solvers import SOLVERS
from ecdit.errors import UserError
from ecdit.partitioning import make_mesh
from ecdit.sampling.sampler import check_sampling, make_sampler, sample_images
from ecdit.system import make_system
from tests.data.example import tokenize
from tests.knowing import DATA, PIXEL, KnowingSystem
from tests.runs import tiny

LENGTH, BATCH = 12, 4
PROMPTS = ["red heart", "tiger", "owl", "red heart", "flag of Chad", "fire"]
REPEATS = [0, 0, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def drawn():
    """What the knowing network was given in four guided steps, the images, and the noise they were drawn from."""
    experiment = tiny(mesh__data=1, sampling__batch_size=BATCH)
    config = dataclasses.replace(
        experiment.sampling,
        num_steps=4,
        guidance=GuidanceConfig(3.0, "plain", 0.0, 1.0),
        original_size=97,
        solver="euler",
    )
    system = KnowingSystem(experiment)
    sampler = make_sampler(system, config, make_mesh(experiment.mesh, jax.devices()[:1]))
    keys = sample_keys(0, PROMPTS[:BATCH], REPEATS[:BATCH])
    tokens = np.ones((BATCH, experiment.data.caption_length), np.int32)
    images = np.asarray(sampler(system.params(), tokens, tokens[:1], keys))
    noise = sample_noise(keys, (*images.shape[1:3], experiment.model.latent_channels))
    return system.taken(), images, np.asarray(noise)


def test_a_network_that_knows_the_image_draws_it(drawn):
    """From t = 1 on, a velocity of (x_t - data) / t leads to the data, if t is the time that the network is told."""
    assert (drawn[1] == PIXEL).all()


def test_the_network_is_given_the_noise_and_each_step_s_time(drawn):
    """Each image is followed by its twin with the null caption."""
    given, _, noise = drawn
    order = np.argsort(-given["time"], kind="stable")  # of the records: a callback may be late
    time = given["time"][order].reshape(4, 2 * BATCH)
    np.testing.assert_allclose(time, np.repeat([[1, 0.75, 0.5, 0.25]], 2 * BATCH, axis=0).T)
    x_t = given["latents"][order].reshape(4, BATCH, 2, *noise.shape[1:])
    for step, t in enumerate((1, 0.75, 0.5, 0.25)):
        for twin in range(2):
            np.testing.assert_allclose(x_t[step, :, twin], t * noise + (1 - t) * DATA, atol=1e-5)


def test_micro_conditions_are_the_original_size_and_no_crop_in_the_order_of_the_data(drawn):
    np.testing.assert_array_equal(drawn[0]["size_crop"], [[97, 97, 0, 0]] * (4 * 2 * BATCH))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_vocabulary(PROMPTS, 300, path)
    return path


def test_each_image_is_of_its_prompt_and_the_null_caption_is_the_empty_one_with_its_end(vocabulary):
    """Six prompts in batches of four; a sampler whose images are what it is given."""
    config, seen = dataclasses.replace(tiny().sampling, batch_size=BATCH, seed=3), []

    def sampler(params, tokens, null_tokens, keys):
        seen.append((params, null_tokens))
        return {"tokens": tokens, "keys": jax.random.key_data(keys)}

    given = sample_images(sampler, "ema", lambda texts: tokenize(vocabulary, texts, LENGTH), PROMPTS, REPEATS, config)
    np.testing.assert_array_equal(given["tokens"], tokenize(vocabulary, PROMPTS, LENGTH))
    np.testing.assert_array_equal(given["keys"], jax.random.key_data(sample_keys(3, PROMPTS, REPEATS)))
    assert len(seen) == 2
    for params, null_tokens in seen:
        assert params == "ema"
        np.testing.assert_array_equal(null_tokens, [[EOS] + [PAD] * (LENGTH - 1)])


def test_arrays_that_cannot_be_held_are_refused_after_the_first_batch():
    """Else the process would be killed hours later. A batch here says that it has 3.2 TB."""
    drawn = []

    def sampler(params, tokens, null_tokens, keys):
        drawn.append(len(tokens))
        return np.broadcast_to(np.float32(0), (BATCH, 10**6, 2 * 10**5))

    sampling = tiny(sampling__batch_size=BATCH).sampling
    words = lambda prompts: np.zeros((len(prompts), LENGTH), np.int32)  # noqa: E731
    with pytest.raises(
        UserError, match=r"2 batches of 3\.2e\+03 GB need 12800 GB of memory.*fewer prompts, repeats or"
    ):
        sample_images(sampler, {}, words, PROMPTS, REPEATS, sampling)
    assert drawn == [BATCH]


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_predicted_data_a_solver_is_refused_where_it_would_leave_noise(solver):
    """Of a network that knows the data; ten steps, so that no divided time is clipped before t = 0."""
    data, noise = np.full((2, 3), 0.5, np.float32), np.ones((2, 3), np.float32)
    x = SOLVERS[solver](lambda x, time: velocity_towards(data, x, time), noise, 10)
    experiment = tiny(model__prediction="data", sampling__solver=solver)
    denoiser, mesh = make_system(experiment.system).parts.denoiser, make_mesh(experiment.mesh, jax.devices())
    if np.abs(x - data).max() < 1e-6:
        check_sampling(experiment.sampling, denoiser, mesh)
        return
    with pytest.raises(ConfigError, match=rf"sampling.solver = '{solver}': must be \"euler\" or \"multistep\""):
        check_sampling(experiment.sampling, denoiser, mesh)


def test_all_solvers_sample_with_predicted_velocities():
    for solver in SOLVERS:
        experiment = tiny(sampling__solver=solver)
        mesh = make_mesh(experiment.mesh, jax.devices())
        check_sampling(experiment.sampling, make_system(experiment.system).parts.denoiser, mesh)
