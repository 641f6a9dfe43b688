"""Tests what the loop saves, writes and raises, and in which order, with a toy model."""

import dataclasses
import itertools
import json
import os
import signal
import sys
import time

import jax
import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.exit_codes import INTERRUPTED, PREEMPTED
from ecdit.partitioning import make_mesh
from ecdit.reporting import profiling
from ecdit.reporting.reporter import DivergedError
from ecdit.runs import training_run
from ecdit.runs.evaluator import drop_later
from ecdit.runs.training_run import train
from ecdit.runs.workload import device_batches
from tests.checkpoints.toy import toy_state
from tests.events import images, scalars
from tests.runs import run, tiny


def test_a_checkpoint_holds_its_own_step_though_the_next_ones_overwrite_the_buffers(toy):
    assert toy.train(num_steps=9, every=2) == 0
    assert toy.saved() == {step: {(float(step),)} for step in (2, 4, 6, 8, 9)}


def test_images_are_of_their_own_step_and_written_once(toy):
    """Every third step and the last; a resumed run, or a finished one started again, shows none of them twice."""
    toy.train(num_steps=7, every=4, images_every=3)
    assert toy.drawn == {step: {(float(step),)} for step in (3, 6, 7)}
    assert toy.losses() == [(step, float(step)) for step in range(1, 8)]
    for _ in range(2):
        toy.train(num_steps=9, every=4, images_every=3)
    assert [step for step, _ in images(toy.workdir)] == [3, 6, 7, 9]


def test_images_are_drawn_with_the_ema_weights(toy):
    """Those of a step and the last ones: here the EMA is the parameters and 100."""

    def state_with_another_ema():
        state = toy_state()
        return dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 100, state.ema))

    toy.first_state = state_with_another_ema
    toy.train(num_steps=3, every=9, images_every=2)
    assert toy.drawn == {2: {(102.0,)}, 3: {(103.0,)}}


EVALUATE = {"evaluation__every": 2, "evaluation__loss_images": 1}


def test_training_evaluates_the_ema_weights(toy, capsys):
    """Every second step, each once, whether images are drawn at it or not. The EMA is the parameters and 100."""

    def state_with_another_ema():
        state = toy_state()
        return dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 100, state.ema))

    toy.first_state = state_with_another_ema
    toy.train(num_steps=5, every=9, images_every=4, **EVALUATE)
    assert toy.evaluated == [(step, {(100.0 + step,)}) for step in (2, 4)]
    assert sorted(toy.drawn) == [4, 5]
    assert scalars(toy.workdir)["eval/loss"] == [(2, 2.0), (4, 4.0)]
    assert "step 4 evaluated: loss 4.0000" in capsys.readouterr().out


def test_a_resumed_run_evaluates_at_the_same_steps(toy):
    toy.train(num_steps=3, every=3, **EVALUATE)
    toy.train(num_steps=7, every=3, **EVALUATE)
    assert [step for step, _ in toy.evaluated] == [2, 4, 6]


def test_a_stopped_step_is_evaluated_on_resume_once(toy):
    """It was stopped at step 4, and saved it without an evaluation."""
    toy.at[4] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert toy.train(num_steps=7, every=9, **EVALUATE) == PREEMPTED
    assert list(toy.saved()) == [4]
    assert [step for step, _ in toy.evaluated] == [2]
    toy.train(num_steps=5, every=9, **EVALUATE)
    assert toy.evaluated[1:] == [(4, {(4.0,)})]
    toy.train(num_steps=5, every=9, **EVALUATE)
    assert [step for step, _ in toy.evaluated] == [2, 4]


def test_a_run_that_was_stopped_at_the_end_of_a_phase_evaluates_that_step_on_resume(toy):
    """The next phase goes on from it, and has not trained it."""
    phases = ({"after": 4, "changes": {"model.mask_ratio": 0.25}},)
    toy.at[4] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert toy.train(num_steps=7, every=9, phases=phases, **EVALUATE) == PREEMPTED
    assert [step for step, _ in toy.evaluated] == [2]
    toy.train(num_steps=7, every=9, phases=phases, **EVALUATE)
    assert [step for step, _ in toy.evaluated] == [2, 4, 6]


