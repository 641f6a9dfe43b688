"""Tests that a run whose checkpoints have vanished does not silently start at step 0."""

import json
import os
import shutil

import pytest

from ecdit.checkpoints.restore import CheckpointError
from ecdit.runs.training_run import Accepted

SAID = (
    "checkpoints has no checkpoint",
    "step 5 was saved by",
    "overrides.json",
    "metrics.jsonl goes to step 5",
    "--start_over",
)


def lost(toy):
    shutil.rmtree(toy.workdir / "checkpoints")


def everything(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_same_command_refuses_and_changes_nothing(toy):
    toy.train(num_steps=5, every=3)
    lost(toy)
    kept = {path: data for path, data in everything(toy.workdir).items() if path.name != "trainer.lock"}
    for _ in range(2):  # the first refusal leaves nothing behind that would let the second start go on
        with pytest.raises(CheckpointError) as error:
            toy.train(num_steps=9, every=3)
        for said in SAID:
            assert said in str(error.value)
    found = everything(toy.workdir)
    assert {path: found.get(path) for path in kept} == kept


def test_metrics_alone_show_that_there_was_a_checkpoint(toy):
    """Every third step was saved: after seven, one of them had ended."""
    toy.train(num_steps=7, every=3)
    lost(toy)
    (toy.workdir / "overrides.json").unlink()
    with pytest.raises(CheckpointError, match="goes to step 7"):
        toy.train(num_steps=9, every=3)


def test_start_over_begins_at_step_0_and_keeps_the_old_records(toy, capsys):
    toy.train(num_steps=5, every=3)
    metrics = (toy.workdir / "metrics.jsonl").read_bytes()
    lost(toy)
    toy.accepted = Accepted(start_over=True)
    assert toy.train(num_steps=4, every=3) == 0
    place = toy.workdir / "before_start_over/1"
    assert f"started over: the records of the old run are in {place}" in capsys.readouterr().out
    assert toy.losses() == [(step, float(step)) for step in range(1, 5)]
    assert (place / "metrics.jsonl").read_bytes() == metrics
    assert {"config.json", "overrides.json", "tensorboard"} <= {path.name for path in place.iterdir()}
    # A launcher repeats the whole command: with checkpoints the flag does nothing.
    assert toy.train(num_steps=6, every=3) == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 7)]
    assert os.listdir(place.parent) == ["1"]


def test_a_run_that_ended_before_its_first_save_begins_again_and_keeps_its_metrics_aside(toy, capsys):
    """Killed ones too: the same command must go on without anybody's help."""

    def fail():
        raise ConnectionError("the data is gone")

    toy.at[3] = fail
    with pytest.raises(ConnectionError):
        toy.train(num_steps=9, every=4)
    toy.at.clear()
    metrics = (toy.workdir / "metrics.jsonl").read_bytes()
    assert metrics
    assert toy.train(num_steps=9, every=4) == 0
    place = toy.workdir / "before_start_over/1"
    assert f"metrics of its earlier steps are in {place}\n" in capsys.readouterr().out
    assert everything(place) == {place / "metrics.jsonl": metrics}
    assert toy.train(num_steps=9, every=4) == 0  # has a checkpoint
    assert os.listdir(place.parent) == ["1"]
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]


def test_overrides_tell_how_far_each_start_has_saved(toy):
    for steps in (4, 9):
        toy.train(num_steps=steps, every=3)
    starts = json.loads((toy.workdir / "overrides.json").read_text())
    assert [(start["step"], start["saved"]) for start in starts] == [(0, 4), (4, 9)]
