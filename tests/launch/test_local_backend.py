"""Tests that jobs on this machine are found and stopped by the launcher's record of processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdit.exit_codes import PREEMPTED
from launch.backends import local
from launch.job import LaunchError
from tests.launch.jobs import HOSTILE, install, placed, wait_for
from tests.runs import ROOT

NAME = "m-1"
# What `local.run_job` does, with other processes: they save on SIGTERM, as training does.
JOB = f"""
import sys
from launch.backends import local
from launch.local import launch

code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved') or {PREEMPTED})); "
code += "print('training', flush=True); time.sleep(60)"
command, log_dir = [sys.executable, "-c", code], local.LOGS / sys.argv[1]
sys.exit(launch(command, 2, 1, log_dir, on_start=lambda pids: local.write_record(log_dir, command, pids)))
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A job of two processes that train."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, "-c", JOB, NAME], env=environment)
    logs = [local.LOGS / NAME / f"process_{i}.log" for i in range(2)]
    wait_for(lambda: all(log.exists() and "training" in log.read_text() for log in logs))
    wait_for((local.LOGS / NAME / local.RECORD).exists)
    yield started
    started.terminate()
    started.wait(timeout=120)


def test_status_shows_who_runs_and_stop_lets_them_save(launcher):
    lines = local.status_lines(NAME)
    assert [line.rpartition(") ")[2] for line in lines] == ["runs: training"] * 2
    stopping = subprocess.Popen(
        [sys.executable, "-c", f"from launch.backends import local; assert local.stop_job({NAME!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert launcher.wait(timeout=120) == PREEMPTED
    assert stopping.wait(timeout=120) == 0
    assert [line.rpartition(") ")[2] for line in local.status_lines(NAME)] == ["has ended: saved"] * 2
    assert not local.stop_job(NAME)


def test_a_process_that_got_the_number_of_an_ended_one_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = local.LOGS / NAME
    directory.mkdir(parents=True)
    local.write_record(directory, ["python", "-m", "ecdit.train"], [os.getpid()])
    record = json.loads((directory / local.RECORD).read_text())
    record["launcher"]["command"] = ["python", "-m", "launch.tpu"]
    (directory / local.RECORD).write_text(json.dumps(record))
    assert local.status_lines(NAME) == [f"process 0 ({os.getpid()}) has ended: "]
    assert not local.stop_job(NAME)


def test_a_launcher_that_is_killed_leaves_no_half_of_its_record(tmp_path, monkeypatch):
    def killed(path, text):
        with path.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (local.LOGS / NAME).mkdir(parents=True)
    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        local.write_record(local.LOGS / NAME, ["python"], [1])
    with pytest.raises(LaunchError, match="no such job was launched"):
        local.status_lines(NAME)


def test_a_job_that_was_not_launched_is_said_not_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (local.status_lines, local.stop_job):
        with pytest.raises(LaunchError, match="no such job was launched from this directory"):
            ask("other")


@pytest.mark.parametrize(("accelerator", "slices", "devices"), [("v4-16", 2, 4), ("tpu7x-16", 2, 8)])
def test_every_host_is_a_process_with_the_devices_of_its_chips(monkeypatch, accelerator, slices, devices):
    seen = []
    monkeypatch.setattr(local, "launch", lambda *arguments, on_start: seen.append(arguments) or PREEMPTED)
    made = placed(accelerator, slices)
    assert local.run_job(made) == PREEMPTED
    command = [sys.executable, "-m", "ecdit.train", *made.train_flags]
    assert seen == [(command, 4, devices, Path("runs/local") / made.name)]
    shown = local.command_line(made)
    assert shown.startswith(
        f"python -m launch.local --processes=4 --devices={devices} --log_dir=runs/local/{made.name} -- --config="
    )


def test_no_value_is_read_as_code_by_the_shell_that_runs_the_command(tmp_path):
    install(tmp_path / "bin", "python", "import json, sys; json.dump(sys.argv[1:], open('seen', 'w'))")
    made = dataclasses.replace(placed("v4-16"), train_flags=tuple(HOSTILE))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    subprocess.run(["bash", "-c", local.command_line(made)], cwd=tmp_path, env=environment, check=True, timeout=120)
    arguments = json.loads((tmp_path / "seen").read_text())
    assert arguments[arguments.index("--") + 1 :] == HOSTILE
    assert not (tmp_path / "hacked").exists()


def test_a_pod_that_this_machine_would_not_bear_is_refused():
    with pytest.raises(LaunchError, match="a process for each of 32 hosts, and at most 16"):
        local.check(placed("v5p-256"))
    local.check(placed("v4-16"))
