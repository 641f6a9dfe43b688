"""Tests parts of the training step by hand, without a model: coverage, microbatches, and changes of the state."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecdit.components import WithoutExperts
from ecdit.diffusion.flow import FlowConfig, example_keys
from ecdit.models.moe import RoutingReport
from ecdit.models.routing_metrics import coverage
from ecdit.system import System, make_system
from ecdit.training import step
from ecdit.training.state import TrainState
from tests.knowing import PIXEL, KnowingSystem
from tests.models.helpers import jit
from tests.runs import random_params, tiny

STEP, LOSS = 5, 2.0  # steps done, and the loss of the next one


def test_coverage_by_hand():
    """Two sparse layers, two images of four tokens; the shares are over all eight tokens of a layer."""
    counts = jnp.array([[[0, 1, 2, 3], [4, 0, 1, 5]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    metrics = coverage(RoutingReport(counts, None, None, None))
    np.testing.assert_array_equal(metrics["coverage_0"], [2 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_1"], [2 / 8, 1])
    np.testing.assert_array_equal(metrics["coverage_2"], [1 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_3_or_more"], [3 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_most"], [5, 1])


def test_gradients_are_means_over_microbatches(monkeypatch):
    """Of the loss w x, with x the row: the mean of x, however many microbatches there are."""
    monkeypatch.setattr(
        step, "_loss", lambda params, frozen, flow, system, batch, keys: ((params["w"] * batch["x"]).mean(), {})
    )
    state = TrainState(jnp.int32(0), {"w": jnp.float32(2)}, {}, {}, (), *[jnp.int32(0)] * 3)
    system = System(None, None, None)
    system.__dict__["parts"] = SimpleNamespace(denoiser=WithoutExperts())
    batch = {"x": jnp.arange(16, dtype=jnp.float32)}
    for count in (1, 2, 4, 16):
        config = tiny(train__accumulation=count).step_config
        loss, _, gradients = step._accumulated_gradients(config, system, state, batch)
        assert (float(loss), float(gradients["w"])) == (15.0, 7.5)


def test_images_of_a_group_stay_together_and_rows_on_their_device():
    """Groups of two images in four microbatches; two devices hold rows 0 to 7 and 8 to 15."""
    split = step._split_microbatches(jnp.arange(16), count=4, together=2)
    np.testing.assert_array_equal(split, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]])
    split = step._split_microbatches(jnp.arange(16), count=4, together=1)
    np.testing.assert_array_equal(split, [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]])


def tree(first, second):
    """Two leaves, where the model's would be."""
    return {"denoiser": {"first": jnp.float32(first), "pairs": {"even": {}}, "second": jnp.float32(second)}}


def updated(loss=LOSS, gradient=(0.5, -0.25), usual_loss=LOSS, bad_in_row=2, step_done=STEP):
    """The state before and after a step by gradient descent with momentum 1/2, and its metrics."""
    optimizer = optax.sgd(1.0, momentum=0.5)
    counts = {"bad_steps": jnp.int32(7), "bad_in_row": jnp.int32(bad_in_row), "usual_loss": jnp.float32(usual_loss)}
    moments = (optax.TraceState(tree(0.125, 0.125)), optax.EmptyState())
    old = TrainState(jnp.int32(step_done), tree(1, 2), tree(3, 4), {"text": jnp.float32(9)}, moments, **counts)
    config = tiny(train__spike_factor=3.0, train__ema_decay=0.99).train
    new, metrics = step._gated_update(config, optimizer, old, jnp.float32(loss), {}, tree(*gradient))
    return old, new, metrics


def test_a_good_step_by_hand():
    """The trace is the gradient and half of the one before; EMA by (1 + 5) / (10 + 5) = 0.4 takes the new weights."""
    _, new, metrics = updated(usual_loss=1.5)
    np.testing.assert_allclose(jax.tree.leaves(new.params), [1 - 0.5625, 2 + 0.1875], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(new.optimizer), [0.5625, -0.1875], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(new.ema), [0.4 * 3 + 0.6 * 0.4375, 0.4 * 4 + 0.6 * 2.1875], rtol=1e-6)
    np.testing.assert_allclose(new.usual_loss, 0.98 * 1.5 + 0.02 * 2, rtol=1e-6)
    assert (new.step, new.bad_steps, new.bad_in_row, new.frozen["text"]) == (STEP + 1, 7, 0, 9)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(0.5, 0.25), rtol=1e-6)
    assert (metrics["bad_leaf"], metrics["loss"]) == (-1, LOSS)
    assert updated(usual_loss=np.inf)[1].usual_loss == LOSS, "the first good loss is the usual one"
    assert updated(loss=5.9)[1].bad_in_row == 0, "less than three times the usual loss is no spike"


