"""Tests learning rates by hand: schedules, a decay from a stable checkpoint, and factors of parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.compatibility import check_resume
from ecdit.checkpoints.restore import Meta
from ecdit.config import ConfigError, changeable, to_dict
from ecdit.experiment import check_mesh
from ecdit.partitioning import make_mesh
from ecdit.system import make_system
from ecdit.training.optimizer import check_factors, make_optimizer, make_schedule
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import make_train_step
from tests.runs import tiny

UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiles in half the time


def config(**changes):
    return tiny(**{f"optimizer__{key}": value for key, value in changes.items()}).optimizer


def rates(config, counts):
    return [float(make_schedule(config)(jnp.int32(count))) for count in counts]


def test_cosine_by_hand():
    """Two updates of warm-up, then a quarter of a turn at a time down to a tenth of the rate, and there it stays."""
    cosine = config(schedule="cosine", learning_rate=2.0, warmup_steps=2, decay_steps=4, end_factor=0.1)
    half, root = 0.9 / 2, np.sqrt(0.5)
    decay = [1.0, half * (1 + root) + 0.1, half + 0.1, half * (1 - root) + 0.1, 0.1, 0.1]
    np.testing.assert_allclose(rates(cosine, range(8)), [1.0, 2.0, *(2 * np.array(decay))], rtol=1e-6)


def test_warmup_stable_decay_by_hand():
    """Warm-up, a stable rate up to update 5, and a line from there to a fifth."""
    changes = {"warmup_steps": 2, "decay_begin": 5, "decay_steps": 4, "end_factor": 0.2}
    stable = config(schedule="warmup_stable_decay", learning_rate=2.0, **changes)
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.4]
    np.testing.assert_allclose(rates(stable, range(11)), expected, rtol=1e-6)


def test_a_schedule_that_does_not_decay_yet_is_the_constant_one_bitwise():
    """So that the steps before a decay do not depend on when it was decided on."""
    constant = config(learning_rate=3e-4, warmup_steps=7)
    later = dataclasses.replace(constant, schedule="warmup_stable_decay", decay_begin=20, decay_steps=5)
    assert rates(constant, range(21)) == rates(later, range(21))
    assert rates(constant, [21]) != rates(later, [21])


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("decay_steps", 0, {"schedule": "cosine"}),
        ("decay_steps", 0, {"schedule": "warmup_stable_decay", "decay_begin": 30_000}),
        ("decay_begin", 3, {"schedule": "warmup_stable_decay", "decay_steps": 5, "warmup_steps": 4}),
        ("decay_begin", -1, {}),
        ("moment_dtype", "bfloat16", {"name": "adafactor"}),
        ("adam_b2", 0.999, {"name": "adamw", "moment_dtype": "bfloat16"}),
        ("rmsprop_decay", 0.995, {"moment_dtype": "bfloat16"}),
        ("end_factor", 1.0, {}),
        ("end_factor", -0.1, {}),
        ("learning_rate_factors.text", -1.0, {"learning_rate_factors": {"text": -1.0}}),
        ("learning_rate_factors.text", "0", {"learning_rate_factors": {"text": "0"}}),
        ("learning_rate_factors.text", True, {"learning_rate_factors": {"text": True}}),
    ],
)
def test_impossible_values_are_refused_by_name(key, value, changes):
    values = changes if "." in key else changes | {key: value}
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert (error.value.key, error.value.value) == (f"optimizer.{key}", value)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_a_mean_of_squares_in_bfloat16_falls_with_the_gradients(name):
    """Gradients become ten times smaller; at larger decays than are allowed the mean would stay where it was."""
    draws = np.random.default_rng(0).normal(0, 1, (1000, 64)).astype(np.float32)
    gradients = draws * np.where(np.arange(1000) < 200, 1, 0.1)[:, None].astype(np.float32)

    def mean_of_squares(dtype):
        changes = {"name": name, "moment_dtype": dtype, "clip_norm": 1e9}
        optimizer, params = make_optimizer(config(**changes)), jnp.zeros(64)

        def update(state, gradient):
            return optimizer.update(gradient, state, params)[1], None

        state, _ = jax.lax.scan(update, optimizer.init(params), jnp.asarray(gradients))
        return np.asarray(optax.tree_utils.tree_get(state, "nu"), np.float32)

    exact, rounded = mean_of_squares("float32"), mean_of_squares("bfloat16")
    assert (exact < 0.02).all()
    np.testing.assert_allclose(rounded, exact, rtol=0.25)
    np.testing.assert_allclose(rounded.mean(), exact.mean(), rtol=0.1)


PARTS = {"text": {"w": 1.0}, "denoiser": {"pair": {"router": 2.0, "up": 3.0}, "pairs": {"up": 4.0}}}


@pytest.mark.parametrize("name", ["rmsprop", "adamw", "adafactor"])
def test_factors_scale_the_updates_of_their_parts_alone(name):
    """0 leaves the text tower bitwise as it was; the longest path counts; "denoiser/pair" is no part of "pairs"."""
    factors = {"text": 0, "denoiser/pair": 0.5, "denoiser/pair/router": 0.25}
    params = jax.tree.map(lambda x: jnp.full((8, 8), x), PARTS)
    gradients = jax.tree.map(lambda x: jnp.cos(x + jnp.arange(64.0).reshape(8, 8)), params)

    def first_update(**changes):
        optimizer = make_optimizer(config(name=name, warmup_steps=1, weight_decay=0.1, **changes))
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    plain, scaled = first_update(), first_update(learning_rate_factors=factors)
    moved = optax.apply_updates(params, scaled)
    np.testing.assert_array_equal(moved["text"]["w"], params["text"]["w"])
    expected = {"pair": {"router": 0.25, "up": 0.5}, "pairs": {"up": 1.0}}
    jax.tree.map(
        lambda factor, a, b: np.testing.assert_allclose(a, factor * b, rtol=1e-6, atol=1e-12),
        expected,
        scaled["denoiser"],
        plain["denoiser"],
    )
    assert all(np.abs(update).max() > 0 for update in jax.tree.leaves(plain))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("router", "the model has denoiser, text"),
        ("denoiser/pair/routers", "denoiser/pair has router, up"),
        ("text/w/x", "text/w has no parts"),
        ("", "the model has denoiser, text"),
    ],
)
def test_a_factor_of_a_part_that_is_not_there_is_refused(part, said):
    with pytest.raises(ConfigError) as error:
        check_factors(config(learning_rate_factors={part: 0.5}), PARTS)
    assert error.value.key == f"optimizer.learning_rate_factors.{part}"
    assert said in str(error.value)
    check_factors(config(learning_rate_factors={"denoiser/pair": 0.5, "text/w": 0.0}), PARTS)


def test_a_frozen_part_takes_no_factor():
    """The setup of every command that trains or plans refuses it, before anything is compiled."""
    factors = {"optimizer__learning_rate_factors": {"text": 0.5, "denoiser/pairs/even/experts/router": 2.0}}
    mesh = make_mesh(tiny().mesh, jax.devices())
    check_mesh(tiny(**factors), mesh)
    with pytest.raises(ConfigError, match=r"learning_rate_factors\.text = 0\.5: .* the model has denoiser$"):
        check_mesh(tiny(text__frozen=True, **factors), mesh)


def batch(number):
    """Random images and captions, of the shapes of `tiny`."""
    rng = np.random.default_rng(number)
    return {
        "image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
        "tokens": rng.integers(1, 2048, (16, 16), np.int32),
        "size_crop": np.zeros((16, 4), np.float32),
    }


STABLE, DECAY = 2, 3
DECAYS = {"decay_begin": STABLE}  # alone, so that both phases are one program but for a number
SHORT = {"optimizer__warmup_steps": 1, "optimizer__learning_rate": 1e-2}
SHORT |= {"optimizer__schedule": "warmup_stable_decay", "optimizer__decay_begin": 1000, "optimizer__decay_steps": DECAY}


@functools.cache
def compiled(experiment):
    """A run's mesh, its first state and its step on one device. Equal phases share them."""
    mesh, system = make_mesh(experiment.mesh, jax.devices()[:1]), make_system(experiment.system)
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)
    init = lambda: init_state(system, optimizer, shardings, 0)  # noqa: E731
    step = make_train_step(experiment.step_config, system, mesh)
    with jax.set_mesh(mesh):
        state = jax.device_get(jax.jit(init, compiler_options=UNOPTIMISED)())
        return mesh, state, step.lower(state, batch(0)).compile()  # as runs compile it: bits are compared


