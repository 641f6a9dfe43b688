"""Tests saves on a disk that is full, gone or read-only for a while, in its own process because of leftover threads."""

import subprocess
import sys

import pytest

from launch.local import launch
from tests.runs import run

SAVES = """
import contextlib, shutil, subprocess, sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints import restore
from ecdit.checkpoints.config import CheckpointConfig
from ecdit.checkpoints.async_save import AsyncSaver
from tests.checkpoints.toy import toy_abstract, toy_sharding, toy_state

disk = Path(sys.argv[1])
config = CheckpointConfig(every=1, keep_every=0, keep=2, init_from="", verify="always", max_failed_saves=2)
saver = AsyncSaver(disk / "run", config, lambda line: print("SAID", line, flush=True))
head = jax.device_put(jax.random.normal(jax.random.key(0), (1 << 19,)), toy_sharding())  # does not compress

def save(step):
    state = jax.device_put(toy_state(), toy_sharding())
    state.params["denoiser"]["head"] = state.ema["denoiser"]["head"] = head + step
    saver.save(state, step, restore.Meta(FORMAT, {}, 16 * step, "toy", {}, {}, "", {}, ""))
    deadline = time.monotonic() + 60
    while saver.running is not None and time.monotonic() < deadline:  # what the loop does every step
        time.sleep(0.01)
        saver.check()
    with restore.open_reader(disk / "run") as reader:
        print("STEPS", step, sorted(reader.all_steps()), flush=True)

def restored():
    with restore.open_reader(disk / "run") as reader:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=toy_sharding()), state_like())
        state = restore.restore(reader, reader.latest_step(), like)
        assert float(state.params["denoiser"]["head"][0]) == float((head + reader.latest_step())[0])

def state_like():
    state = jax.eval_shape(toy_state)
    for part in (state.params, state.ema):
        part["denoiser"]["head"] = jax.ShapeDtypeStruct(head.shape, head.dtype)
    return state

save(1)
filler = (disk / "filler").open("wb", buffering=0)
with contextlib.suppress(OSError):
    while filler.write(bytes(1 << 12)): pass
save(2)
save(3)
filler.truncate(0)
filler.close()  # an open file is in the way of a remount
save(4)  # what the failed ones left must not be in its way
restored()
shutil.rmtree(disk / "run" / "checkpoints")
save(5)
save(6)
restored()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
save(7)
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
save(8)
save(9)
restored()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
save(10)
save(11)
try:
    save(12)
except restore.CheckpointError as error:
    print("RAISED", error, flush=True)
"""


def test_failed_saves_are_reported_survived_and_counted(tmp_path, cpu_env):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = run([sys.executable, "-c", SAVES, str(disk)], cpu_env())
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("SAID", "STEPS", "RAISED"))]
    steps = [line.removeprefix("STEPS ") for line in lines if line.startswith("STEPS")]
    kept = ["1 [1]", "2 [1]", "3 [1]", "4 [1, 4]", "5 [5]", "6 [5, 6]", "7 [5, 6]", "8 [6, 8]", "9 [8, 9]"]
    assert steps == [*kept, "10 [8, 9]", "11 [8, 9]"], lines
    said = [line for line in lines if line.startswith("SAID")]
    where = f"{disk}/run/checkpoints"
    assert [line.split(" failed")[0] for line in said] == [f"SAID saving to {where}/{n}" for n in (2, 3, 7, 10, 11)]
    assert all("No space left on device" in line for line in said[:2])
    assert "failed save 2, " in said[1]
    assert "failed save 1, " in said[2]
    assert lines[-1].startswith(f"RAISED saving to {where}/12 failed")


ONE_FAILS = """
import os, resource, sys, time
from pathlib import Path
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ecdit import runtime
from ecdit.checkpoints import arrays, restore
from ecdit.checkpoints.config import CheckpointConfig
from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.async_save import AsyncSaver
from ecdit.training.state import TrainState

runtime.configure(runtime.RuntimeConfig((), (), False, "", distributed=False, heartbeat_seconds=100))
workdir, me = Path(sys.argv[1]), jax.process_index()
config = CheckpointConfig(every=1, keep_every=0, keep=2, init_from="", verify="always", max_failed_saves=1)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = np.random.default_rng(0).normal(size=(2, 1 << 17)).astype(np.float32)  # does not compress
lines = (workdir.parent / f"lines_{me}").open("w", buffering=1)
saver = AsyncSaver(workdir, config, lambda line: print("SAID", line, file=lines))

def save(step, limited=None):
    if me == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index] + step)
    state = TrainState(x, {}, {}, {}, {}, x, x, x)
    saver.save(state, step, restore.Meta(FORMAT, {}, 0, "toy", {}, {}, "", {}, ""))
    while saver.running is not None:
        time.sleep(0.01)
        saver.check()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("STEPS", step, sorted(saver.manager.all_steps()) if saver.manager else "none open", file=lines)

save(1)
save(2, limited=1)
save(3)
save(4, limited=0)
save(5)
records = arrays.read_records(restore.step_directory(saver.manager, 5))
like = {"step": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)}
found = arrays.restore_arrays(restore.step_directory(saver.manager, 5), records, like)
arrays.check_sums(workdir, records, arrays.checksums(found))
saver.close()
"""


def test_a_save_that_fails_on_one_process_fails_on_all_and_the_next_one_works(tmp_path, monkeypatch):
    """One process may write no file above 64 KB for a while. The other must neither wait for it nor commit."""
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", ONE_FAILS, str(tmp_path / "run")]
    code = launch(command, processes=2, devices=1, log_dir=tmp_path / "logs")
    assert code == 0, "\n".join((tmp_path / f"logs/process_{i}.log").read_text()[-3000:] for i in range(2))
    where = f"{tmp_path}/run/checkpoints"
    for i in range(2):
        lines = (tmp_path / f"lines_{i}").read_text().splitlines()
        steps = [line.removeprefix("STEPS ") for line in lines if line.startswith("STEPS")]
        assert steps == ["1 [1]", "2 none open", "3 [1, 3]", "4 none open", "5 [3, 5]"]
        said = [line for line in lines if line.startswith("SAID")]
        assert [line.split(" failed: ")[0] for line in said] == [f"SAID saving to {where}/{step}" for step in (2, 4)]
        for line, culprit in zip(said, (1, 0), strict=True):
            assert ("File too large" in line) if i == culprit else (f"process {culprit} could not write" in line)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["3", "5"]
