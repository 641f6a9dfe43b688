"""Tests phases, which change a run after some steps."""

import ast
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.compatibility import check_resume
from ecdit.checkpoints.restore import CheckpointError, Meta
from ecdit.config import ConfigError, changeable, to_dict
from ecdit.data import DataError
from ecdit.data.prepared import check_same_tokenizer
from ecdit.experiment import check_mesh, make_experiment
from ecdit.partitioning import make_mesh
from tests.runs import tiny

SMALLER = {"after": 4, "changes": {"train.batch_size": 8, "optimizer.learning_rate": 1e-3}}
UNMASKED = {"after": 7, "changes": {"model.mask_ratio": 0.0, "model.capacity_factor": 1.5}}


def phased(*phases, **changes):
    return tiny(train__num_steps=10, phases=phases, **changes)


def test_parts_by_hand():
    """Each phase differs from the one before it; rows count on: 4 batches of 16, then batches of 8."""
    experiment = phased(SMALLER, UNMASKED)
    first, second, third = parts = experiment.resolved_phases()
    assert [part[:3] for part in parts] == [(0, 4, 0), (4, 7, 64), (7, 10, 88)]
    assert first.experiment == tiny(train__num_steps=10)
    changed = [(p.experiment.train.batch_size, p.experiment.optimizer.learning_rate) for p in parts]
    assert changed == [(16, 1e-4), (8, 1e-3), (8, 1e-3)]
    assert [part.experiment.model.mask_ratio for part in parts] == [0.5, 0.5, 0.0]
    assert third.experiment.model.capacity_factor == 1.5
    assert [experiment.next_row(step) for step in (0, 1, 4, 5, 7, 10)] == [0, 16, 64, 72, 88, 112]
    assert [experiment.phase_of(step) for step in (0, 1, 4, 5, 7, 8, 10)] == [*[first] * 3, *[second] * 2, *[third] * 2]


def test_without_phases_there_is_one_part():
    experiment = tiny(train__num_steps=10)
    assert [part[:3] for part in experiment.resolved_phases()] == [(0, 10, 0)]
    assert experiment.resolved_phases()[0].experiment == experiment


def test_phases_survive_json():
    experiment = phased(SMALLER, UNMASKED)
    assert make_experiment(json.loads(json.dumps(to_dict(experiment)))) == experiment


@pytest.mark.parametrize(
    ("phases", "key", "said"),
    [
        ([UNMASKED, SMALLER], "phases[1].after", "must be above 7 and below 10, train.num_steps"),
        ([UNMASKED | {"after": 10}], "phases[0].after", "must be above 0 and below 10"),
        ([UNMASKED | {"after": 0}], "phases[0].after", "must be 1 or more"),
        ([{"after": 4}], "phases[0].changes", "missing"),
        ([SMALLER | {"steps": 3}], "phases[0].steps", "unknown key"),
        ([SMALLER, {"after": 5, "changes": {"model.width": 64}}], "phases[1].changes.model.width", "can change data."),
        ([{"after": 4, "changes": {"train.batch_size": 0}}], "phases[0].train.batch_size", "must be 1 or more"),
        ([{"after": 4, "changes": {"train.batch_size": "8"}}], "phases[0].train.batch_size", "must be int"),
        ([{"after": 4, "changes": {"model.latent_size": 16}}], "phases[0].data.image_size", "takes images of 16"),
        (["later"], "phases[0]", "must be a group of keys"),
        ([{"after": 4, "changes": 3}], "phases[0].changes", "must be a mapping"),
    ],
)
def test_impossible_phases_are_refused_by_name(phases, key, said):
    said = said.replace("takes images of 16", "take images of 16")
    with pytest.raises(ConfigError) as error:
        phased(*phases)
    assert error.value.key == key
    assert said in str(error.value)


def test_every_phase_must_fit_the_mesh():
    mesh = make_mesh(tiny().mesh, jax.devices())
    check_mesh(phased(SMALLER), mesh)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 4: must be a multiple of 8"):
        check_mesh(phased(SMALLER, {"after": 6, "changes": {"train.batch_size": 4}}), mesh)


