"""Tests the sampler's calls of the network and its use of the results. No model is compiled here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.components import Prediction, TextStates
from ecdit.config import ConfigError
from ecdit.diffusion.flow import sample_key, sample_keys
from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.encoders.text_tower import TextTower
from ecdit.models.dit import DiT
from ecdit.partitioning import make_mesh
from ecdit.sampling import sampler as sampling
from ecdit.sampling.sampler import make_sampler, sample_images
from ecdit.system import make_system
from tests.runs import tiny


class Called(Exception):
    """The network was called."""


@pytest.fixture
def passes(monkeypatch):
    """passes(scale, group) is (rows the network sees, tokens of a group, rows of each call of the text tower)."""
    encoded = []
    tower = TextTower.__call__

    def encode(self, tokens):
        encoded.append(tokens.shape[0])
        return tower(self, tokens)

    def stop(self, latents, time, text, size_crop, kept, group_size, with_gates):
        assert time.shape[0] == text.mask.shape[0] == size_crop.shape[0] == latents.shape[0]
        assert kept is None  # sampling drops no token
        assert not with_gates  # nor does it compute gates that nobody asked for
        raise Called(latents.shape[0], group_size)

    monkeypatch.setattr(TextTower, "__call__", encode)
    monkeypatch.setattr(DiT, "forward", stop)

    def trace(scale, group, solver="euler"):
        experiment = tiny(mesh__data=1, model__sampling_group=group)
        config = dataclasses.replace(
            experiment.sampling, guidance=GuidanceConfig(scale, "plain", 0.0, 1.0), solver=solver
        )
        system = make_system(experiment.system)
        sampler = make_sampler(system, config, make_mesh(experiment.mesh, jax.devices()[:1]))
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(system.init, jax.random.key(0)))
        tokens, keys = np.ones((8, 16), np.int32), sample_keys(0, ["a"] * 8, range(8))
        with pytest.raises(Called) as called:
            sampler(params, tokens, tokens[:1], keys)
        return (*called.value.args, encoded)

    return trace


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_scale_one_makes_no_unconditional_pass(passes, solver):
    assert passes(1.0, "image", solver) == (8, 16, [8])


@pytest.mark.parametrize(("group", "size"), [("image", 16), ("32", 32), ("64", 64), ("8", 8)])
def test_a_guided_image_and_its_null_twin_are_one_batch(passes, group, size):
    assert passes(3.0, group) == (16, size, [8, 1])


def test_scale_zero_is_no_scale_one(passes):
    assert passes(0.0, "image")[0] == 16


class FakeModel:
    """Its velocity is the first token of the caption everywhere, and so is the number of experts."""

    mode = "sample"

    def text(self, tokens):
        return TextStates(tokens[..., None].astype(jnp.float32), tokens != 0, tokens[:, :1].astype(jnp.float32))

    def denoiser(self, latents, time, text, size_crop, mask_keys, mode):
        assert (mask_keys, mode) == (None, self.mode)
        self.seen = latents[:, 0, 0, 0], time
        tokens = jnp.broadcast_to(text.pooled, (len(latents), 16))
        velocity = jnp.broadcast_to(text.pooled[:, :, None, None], latents.shape)
        metrics = {"experts_per_token": tokens[None].astype(jnp.int32)}
        return Prediction(velocity, jnp.ones(tokens.shape), jnp.float32(0), metrics)


def test_the_guided_velocity_of_each_image_by_hand():
    """Captions 5, 6, 7, null caption 1, scale 3: 1 + 3 (c - 1). Counts are those of the pass with the caption."""
    experiment = tiny()
    config = dataclasses.replace(experiment.sampling, guidance=GuidanceConfig(3.0, "plain", 0.0, 1.0))
    model, tokens, null = FakeModel(), jnp.array([[5, 1], [6, 1], [7, 1]]), jnp.array([[1, 0]])
    velocity = sampling._velocity(model, config, tokens, null, with_experts=True)
    x = jnp.arange(3.0)[:, None, None, None] * jnp.ones((1, 32, 32, 3))
    guided, counts = velocity(x, jnp.array([0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(model.seen, [[0, 0, 1, 1, 2, 2], [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]])
    np.testing.assert_allclose(guided[:, 0, 0, 0], [13, 16, 19])
    np.testing.assert_array_equal(counts[0, :, 0], [5, 6, 7])


def test_images_outside_the_interval_are_not_guided():
    """As above, but only the second image's time is in the interval."""
    config = dataclasses.replace(tiny().sampling, guidance=GuidanceConfig(3.0, "plain", 0.4, 0.6))
    tokens, null = jnp.array([[5, 1], [6, 1], [7, 1]]), jnp.array([[1, 0]])
    velocity = sampling._velocity(FakeModel(), config, tokens, null, with_experts=False)
    guided, _ = velocity(jnp.ones((3, 32, 32, 3)), jnp.array([0.25, 0.5, 0.75]))
    np.testing.assert_allclose(guided[:, 0, 0, 0], [5, 16, 7])


