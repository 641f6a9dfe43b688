"""Two real processes, joined as the hosts of a pod are."""

import json
import sys

import numpy as np
import pytest

from ecdit.exit_codes import PREEMPTED
from launch.local import cpu_environment, launch
from tests.runs import run, train_command

MESH = {"mesh__data": 2, "mesh__expert": 2}
CHANGES = {**MESH, "train__num_steps": 6, "checkpoint__every": 4, "model__group": "16", "optimizer__warmup_steps": 2}

# Signals the process itself, as a pod's scheduler would, once it has done three steps.
PREEMPT_ONE = """
import os, signal, sys, threading, time
from pathlib import Path
def preempt():
    while not METRICS.exists() or METRICS.read_text().count("\\n") < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
METRICS = Path(sys.argv.pop(1))
if os.environ["ECDIT_PROCESS_ID"] == "1":
    threading.Thread(target=preempt, daemon=True).start()
from ecdit.command_line import run_command
from ecdit.train import main
run_command(main)
"""


def losses(workdir):
    return {
        line["step"]: line["loss"] for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    }


@pytest.mark.slow
def test_two_processes_train_stop_together_and_resume_as_one_does(tmp_path, emoji_data, compilation_cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    one, two = tmp_path / "one", tmp_path / "two"
    result = run(train_command(one, emoji_data, **CHANGES), cpu_environment(4))
    assert result.returncode == 0, result.stderr

    flags = train_command(two, emoji_data, **{**CHANGES, "train__num_steps": 1000, "checkpoint__every": 1000})[3:]
    command = [sys.executable, "-c", PREEMPT_ONE, str(two / "metrics.jsonl"), *flags]
    code = launch(command, processes=2, devices=2, log_dir=tmp_path / "logs")
    logs = [(tmp_path / "logs" / f"process_{i}.log").read_text() for i in range(2)]
    assert code == PREEMPTED, logs[0][-3000:] + logs[1][-3000:]
    (stopped,) = (int(path.name) for path in (two / "checkpoints").iterdir())
    assert stopped >= 3
    assert f"saved step {stopped}" in logs[0]
    assert "step" not in [line[:4] for line in logs[1].splitlines()]  # process 0 alone reports

    found, expected = losses(two), losses(one)
    shared = sorted(set(found) & set(expected))
    assert len(shared) >= 3
    np.testing.assert_allclose([found[s] for s in shared], [expected[s] for s in shared], rtol=1e-5)

    # One process with the same devices goes on from what two have saved.
    more = {**CHANGES, "train__num_steps": stopped + 2}
    result = run(train_command(two, emoji_data, **more), cpu_environment(4))
    assert result.returncode == 0, result.stderr
    assert f"resumed from step {stopped}" in result.stdout
    assert sorted(losses(two)) == list(range(1, stopped + 3))
