"""Saves on a disk that is full, gone or read-only for a while. A process of its own: a failed save leaves threads."""

import subprocess
import sys

import pytest

from tests.runs import run

SAVES = """
import contextlib, shutil, subprocess, sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
from ecdit.training import checkpoint
from ecdit.training.experiment import CheckpointConfig
from ecdit.training.saving import Saver
from tests.training.toy import toy_abstract, toy_sharding, toy_state

disk = Path(sys.argv[1])
config = CheckpointConfig(every=1, keep=2, init_from="", verify="always", max_failed_saves=2)
saver = Saver(disk / "run", config, lambda line: print("SAID", line, flush=True))
head = jax.device_put(jax.random.normal(jax.random.key(0), (1 << 19,)), toy_sharding())  # does not compress

def save(step):
    state = jax.device_put(toy_state(), toy_sharding())
    state.params["denoiser"]["head"] = state.ema["denoiser"]["head"] = head + step
    saver.save(state, step, checkpoint.Meta(checkpoint.FORMAT, {}, 16 * step, "toy", {}, {}))
    deadline = time.monotonic() + 60
    while saver.running is not None and time.monotonic() < deadline:  # what the loop does every step
        time.sleep(0.01)
        saver.check()
    with checkpoint.open_reader(disk / "run") as reader:
        print("STEPS", step, sorted(reader.all_steps()), flush=True)

def restored():
    with checkpoint.open_reader(disk / "run") as reader:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=toy_sharding()), state_like())
        state = checkpoint.restore(reader, reader.latest_step(), like)
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
except checkpoint.CheckpointError as error:
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