def steps(experiment, state, numbers):
    """The state after some steps, and the loss and the rate of each."""
    mesh, _, step = compiled(experiment)
    state, lines = jax.tree.map(np.copy, state), []  # a step may write over the state that it is given
    with jax.set_mesh(mesh):
        for number in numbers:
            state, metrics = step(state, batch(number))
            lines.append((float(metrics["loss"]), float(metrics["learning_rate"])))
    return jax.device_get(state), lines


def test_a_decay_from_a_stable_checkpoint_is_that_of_a_run_which_had_it_from_the_start():
    """The stable run goes on with a phase that decays. Its checkpoint may be resumed so; both end bitwise equal."""
    small = {"mesh__data": 1, "model__depth": 2, "model__extra_blocks": 1}  # compiles sooner
    changes = {**SHORT, **small, "train__num_steps": STABLE + DECAY}
    stable, whole = tiny(**changes), tiny(**changes | {f"optimizer__{key}": value for key, value in DECAYS.items()})
    phases = ({"after": STABLE, "changes": {f"optimizer.{key}": value for key, value in DECAYS.items()}},)
    decayed = tiny(**changes, phases=phases)

    saved = Meta(FORMAT, to_dict(stable), 0, "data", {}, {}, "", {}, "")
    check_resume(saved, to_dict(decayed), changeable(decayed, "resume"), "data", STABLE)

    before, after = (phase.experiment for phase in decayed.resolved_phases())
    assert (before, after) == (stable, whole)
    first, expected = compiled(whole)[1], steps(whole, compiled(whole)[1], range(STABLE + DECAY))
    kept, early = steps(before, first, range(STABLE))
    state, late = steps(after, kept, range(STABLE, STABLE + DECAY))
    assert [*early, *late] == expected[1]
    np.testing.assert_allclose([rate for _, rate in expected[1]], 1e-2 * np.array([1, 1, 1, 2 / 3, 1 / 3]), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, expected[0])
