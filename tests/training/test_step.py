"""Tests the step by hand: the network's inputs, the random keys, and the loss and metrics."""

import jax
import numpy as np
import pytest

from ecdit.diffusion.flow import example_keys, sample_time
from ecdit.models.dit import kept_tokens
from ecdit.partitioning import make_mesh
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, run_key
from ecdit.training.step import make_train_step
from tests.knowing import DATA, PIXEL, KnowingSystem
from tests.runs import tiny

BATCH, STEPS = 8, (0, 3)
WEIGHTS = {"balance": 0.25, "z": 0.125, "dropped": 0.5}


class Steps:
    """steps(step, error) is what the knowing network was given in a step, the metrics and the next state."""

    def __init__(self, accumulation):
        self.experiment = tiny(
            mesh__data=1,
            seed=5,
            train__batch_size=BATCH,
            train__accumulation=accumulation,
            train__spike_factor=0.0,
            model__ffn="token_choice",
            model__balance_loss_weight=WEIGHTS["balance"],
            model__router_z_loss=WEIGHTS["z"],
            flow__dropped_token_weight=WEIGHTS["dropped"],
        )
        self.system = KnowingSystem(self.experiment)
        self.mesh = make_mesh(self.experiment.mesh, jax.devices()[:1])
        self.step = make_train_step(self.experiment.step_config, self.system, self.mesh)

    def __call__(self, step, error=0.0):
        side, length = self.experiment.data.image_size, self.experiment.data.caption_length
        batch = {
            "image": np.full((BATCH, side, side, 3), PIXEL, np.uint8),
            "tokens": np.ones((BATCH, length), np.int32),
            "size_crop": np.arange(4 * BATCH, dtype=np.float32).reshape(BATCH, 4),
        }
        params, zero = self.system.params(error), np.int32(0)
        moments = make_optimizer(self.experiment.optimizer).init(params)
        ema = jax.tree.map(np.copy, params)
        state = TrainState(np.int32(step), params, ema, {}, moments, zero, zero, np.float32(np.inf))
        with jax.set_mesh(self.mesh):
            new, metrics = self.step(state, batch)
        return self.system.taken(), jax.device_get(metrics), jax.device_get(new)


@pytest.fixture(scope="module")
def whole():
    return Steps(1)


@pytest.fixture(scope="module")
def halved():
    return Steps(2)


def drawn(steps, step):
    """What chance has to give the examples of a step: noise, times, and which tokens are dropped."""
    experiment = steps.experiment
    config = experiment.model
    shape = (config.latent_size, config.latent_size, config.latent_channels)

    def of_row(row):
        keys = example_keys(run_key(experiment.seed, "examples"), step, row)
        time, kept = sample_time(keys.time, experiment.flow), kept_tokens(keys.mask, config)
        return jax.random.normal(keys.noise, shape), time, kept

    noise, time, kept = jax.jit(jax.vmap(of_row))(np.arange(BATCH))
    dropped = np.ones((BATCH, config.num_tokens))
    np.put_along_axis(dropped, np.asarray(kept), 0, axis=1)
    return np.asarray(noise), np.asarray(time), dropped


@pytest.mark.parametrize("step", STEPS)
def test_each_example_has_the_noise_time_and_mask_of_its_own_keys_at_this_step(whole, step):
    given, _, _ = whole(step)
    noise, time, dropped = drawn(whole, step)
    np.testing.assert_allclose(given["time"], time, rtol=1e-6)
    np.testing.assert_array_equal(given["dropped"], dropped)
    x_t = time[:, None, None, None] * noise + (1 - time[:, None, None, None]) * DATA
    np.testing.assert_allclose(given["latents"], x_t, atol=1e-5)
    np.testing.assert_array_equal(given["size_crop"], np.arange(4.0 * BATCH).reshape(BATCH, 4))


def test_no_two_steps_and_no_two_examples_share_a_draw(whole):
    first, second = (whole(step)[0] for step in STEPS)
    both = {name: np.concatenate([first[name], second[name]]) for name in ("latents", "time", "dropped")}
    for name, rows in both.items():
        assert len({row.tobytes() for row in rows}) == 2 * BATCH, name


@pytest.mark.parametrize("step", STEPS)
def test_a_network_that_knows_the_data_has_no_loss(whole, step):
    """Its velocity is exact only if it is told the time of the noise that it sees."""
    assert whole(step)[1]["flow_loss"] < 1e-8


@pytest.mark.parametrize("accumulation", ["whole", "halved"])
def test_loss_and_metrics_by_hand_are_those_of_the_whole_batch(accumulation, request):
    """An error of 3 t on kept tokens and twice that on dropped ones; the routing report follows from the times too."""
    steps = request.getfixturevalue(accumulation)
    given, metrics, _ = steps(0, error=3.0)
    time = np.sort(drawn(steps, 0)[1])
    np.testing.assert_allclose(np.sort(given["time"]), time, rtol=1e-6)
    experts, mean = np.floor(5 * time), time.mean()
    flow_loss = 9 * (time**2).mean() * (1 + WEIGHTS["dropped"] * 4)
    expected = {
        "flow_loss": flow_loss,
        "loss": flow_loss + WEIGHTS["balance"] * mean + WEIGHTS["z"] * 3 * mean,
        "balance_loss": mean,
        "drop_rate": 2 * mean,
        "router_z_loss": 3 * mean,
        **{f"coverage_{n}": [(experts == n).mean()] for n in range(3)},
        "coverage_3_or_more": [(experts >= 3).mean()],
        "coverage_most": [experts.max()],
        "grad_norm": flow_loss * 2 / 3,  # by the error, in which the loss is quadratic
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_halves_of_a_batch_differ(halved):
    """The control of the test above: one half's mean is not the whole batch's."""
    time = halved(0)[0]["time"]
    assert abs(time[: BATCH // 2].mean() / time.mean() - 1) > 0.01