def test_each_start_says_once_how_long_it_will_take(toy, capsys):
    """After its tenth step, if others follow."""
    said = lambda: [line for line in capsys.readouterr().out.splitlines() if "will take" in line]  # noqa: E731
    toy.train(num_steps=10, every=4)
    assert said() == []
    toy.train(num_steps=24, every=4, images_every=22)
    (line,) = said()
    assert line.startswith("the other 4 steps will take about ")
    assert "the next images come after step 22" in line


def test_keep_leaves_the_newest(toy):
    toy.train(num_steps=9, every=2, keep=2)
    assert sorted(toy.saved()) == [8, 9]


def test_keep_every_leaves_those_of_every_so_many_steps_too(toy):
    """After a resume, too: the manager that saves the later ones has not saved the earlier ones."""
    toy.train(num_steps=9, every=2, keep=1, checkpoint__keep_every=4)
    assert sorted(toy.saved()) == [4, 8, 9]
    toy.train(num_steps=14, every=2, keep=1, checkpoint__keep_every=4)
    assert sorted(toy.saved()) == [4, 8, 12, 14]
    with pytest.raises(UserError, match=r"config\.checkpoint\.keep_every = 3: must be 0, or a multiple of .*every, 2"):
        tiny(checkpoint__every=2, checkpoint__keep_every=3)


def test_fewer_steps_than_saved_changes_nothing(toy):
    toy.train(num_steps=6, every=4)
    before = toy.losses()
    assert toy.train(num_steps=2, every=4) == 0
    assert toy.losses() == before
    assert sorted(toy.saved()) == [4, 6]


@pytest.mark.parametrize("stop", range(3, 8))
def test_a_run_that_dies_between_steps_resumes_without_a_gap_or_a_repeat(toy, stop):
    """The save of step 4 is running when batch 5 fails: it still ends, and the run goes on from it."""

    def fail():
        raise ConnectionError("the data is gone")

    toy.at[stop] = fail
    with pytest.raises(ConnectionError):
        toy.train(num_steps=9, every=4)
    toy.at.clear()
    assert toy.train(num_steps=9, every=4) == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]
    assert toy.saved()[9] == {(9.0,)}


def test_a_resumed_run_reads_on_where_it_stopped(toy):
    """Sixteen rows a step."""
    for num_steps in (4, 9):
        assert toy.train(num_steps=num_steps, every=4) == 0
    assert toy.first_rows == [0, 64]


def test_the_saver_is_asked_every_step(toy, monkeypatch):
    """So that a failed save is told of while it may still be mended."""
    asked = []

    class AsyncSaver(training_run.AsyncSaver):
        def check(self):
            asked.append(self.running)
            super().check()

    monkeypatch.setattr(training_run, "AsyncSaver", AsyncSaver)
    assert toy.train(num_steps=9, every=4) == 0
    assert len(asked) == 9


def test_sigterm_saves_the_running_step_and_the_same_command_goes_on(toy, capsys):
    before = signal.getsignal(signal.SIGTERM)
    toy.at[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert toy.train(num_steps=9, every=1000) == PREEMPTED
    assert "saved step 5" in capsys.readouterr().out
    assert sorted(toy.saved()) == [5]
    assert signal.getsignal(signal.SIGTERM) == before
    toy.at.clear()
    assert toy.train(num_steps=9, every=1000) == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]


def test_ctrl_c_saves_the_running_step_and_the_same_command_goes_on(toy, capsys):
    before = signal.getsignal(signal.SIGINT)
    toy.at[5] = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2))
    assert toy.train(num_steps=9, every=1000) == INTERRUPTED == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped by Ctrl-C; saved step 5")
    assert sorted(toy.saved()) == [5]
    assert signal.getsignal(signal.SIGINT) == before
    toy.at.clear()
    assert toy.train(num_steps=9, every=1000) == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]


INTERRUPTED_TWICE = """
import os, signal, sys, time
import jax.numpy as jnp
from ecdit.command_line import run_command
from ecdit.training.loop import StopRequests

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def main(argv):
    if "early" in argv:
        os.kill(os.getpid(), signal.SIGINT)  # while the run is set up
        time.sleep(60)
    StopRequests()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        print("still there", flush=True)
    time.sleep(60)

run_command(main, words=True)
"""


