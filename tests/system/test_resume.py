"""Tests runs that are killed, stopped and resumed, with real processes and signals."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from ecdit.checkpoints import restore
from ecdit.checkpoints.compatibility import check_resume
from ecdit.checkpoints.restore import CheckpointError
from ecdit.config import changeable, to_dict
from ecdit.exit_codes import PREEMPTED
from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, sampling_params, state_shardings
from tests.forking import run_forked
from tests.runs import ROOT, run, tiny, train_command

STEPS = 24
SHORT = {"train__num_steps": STEPS, "checkpoint__every": 4, "checkpoint__keep": 3, "optimizer__warmup_steps": 4}


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(workdir):
    return max((line["step"] for line in metrics(workdir)), default=0)


def start(workdir, data, env, **overrides):
    log = open(workdir.parent / f"{workdir.name}.log", "a")  # noqa: SIM115
    with log:
        return subprocess.Popen(train_command(workdir, data, **overrides), env=env, cwd=ROOT, stdout=log, stderr=log)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def half_written(directory):
    return {path for path in directory.iterdir() if path.name.endswith("-tmp")}


def kill(process):
    process.kill()
    assert process.wait() == -signal.SIGKILL


def saved(workdir, experiment, step=STEPS):
    """All arrays of a checkpoint, and its JSON."""
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    abstract = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    with restore.open_reader(workdir) as manager:
        return restore.restore(manager, step, abstract), restore.read_meta(manager, step)


def assert_same_end(workdir, other, experiment):
    (state, meta), (other_state, other_meta) = saved(workdir, experiment), saved(other, experiment)
    leaves, others = jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other_state)
    for (path, a), b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert meta == other_meta
    assert meta.next_row == STEPS * experiment.train.batch_size
    volatile = {"time", "images_per_second", "model_flops_per_second", "peak_share", "data_seconds"}
    lines = [[{k: v for k, v in line.items() if k not in volatile} for line in metrics(w)] for w in (workdir, other)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, emoji_data, module_env):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run(train_command(workdir, emoji_data, **SHORT), module_env)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def module_env(compilation_cache):
    from launch.local import cpu_environment

    return {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}


@pytest.fixture(scope="module")
def experiment(emoji_data):
    return tiny(data__directory=str(emoji_data), mesh__data=1, **SHORT)


def test_killed_three_times_ends_bitwise_equal(tmp_path, emoji_data, module_env, uninterrupted, experiment):
    seed = int(os.environ.get("ECDIT_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed of the kills: {seed}")
    early, late = sorted(random.Random(seed).sample(range(5, STEPS - 1), 2))
    workdir = tmp_path / "run"
    saving = workdir / "checkpoints"

    for step in (early, late):
        process = start(workdir, emoji_data, module_env, **SHORT)
        wait_for(lambda step=step: last_step(workdir) >= step, process)
        kill(process)
        if step == early:  # the second kill comes in the middle of a save, whenever the next one is
            process = start(workdir, emoji_data, module_env, **SHORT)
            before = half_written(saving)
            wait_for(
                lambda old=before: any(p.name.endswith("-tmp") and p not in old for p in saving.iterdir()), process
            )
            kill(process)
            assert [p for p in saving.iterdir() if p.name.endswith("-tmp")], "the save had ended before the kill"
    result = run(train_command(workdir, emoji_data, **SHORT), module_env)
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"done: step {STEPS}, checkpoint and metrics in {workdir}")
    assert not half_written(saving)
    assert_same_end(workdir, uninterrupted, experiment)


def test_sigterm_saves_exits_42_and_resumes_equal(tmp_path, emoji_data, module_env, uninterrupted, experiment):
    workdir = tmp_path / "run"
    changes = {**SHORT, "checkpoint__every": 1000}  # so that only the signal can have saved
    process = start(workdir, emoji_data, module_env, **changes)
    wait_for(lambda: last_step(workdir) >= 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == PREEMPTED
    stopped = last_step(workdir)
    assert 5 <= stopped < STEPS
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(stopped)]
    result = run_forked(train_command(workdir, emoji_data, **SHORT), module_env)
    assert result.returncode == 0, result.stderr
    assert f"resumed from step {stopped}" in result.stdout
    assert_same_end(workdir, uninterrupted, experiment)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("model.width", 64),
        ("train.batch_size", 8),
        ("data.caption_dropout", 0.2),
        ("optimizer.name", "adamw"),
    ],
)
def test_a_changed_key_refuses_to_resume(key, value, emoji_data, module_env, uninterrupted):
    changes = {**SHORT, key.replace(".", "__"): value}
    result = run_forked(train_command(uninterrupted, emoji_data, **changes), module_env)
    assert result.returncode == 2
    assert f"config.{key}: saved" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_key_either_may_change_or_refuses(experiment, uninterrupted):
    meta = saved(uninterrupted, experiment)[1]
    check_resume(meta, to_dict(experiment), changeable(experiment, "resume"), meta.dataset, STEPS)
    allowed = tiny(
        data__directory="elsewhere", mesh__data=8, train__num_steps=99, train__accumulation=2, model__remat="full",
        model__scan_unroll=2,
        sampling__seed=9, checkpoint__keep=1, data__num_threads=0, **{k: v for k, v in SHORT.items() if "warmup" in k},
    )  # fmt: skip
    check_resume(meta, to_dict(allowed), changeable(allowed, "resume"), meta.dataset, STEPS)
    with pytest.raises(CheckpointError, match="prepared data"):
        check_resume(meta, to_dict(experiment), changeable(experiment, "resume"), "another fingerprint", STEPS)


def test_restores_onto_another_mesh(experiment, uninterrupted):
    state, _ = saved(uninterrupted, experiment)
    sharded = tiny(mesh__data=1, mesh__fsdp=2, mesh__expert=2, mesh__tensor=2)
    mesh, system, optimizer = make_mesh(sharded.mesh), make_system(sharded.system), make_optimizer(sharded.optimizer)
    abstract = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    with restore.open_reader(uninterrupted) as manager:
        restored = restore.restore(manager, STEPS, abstract)
    assert restored.params["denoiser"]["head"]["kernel"].sharding.mesh == mesh
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(("change", "said"), [("dtype", "bfloat16"), ("shape", r"\[3, 3\]"), ("name", "has no array")])
def test_arrays_that_do_not_fit_are_refused(change, said, experiment, uninterrupted):
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, make_mesh(experiment.mesh, jax.devices()[:1]))
    abstract = abstract_state(system, optimizer, shardings)
    head = abstract.params["denoiser"]["head"]
    leaf = head["kernel"]
    if change == "dtype":
        head["kernel"] = jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=leaf.sharding)
    elif change == "shape":
        head["kernel"] = jax.ShapeDtypeStruct((3, 3), leaf.dtype, sharding=leaf.sharding)
    else:
        head["unknown"] = leaf
    with restore.open_reader(uninterrupted) as manager, pytest.raises(CheckpointError, match=said) as error:
        restore.restore(manager, STEPS, abstract)
    assert "denoiser/head" in str(error.value)


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_starts_from_the_ema_weights_of_another_run(
    frozen, tmp_path, emoji_data, module_env, uninterrupted, experiment
):
    """A rate too small to move anything shows the weights that the new run started from, trained there or not."""
    workdir = tmp_path / "run"
    changes = {
        **SHORT,
        "train__num_steps": 1,
        "optimizer__learning_rate": 1e-30,
        "checkpoint__init_from": uninterrupted,
        "text__frozen": frozen,
    }
    result = run_forked(train_command(workdir, emoji_data, **changes), module_env)
    assert result.returncode == 0, result.stderr
    assert "started from the EMA weights" in result.stdout
    now = dataclasses.replace(experiment, text=dataclasses.replace(experiment.text, frozen=frozen))
    (new, meta), (old, _) = saved(workdir, now, step=1), saved(uninterrupted, experiment)
    assert meta.next_row == experiment.train.batch_size
    assert new.frozen.keys() == ({"text"} if frozen else set())
    for (name, a), b in zip(flat_names({**new.params, **new.frozen}).items(), jax.tree.leaves(old.ema), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    drawn, _ = restore.restore_ema(workdir, make_system(now.system), make_mesh(now.mesh, jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, drawn, sampling_params(new))


def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path, emoji_data, module_env):
    """A file system of a few megabytes holds one checkpoint and not a second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        changes = {**SHORT, "checkpoint__keep": 10, "checkpoint__max_failed_saves": 0}
        result = run(train_command(disk / "run", emoji_data, **changes), module_env)
        assert result.returncode == 2, result.stdout + result.stderr
        message = result.stderr.splitlines()[-1]
        assert message.startswith(f"error: saving to {disk}/run/checkpoints/")
        assert "No space left on device" in message
        steps = [int(p.name) for p in (disk / "run/checkpoints").iterdir() if p.name.isdigit()]
        assert steps, "the disk should have held one checkpoint"
        with restore.open_reader(disk / "run") as manager:
            assert manager.latest_step() == max(steps)
            assert restore.read_meta(manager, max(steps)).next_row == 16 * max(steps)
    finally:
        subprocess.run(["umount", disk], check=True)
