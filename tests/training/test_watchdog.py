"""Tests a process that really hangs."""

import subprocess
import sys
import time

import pytest

from ecdit.exit_codes import HUNG
from tests.runs import run, tiny, train_command

HANG = """
import sys, time
from ecdit.training.watchdog import Watchdog
def stuck_here():
    time.sleep(60)
seconds = float(sys.argv[1])
watchdog = Watchdog({"data": 100.0, "step": seconds, "compile": 10 * seconds})
watchdog.enter("data", "waiting for the data of step 6")
watchdog.enter("compile" if sys.argv[2] == "slow" else "step", "in step 7")
if sys.argv[2] == "close":
    watchdog.close()
    time.sleep(2)
    sys.exit(5)
stuck_here()
"""


def hang(seconds, how=""):
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, str(seconds), how], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.parametrize(("how", "factor", "key"), [("", 1, "watchdog_seconds"), ("slow", 10, "watchdog.compile")])
def test_a_phase_that_takes_too_long_ends_the_process_by_name(how, factor, key):
    code, said, seconds = hang(0.5, how)
    assert code == HUNG
    assert f"hung: in step 7 for {0.5 * factor:g} s (config.train.{key} = {0.5 * factor:g})" in said
    assert "stuck_here" in said
    assert 0.5 * factor < seconds < 0.5 * factor + 15


def test_a_closed_watchdog_ends_nothing():
    assert hang(0.5, "close")[:2] == (5, "")


def test_each_phase_has_a_limit_of_its_own_or_ten_times_that_of_a_step():
    config = tiny(train__watchdog_seconds=60, train__watchdog__restore=7).train
    slow = dict.fromkeys(("start", "prepare", "compile", "save", "draw"), 600.0)
    assert config.watchdog_limits() == {"step": 60, "data": 60, "restore": 7, **slow}
    assert tiny(train__watchdog_seconds=0).train.watchdog_limits() == {}


SLOW_START = """
import sys, time
from ecdit import runtime
runtime.configure = lambda *_: time.sleep(60)  # processes that never join, or devices that never answer
from ecdit.command_line import run_command
from ecdit.train import main
run_command(main)
"""


def test_the_watchdog_watches_from_the_start_of_the_process(tmp_path, cpu_env):
    """Before, a pod of which one host was missing waited for ever."""
    flags = train_command(tmp_path / "run", tmp_path, train__watchdog_seconds=9, train__watchdog__start=1)[3:]
    done = run([sys.executable, "-c", SLOW_START, *flags], cpu_env(), timeout=50)
    assert done.returncode == HUNG, done.stderr
    assert "hung: starting: joining the other processes for 1 s (config.train.watchdog.start = 1)" in done.stderr


@pytest.mark.parametrize(("phase", "what"), [("prepare", "preparing the data"), ("restore", "restoring or drawing")])
def test_what_comes_before_the_first_step_is_watched(phase, what, tmp_path, cpu_env):
    """Data, or a checkpoint, on a disk that does not answer."""
    done = run([sys.executable, "-c", STUCK, str(tmp_path / "run"), phase], cpu_env(8), timeout=100)
    assert done.returncode == HUNG, done.stderr
    assert f"hung: {what}" in done.stderr
    assert f"(config.train.watchdog.{phase} = 1)" in done.stderr


STUCK = """
import dataclasses, sys, time
from pathlib import Path
from tests.checkpoints.toy import Toy

class Stuck(Toy):
    def workload(self, experiment):
        name = {"prepare": "prepare_data", "restore": "first_state"}[sys.argv[2]]
        return dataclasses.replace(super().workload(experiment), **{name: lambda: time.sleep(60)})

changes = {f"train__watchdog__{sys.argv[2]}": 1, "train__watchdog_seconds": 60}
Stuck(Path(sys.argv[1])).train(num_steps=2, every=2, **changes)
"""
