"""Tests that a run which an outage ends has an exit code that launchers restart, and that it then goes on."""

import json
import subprocess
import sys

import pytest

from ecdit.exit_codes import OUTAGE
from launch.local import cpu_environment
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