def test_solving_uses_all_that_the_config_says():
    """The shift changes each solver's result; churn and the images' keys that of stochastic Heun."""
    base, keys = tiny().sampling, sample_keys(0, ["a", "b"], [0, 0])
    noise = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))

    def solved(**changes):
        config = dataclasses.replace(base, num_steps=3, **changes)
        velocity = lambda x, time: (x * time[:, None, None, None] ** 2, None)  # noqa: E731
        return np.asarray(sampling.solve(config, velocity, noise, keys)[0])

    plain = {solver: solved(solver=solver) for solver in ("euler", "heun", "multistep", "stochastic_heun")}
    assert len({found.tobytes() for found in plain.values()}) == 3  # without churn stochastic Heun is Heun
    for solver, found in plain.items():
        assert (solved(solver=solver, time_shift=2.0) != found).all()
    churned = solved(solver="stochastic_heun", churn=1.0)
    assert (churned != plain["heun"]).all()
    np.testing.assert_array_equal(churned, solved(solver="stochastic_heun", churn=1.0))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("churn", {"solver": "heun", "churn": 1.0}),
        ("churn", {"solver": "stochastic_heun", "churn": -1.0}),
        ("time_shift", {"time_shift": 0.0}),
    ],
)
def test_sampling_refuses_what_cannot_work(key, changes):
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(tiny().sampling, **changes)


def test_a_denoiser_that_counts_experts_but_reports_no_gates_is_refused():
    model, config = FakeModel(), tiny().sampling
    model.mode = "inspect"
    velocity = sampling._velocity(model, config, jnp.array([[5, 1]]), jnp.array([[1, 0]]), False, with_gates=True)
    with pytest.raises(ValueError, match="reports no expert_gates"):
        velocity(jnp.zeros((1, 32, 32, 3)), jnp.ones(1))


def test_each_row_has_the_key_of_its_prompt_and_repeat():
    """Six images in batches of four, in place of which the sampler returns what it got."""
    prompts, repeats = ["a", "b", "b", "a", "c", "a"], [0, 0, 1, 0, 5, 2]
    config = dataclasses.replace(tiny().sampling, batch_size=4, seed=7)
    tokenize = lambda texts: np.array([[ord(text) if text else 0] for text in texts])  # noqa: E731

    def sampler(params, tokens, null_tokens, keys):
        assert (params, tokens.shape, null_tokens.tolist(), keys.shape) == ("params", (4, 1), [[0]], (4,))
        return tokens, jax.random.key_data(keys)

    tokens, keys = sample_images(sampler, "params", tokenize, prompts, repeats, config)
    np.testing.assert_array_equal(tokens, tokenize(prompts))
    expected = [jax.random.key_data(sample_key(7, *pair)) for pair in zip(prompts, repeats, strict=True)]
    np.testing.assert_array_equal(keys, expected)