@pytest.mark.parametrize(
    ("when", "out", "err"),
    [("early", "", "interrupted\n"), ("", "still there\n", "interrupted twice: ended without a save\n")],
)
def test_a_second_ctrl_c_ends_the_process_at_once(when, out, err, cpu_env):
    begin = time.monotonic()
    done = run([sys.executable, "-c", INTERRUPTED_TWICE, *when.split()], cpu_env())
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, out, err)
    assert time.monotonic() - begin < 50


def test_a_trace_neither_begins_nor_ends_beside_a_running_save(toy, monkeypatch):
    """The profiler has crashed the process there."""
    found = []

    class AsyncSaver(training_run.AsyncSaver):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: found.append(("start", self.running)))
            monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: found.append(("stop", self.running)))

        def check(self):
            """Lets the save run as long as nobody waits for it."""

    monkeypatch.setattr(training_run, "AsyncSaver", AsyncSaver)
    assert toy.train(num_steps=5, every=1, train__profile_start=2, train__profile_steps=2) == 0
    assert found == [("start", None), ("stop", None)]


def test_sigterm_in_the_last_step_is_a_finished_run(toy):
    """It evaluates that step too, because no other start would."""
    toy.at[8] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert toy.train(num_steps=8, every=1000, **EVALUATE) == 0
    assert [step for step, _ in toy.evaluated] == [2, 4, 6, 8]


@pytest.mark.parametrize("first", [4, 7])  # the second of these is found after the last step
def test_bad_steps_in_a_row_stop_the_run(toy, first):
    toy.bad, toy.leaf = range(first, 100), 1
    with pytest.raises(
        DivergedError, match=rf"step {first + 2}: .*denoiser\.tail.*3 steps in a row.*max_bad_steps = 3"
    ):
        toy.train(num_steps=9, every=2)
    assert toy.losses()[-1][0] == first + 2  # all of them are on record
    assert len(toy.losses()) == first + 2


def test_bad_steps_that_are_not_in_a_row_do_not(toy, capsys):
    toy.bad = (2, 3, 5, 6, 8, 9)
    assert toy.train(num_steps=9, every=2) == 0
    assert capsys.readouterr().out.count("not finite") == 6


def test_every_line_of_the_metrics_is_json_also_of_a_step_that_was_not_finite(toy):
    """RFC 8259 has no NaN: what reads the file with anything but Python's json would stop there."""
    toy.bad = (2,)
    toy.train(num_steps=3, every=100)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (toy.workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8)])
def test_batches_are_the_same_on_any_mesh_and_from_any_start(sizes, emoji_data):
    mesh_values = dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))
    experiment = tiny(data__directory=str(emoji_data), **{f"mesh__{axis}": size for axis, size in mesh_values.items()})
    one = make_mesh(dataclasses.replace(experiment.mesh, data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])
    batches = device_batches(experiment, make_mesh(experiment.mesh), 16)
    expected = itertools.islice(device_batches(experiment, one, 0), 1, None)
    for batch, other in itertools.islice(zip(batches, expected, strict=False), 3):
        assert set(batch) == {"image", "tokens", "size_crop"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
            assert len(batch[name].sharding.device_set) == 8


def test_a_mesh_that_does_not_divide_a_parameter_is_refused_before_anything_is_made(toy):
    """One key-value head over two devices."""
    experiment = tiny(model__kv_heads=1, mesh__data=4, mesh__tensor=2)
    with pytest.raises(UserError, match=r"config\.model\.kv_heads = 1: must be a multiple of mesh\.tensor, 2"):
        train(experiment, toy.workdir)
    assert not toy.workdir.exists()


def test_evaluations_of_steps_after_the_one_that_a_run_goes_on_from_are_deleted(tmp_path):
    """It reaches these steps again, perhaps with other weights."""
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for name in ("step_00000004.json", "step_00000006.json", "step_00000006.png", "notes.txt"):
        (folder / name).write_text("x")
    drop_later(tmp_path, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step_00000004.json"]
    drop_later(tmp_path / "without", 4)