def test_the_ema_s_decay_grows_to_that_of_the_config():
    _, new, _ = updated(step_done=1_000_000)
    expected = [0.99 * old + 0.01 * new for old, new in zip((3, 4), jax.tree.leaves(new.params), strict=True)]
    np.testing.assert_allclose(jax.tree.leaves(new.ema), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "bad_leaf"),
    [
        ({"loss": np.nan}, -1),
        ({"gradient": (np.inf, 1)}, 0),
        ({"gradient": (1, np.nan)}, 1),
        ({"gradient": (1, 1e30)}, 1),  # its square overflows
        ({"loss": 6.1}, step.SPIKE),
    ],
)
def test_a_bad_step_changes_nothing_but_its_counters(changes, bad_leaf):
    old, new, metrics = updated(**changes)
    for part in ("params", "ema", "optimizer", "usual_loss", "frozen"):
        assert jax.tree.leaves(getattr(new, part)) == jax.tree.leaves(getattr(old, part)), part
    assert (new.step, new.bad_steps, new.bad_in_row) == (STEP + 1, 8, 3)
    assert (metrics["bad_leaf"], metrics["bad_steps"], metrics["bad_in_row"]) == (bad_leaf, 8, 3)


def test_near_the_data_the_loss_is_of_the_network_s_error_alone():
    """The network is wrong by 2 t; most times are below 0.05, where velocities of predicted data are too small."""
    keys = jax.vmap(example_keys, in_axes=(None, None, 0))(jax.random.key(1), 0, jnp.arange(16))
    batch = {
        "image": np.full((16, 32, 32, 3), PIXEL, np.uint8),
        "tokens": np.ones((16, 16), np.int32),
        "size_crop": np.zeros((16, 4), np.float32),
    }
    for prediction in ("velocity", "data"):
        system = KnowingSystem(tiny(model__prediction=prediction, model__mask_ratio=0.0, mesh__data=1))
        flow = FlowConfig(time_mean=-3.5, time_std=1.0, dropped_token_weight=0.0)
        loss, _ = step._loss(system.params(error=2.0), {}, flow, system, batch, keys)
        times = system.taken()["time"].astype(np.float64)
        assert 8 < (times < 0.05).sum() < 16
        np.testing.assert_allclose(loss, np.mean((2 * times) ** 2), rtol=1e-3)


def test_a_step_packs_the_captions_of_a_frozen_tower():
    """Its loss is that of padded captions up to rounding; two captions are longer than their room."""
    rng, losses, choices = np.random.default_rng(0), [], []
    tokens = rng.integers(1, 2048, (16, 16), dtype=np.int32) * (np.arange(16) < rng.integers(1, 9, (16, 1)))
    tokens[:2] = rng.integers(1, 2048, (2, 16))
    images = rng.integers(0, 256, (16, 32, 32, 3), np.uint8)
    batch = {"image": images, "tokens": tokens, "size_crop": np.zeros((16, 4), np.float32)}
    keys = jax.vmap(example_keys, in_axes=(None, None, 0))(jax.random.key(1), 0, jnp.arange(16))
    params = None
    for room in (0, 8):
        experiment = tiny(model__depth=2, model__extra_blocks=1, text__frozen=True, text__packed_length=room)
        system = make_system(experiment.system)
        params = random_params(system) if params is None else params
        trained, frozen = system.split(params)
        loss = functools.partial(step._loss, flow=experiment.flow, system=system, keys=keys)
        choices.append(str(jax.make_jaxpr(loss)(trained, frozen, batch=batch)).count(" cond["))
        losses.append(jit(loss)(trained, frozen, batch=batch)[0])
    assert choices[1] == choices[0] + 1
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
