"""Jobs on this machine: they are found, and stopped, by what the launcher noted of its processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local, local_job
from launch.job import LaunchError
from tests.launch.jobs import placed, wait_for
from tests.runs import ROOT

NAME = "m-1"
# What `local_job.run` does, with other processes: they save on SIGTERM, as training does.
JOB = """
import sys
from launch import local, local_job

code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved') or 42)); "
code += "print('training', flush=True); time.sleep(60)"
command, log_dir = [sys.executable, "-c", code], local_job.LOGS / sys.argv[1]
sys.exit(local.launch(command, 2, 1, log_dir, on_start=lambda pids: local_job.write_record(log_dir, command, pids)))
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A job of two processes that train."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, "-c", JOB, NAME], env=environment)
    logs = [local_job.LOGS / NAME / f"process_{i}.log" for i in range(2)]
    wait_for(lambda: all(log.exists() and "training" in log.read_text() for log in logs))
    wait_for((local_job.LOGS / NAME / local_job.RECORD).exists)
    yield started
    started.terminate()
    started.wait(timeout=120)


def test_status_shows_who_runs_and_stop_lets_them_save(launcher):
    lines = local_job.status(NAME)
    assert [line.rpartition(") ")[2] for line in lines] == ["runs: training"] * 2
    stopping = subprocess.Popen(
        [sys.executable, "-c", f"from launch import local_job; assert local_job.stop({NAME!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert launcher.wait(timeout=120) == 42
    assert stopping.wait(timeout=120) == 0
    assert [line.rpartition(") ")[2] for line in local_job.status(NAME)] == ["has ended: saved"] * 2
    assert not local_job.stop(NAME)


def test_a_process_that_got_the_number_of_an_ended_one_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = local_job.LOGS / NAME
    directory.mkdir(parents=True)
    local_job.write_record(directory, ["python", "-m", "ecdit.train"], [os.getpid()])
    record = json.loads((directory / local_job.RECORD).read_text())
    record["launcher"]["command"] = ["python", "-m", "launch.tpu"]
    (directory / local_job.RECORD).write_text(json.dumps(record))
    assert local_job.status(NAME) == [f"process 0 ({os.getpid()}) has ended: "]
    assert not local_job.stop(NAME)


def test_a_job_that_was_not_launched_is_said_not_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (local_job.status, local_job.stop):
        with pytest.raises(LaunchError, match="no such job was launched from this directory"):
            ask("other")


@pytest.mark.parametrize(("accelerator", "slices", "devices"), [("v4-16", 2, 4), ("tpu7x-16", 2, 8)])
def test_every_host_is_a_process_with_the_devices_of_its_chips(monkeypatch, accelerator, slices, devices):
    seen = []
    monkeypatch.setattr(local, "launch", lambda *arguments, on_start: seen.append(arguments) or 42)
    made = placed(accelerator, slices)
    assert local_job.run(made) == 42
    command = [sys.executable, "-m", "ecdit.train", *made.train_flags]
    assert seen == [(command, 4, devices, Path("runs/local") / made.name)]
    shown = local_job.command_line(made)
    assert shown.startswith(
        f"python -m launch.local --processes=4 --devices={devices} --log_dir=runs/local/{made.name} -- --config="
    )


def test_a_pod_that_this_machine_would_not_bear_is_refused():
    with pytest.raises(LaunchError, match="a process for each of 32 hosts, and at most 16"):
        local_job.check(placed("v5p-256"))
    local_job.check(placed("v4-16"))
