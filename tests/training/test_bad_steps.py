"""Tests a step's reports of non-finite numbers, also for a batch in microbatches."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import device_batches
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import SPIKE, USUAL_LOSS_DECAY, make_train_step
from tests.runs import tiny

UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiles in half the time


class Steps:
    """The compiled step on one device, in 16 microbatches of one image."""

    def __init__(self, data):
        experiment = tiny(data__directory=str(data), mesh__data=1, train__accumulation=16, train__spike_factor=3.0)
        self.mesh = make_mesh(experiment.mesh, jax.devices()[:1])
        system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
        with jax.set_mesh(self.mesh):
            shardings = state_shardings(system, optimizer, self.mesh)
            init = jax.jit(lambda: init_state(system, optimizer, shardings, 0), compiler_options=UNOPTIMISED)
            self.state = jax.device_get(init())
            self.batches = list(itertools.islice(device_batches(experiment, self.mesh, 0), 3))
            step = make_train_step(experiment.step_config, system, self.mesh)
            self.step = step.lower(self.state, self.batches[0]).compile(compiler_options=UNOPTIMISED)
            self.shardings = shardings

    def __call__(self, batch, change=lambda params: None, usual_loss=np.inf, **counts):
        counts = {name: np.int32(count) for name, count in counts.items()}
        state = dataclasses.replace(jax.tree.map(np.copy, self.state), usual_loss=np.float32(usual_loss), **counts)
        change(state.params["denoiser"])
        new, metrics = self.step(jax.device_put(state, self.shardings, may_alias=False), batch)
        return state, jax.device_get(new), jax.device_get(metrics)


@pytest.fixture(scope="module")
def steps(emoji_data):
    return Steps(emoji_data)


def assert_unchanged(new, old):
    for part in ("params", "ema", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(old, part))
    assert (new.step, new.bad_steps, new.bad_in_row) == (1, 1, 1)


def test_a_gradient_that_overflows_is_named(steps):
    """The head is 0 at the start, so the prediction is 0 and finite, whatever shifts its input: its gradient is not."""

    def shift(denoiser):
        denoiser["head_modulation_bias"][0] = 1e25

    old, new, metrics = steps(steps.batches[0], shift)
    assert np.isfinite(metrics["loss"])
    assert list(flat_names(old.params))[metrics["bad_leaf"]] == "denoiser.head.kernel"
    assert_unchanged(new, old)


@pytest.mark.parametrize("row", [0, 15])
def test_a_loss_that_is_not_finite_is_named_before_any_gradient(steps, row):
    """One bad image of sixteen. All gradients are NaN then, and the first in the alphabet is not to blame."""
    batch = {**steps.batches[0], "size_crop": steps.batches[0]["size_crop"].at[row].set(jnp.nan)}
    old, new, metrics = steps(batch)
    assert_unchanged(new, old)
    assert not np.isfinite(metrics["loss"])
    assert metrics["bad_leaf"] == -1, list(flat_names(old.params))[metrics["bad_leaf"]]


def test_a_loss_that_is_a_spike_changes_nothing_but_the_counters(steps):
    """Three times the usual loss is the limit; a spike leaves the usual loss as it was."""
    _, _, metrics = steps(steps.batches[0])
    loss = float(metrics["loss"])
    for usual, spike in ((loss / 3.01, True), (loss / 2.99, False)):
        old, new, metrics = steps(steps.batches[0], usual_loss=usual)
        assert metrics["bad_leaf"] == (SPIKE if spike else -1)
        if spike:
            assert_unchanged(new, old)
            assert new.usual_loss == old.usual_loss
        else:
            assert (new.bad_steps, new.bad_in_row) == (0, 0)
            expected = USUAL_LOSS_DECAY * usual + (1 - USUAL_LOSS_DECAY) * loss
            np.testing.assert_allclose(new.usual_loss, expected, rtol=1e-6)


def test_the_rate_of_a_step_does_not_count_skipped_ones(steps):
    """After seven steps of which three were skipped, the rate is that of the fifth update, as the optimizer has it."""
    config = tiny().optimizer
    _, _, metrics = steps(steps.batches[0], step=7, bad_steps=3)
    np.testing.assert_allclose(metrics["learning_rate"], config.learning_rate * 5 / config.warmup_steps, rtol=1e-6)


def test_the_first_good_loss_is_the_usual_one(steps):
    assert steps(steps.batches[0])[1].usual_loss == steps(steps.batches[0])[2]["loss"]
    batch = {**steps.batches[0], "size_crop": steps.batches[0]["size_crop"].at[0].set(jnp.nan)}
    assert np.isinf(steps(batch)[1].usual_loss)


def test_the_most_experts_on_one_token_is_a_maximum_over_microbatches_too(steps):
    """A mean of sixteen maxima is no number of experts; nor is it less than one token's."""
    for batch in steps.batches:
        most = steps(batch)[2]["coverage_most"]
        np.testing.assert_array_equal(most, np.round(most))
