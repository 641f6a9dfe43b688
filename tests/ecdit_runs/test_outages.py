"""Tests that a run which an outage ends has an exit code that launchers restart, and that it then goes on."""

import json
import subprocess
import sys

import pytest

from ecdit.exit_codes import OUTAGE
from launch.local import _free_port, cpu_environment, process_environment
from tests.gcs_server import serving
from tests.runs import ROOT

# Trains the toy in the bucket. With "stop" the bucket goes away once step 4 is saved, and SIGTERM comes in step 7.
TRAIN = """
import asyncio, dataclasses, os, signal, sys, time, types
import gcsfs.retry
from ecdit.command_line import run_command
from ecdit.storage import as_path
from tests.checkpoints import toy

# gcsfs waits for half a minute between the attempts of a request.
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
toy.SIZE = 1000
workdir = as_path("gs://bucket/run")

class Drawless(toy.Toy):  # PIL writes no image into a bucket
    def workload(self, experiment):
        return dataclasses.replace(super().workload(experiment), images=lambda *_: None)

def stop():
    while not (workdir / "checkpoints/4/commit_success.txt").exists():
        time.sleep(0.05)
    as_path("gs://bucket/away").write_bytes(b"now")
    os.kill(os.getpid(), signal.SIGTERM)

def main(argv):
    run = Drawless(workdir)
    if argv[1:] == ["stop"]:
        run.at[7] = stop
    sys.exit(run.train(num_steps=9, every=4))

run_command(main, words=True)
"""


def train(env, *arguments):
    """The exit code and the output of a start of the toy."""
    command = [sys.executable, "-c", TRAIN, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_run_that_is_stopped_in_an_outage_restarts_and_goes_on_when_it_is_over():
    """Neither its last save nor the next start reaches the bucket."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    away = []

    def hook(method, name):
        if name == "away":
            away.append(name)
        return 503 if away and method == "PUT" and name.startswith("run/checkpoints/") else False

    with serving() as (store, places):
        env = {**cpu_environment(1), **places}
        store.hook = hook
        code, said = train(env, "stop")
        assert "saving to gs://bucket/run/checkpoints/7 failed: try later, 503" in said
        assert code == OUTAGE, said
        store.hook = lambda method, name: 503 if (method, name) == ("GET", "") else False  # lists nothing
        code, said = train(env)
        assert said.splitlines()[-1] == "error: a bucket or the network cannot be reached: try later, 503"
        assert code == OUTAGE
        store.hook = lambda *_: False
        code, said = train(env)
        assert code == 0, said
        assert "resumed from step 4 of gs://bucket/run/checkpoints" in said
        parts = [data for name, (data, *_) in sorted(store.objects.items()) if name.startswith("run/metrics/")]
        assert [json.loads(line)["step"] for line in b"".join(parts).splitlines()] == list(range(1, 10))


# Two processes meet errors that the network or a disk gives one of them; in the end, one cannot read a checkpoint.
ONE_IS_CUT_OFF = """
import sys
from pathlib import Path
import jax
from orbax.checkpoint._src.futures import future
from ecdit import runtime
from ecdit.checkpoints import arrays
from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.multihost import on_first
from ecdit.runs import lock
from ecdit.storage import is_temporary
from tests.checkpoints import toy

class HttpError(Exception):
    __module__, code = "gcsfs.retry", 503

def fail(error):
    raise error

def fail_because(cause):
    raise UserError("a bucket") from cause

def check(name, do):
    try:
        do()
    except Exception as error:
        print(name, is_temporary(error), flush=True)

def hold(workdir):
    with lock.locked(workdir, print):
        pass

def train(workdir):
    return toy.Toy(workdir).train(num_steps=4, every=10, mesh__data=2, checkpoint__verify="never")

def main(argv):
    runtime.configure(runtime.RuntimeConfig((), (), False, "", distributed=False, heartbeat_seconds=100))
    workdir, second = Path(argv[1]), jax.process_index() == 1
    for error in (HttpError("try later"), ConnectionError("no route"), PermissionError("no")):
        check("ON_FIRST", lambda: on_first(lambda: fail(error)))
    real, lock._file_lock = lock._file_lock, lambda *_: fail_because(ConnectionError("no route"))
    check("LOCK", lambda: hold(workdir))
    lock._file_lock = real
    result = future.ChainedFuture.result
    if second:
        future.ChainedFuture.result = lambda *_, **__: fail(HttpError("try later"))
    check("SAVE", lambda: train(workdir))
    future.ChainedFuture.result = result
    if second:
        away = ValueError("UNAVAILABLE: Error reading gs://bucket/run/checkpoints/2: Connection timed out")
        arrays.ocp.PyTreeCheckpointHandler.restore = lambda *_, **__: fail(away)
    sys.exit(train(workdir))

run_command(main, words=True)
"""


def test_an_outage_of_one_of_two_processes_restarts_both(toy, monkeypatch):
    toy.train(num_steps=2, every=2)
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    command, coordinator = [sys.executable, "-c", ONE_IS_CUT_OFF, str(toy.workdir)], f"127.0.0.1:{_free_port()}"
    started = [
        subprocess.Popen(
            command,
            env=process_environment(coordinator, 2, process, 1),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for said in printed:
        found = [line for line in said.splitlines() if line.startswith(("ON_FIRST", "LOCK", "SAVE"))]
        assert found == ["ON_FIRST True", "ON_FIRST True", "ON_FIRST False", "LOCK True", "SAVE True"], said
    assert [process.returncode for process in started] == [OUTAGE, OUTAGE], printed