def test_phases_that_have_not_begun_may_change():
    def resume(before, now, step):
        saved = Meta(FORMAT, to_dict(before), 0, "data", {}, {}, "", {}, "")
        check_resume(saved, to_dict(now), changeable(now, "resume"), "data", step)

    later = {"after": 8, "changes": {"train.batch_size": 16}}
    resume(phased(SMALLER, UNMASKED), phased(SMALLER, later), 7)
    resume(phased(), phased(SMALLER), 4)
    for before, now, step in (
        (phased(SMALLER, UNMASKED), phased(SMALLER, later), 8),
        (phased(), phased(SMALLER), 5),
        (phased(SMALLER), phased(), 5),
    ):
        with pytest.raises(CheckpointError, match=r"config\.phases: saved "):
            resume(before, now, step)


@pytest.mark.parametrize(
    ("key", "value"), [("data.directory", "moved"), ("train.accumulation", 2), ("model.attention", "plain")]
)
def test_what_may_change_on_a_resume_may_change_in_a_phase_that_has_begun(key, value):
    """Data moves, and memory or hardware become other ones, also in the middle of a phase that names them."""

    def phase(rate, **changes):
        return phased({"after": 4, "changes": {"optimizer.learning_rate": rate, **changes}})

    saved = Meta(FORMAT, to_dict(phase(1e-3)), 0, "data", {}, {}, "", {}, "")
    now = phase(1e-3, **{key: value})
    check_resume(saved, to_dict(now), changeable(now, "resume"), "data", 6)
    other = phase(2e-3, **{key: value})
    with pytest.raises(CheckpointError, match=r"config\.phases: saved .* now "):
        check_resume(saved, to_dict(other), changeable(other, "resume"), "data", 6)


def test_a_resume_with_another_value_is_told_the_phase_that_may_have_it():
    """The phase that the error shows is accepted, and no other key is in it."""
    saved = Meta(FORMAT, to_dict(tiny()), 0, "data", {}, {}, "", {}, "")

    def resume(now):
        check_resume(saved, to_dict(now), changeable(now, "resume"), "data", 4, changeable(now, "phase"))

    with pytest.raises(CheckpointError, match=r"config\.model\.mask_ratio: saved ") as error:
        resume(tiny(seed=1, model__mask_ratio=0.0, model__capacity_factor=1.5))
    shown = ast.literal_eval(str(error.value).rpartition("from here on: ")[2])
    assert shown == {"after": 4, "changes": UNMASKED["changes"]}
    resume(phased(shown))
    with pytest.raises(CheckpointError) as error:
        resume(tiny(seed=1))
    assert "phase" not in str(error.value)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_new_phase_begins_without_a_usual_loss_and_a_resumed_one_goes_on_with_it(toy, stop):
    """Losses of other images or masks are no measure of what is a spike. Steps 4 and later are the second phase's."""
    seen, step = {}, toy.train_step

    def record(state, batch):
        number = int(state.step) + 1
        seen[number] = float(state.usual_loss)
        state, metrics = step(state, batch)
        return dataclasses.replace(state, usual_loss=jnp.full_like(state.usual_loss, number)), metrics

    def fail():
        raise ConnectionError

    toy.train_step = record
    phases = [{"after": 3, "changes": {"optimizer.learning_rate": 1e-3}}]
    toy.at[stop + 1] = fail
    with pytest.raises(ConnectionError):
        toy.train(num_steps=5, every=stop, phases=phases)
    toy.at.clear()
    assert toy.train(num_steps=5, every=stop, phases=phases) == 0
    assert seen == {1: np.inf, 2: 1.0, 3: 2.0, 4: np.inf, 5: 4.0}


def test_data_sets_of_one_run_share_their_tokenizer(tmp_path):
    for name, content in zip("abc", (b"x", b"x", b"y"), strict=True):
        (tmp_path / name).write_bytes(content)
    prepared = [SimpleNamespace(tokenizer=tmp_path / name) for name in "abc"]
    check_same_tokenizer(prepared[:2])
    with pytest.raises(DataError, match=rf"^{tmp_path}/c is another tokenizer than {tmp_path}/a"):
        check_same_tokenizer(prepared)
