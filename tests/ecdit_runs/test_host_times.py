"""Tests that a report names the host for which the others wait."""

import dataclasses
import sys

import pytest

from ecdit.runs.host_times import HostTime, HostTimes, own_seconds, report_line, slowest
from launch.local import launch
from tests.runs import tiny


def times(*waits):
    """Hosts whose steps together take a second; each waits so long for its batch, and for the others in the step."""
    return [HostTime(n, f"h{n}", step=1.0 - wait, data=wait, save=0.0) for n, wait in enumerate(waits)]


def test_by_hand():
    """The step itself takes 0.2 s: host 2 waits 0.8 s for its batch, and the others in the step for host 2."""
    found = times(0.0, 0.1, 0.8, 0.0)
    assert own_seconds(found) == pytest.approx([0.2, 0.3, 1.0, 0.2])
    worst, factor = slowest(found)
    assert (worst.process, factor) == (2, pytest.approx(5.0))
    assert report_line(found).startswith("hosts: 0.200 to 1.000 s a step by themselves; slowest is process 2 on h2: ")


def noted(factor, *reports):
    said = []
    host_times = HostTimes(dataclasses.replace(tiny().train, slow_host_factor=factor), dict, said.append)
    for report in reports:
        host_times.note(times(*report))
    return [line for line in said if line.startswith("warning")]


def test_one_that_stays_slow_is_warned_of():
    slow, other, even = (0.0, 0.0, 0.5), (0.5, 0.0, 0.0), (0.1, 0.1, 0.1)
    assert noted(1.5, slow, slow) == []
    (line,) = noted(1.5, slow, slow, slow, slow)
    assert line.startswith("warning: process 2 on h2 keeps the other hosts waiting: its steps take 2.00 times as long")
    assert noted(1.5, slow, slow, even, slow) == []
    assert noted(1.5, slow, other, slow, other, slow, other) == []
    assert noted(2.5, slow, slow, slow, slow) == []


SLOW = """
import sys, time
from pathlib import Path
import jax
from ecdit import runtime
from ecdit.command_line import run_command
from tests.checkpoints.toy import Toy

def main(argv):
    runtime.configure(runtime.RuntimeConfig((), (), False, "", distributed=False, heartbeat_seconds=100))
    toy = Toy(Path(sys.argv[1]))
    for n in range(1, 60):
        toy.at[n] = lambda: time.sleep(0.05 if jax.process_index() == 1 else 0.01)
    toy.train(num_steps=50, every=100, mesh__data=2, train__log_every=5)

run_command(main, words=True)
"""


def test_a_slow_host_of_two_is_named_by_the_first(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run")]
    code = launch(command, processes=2, devices=1, log_dir=tmp_path / "logs")
    logs = [(tmp_path / f"logs/process_{i}.log").read_text() for i in range(2)]
    assert code == 0, logs
    lines = [line for line in logs[0].splitlines() if line.startswith("hosts: ")]
    assert lines, logs[0]
    assert all("slowest is process 1 on " in line for line in lines)
    assert "hosts: " not in logs[1]
