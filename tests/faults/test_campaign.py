"""Tests the first trials of a campaign and its table. `python -m tests.faults.campaign` runs all of it."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from launch.job import RESTART_CODES
from tests.faults.campaign import PATTERN, table
from tests.faults.faults import shell_code
from tests.faults.guards import garble
from tests.faults.io_errors import Faults
from tests.faults.kinds import KINDS
from tests.runs import run


@pytest.mark.slow
def test_the_first_trials_pass_and_none_is_done_twice(tmp_path, emoji_data, compilation_cache, cpu_env):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    out = tmp_path / "campaign.jsonl"
    options = [f"--out={out}", f"--data={emoji_data}", f"--cache={compilation_cache}"]
    command = [sys.executable, "-m", "tests.faults.campaign", "--trials=2", *options]
    done = run(command, cpu_env(), timeout=900)
    logs = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [log["kind"] for log in logs] == list(PATTERN[:2])
    assert done.stdout.startswith(f"seed {logs[0]['seed']}\n")
    before = out.read_text()
    assert run(command, cpu_env()).returncode == 0
    assert out.read_text() == before


def test_every_fault_is_in_a_hundred_trials():
    kinds = [PATTERN[number % len(PATTERN)] for number in range(100)]
    assert set(kinds) == set(KINDS)
    assert kinds.count("bit flip") >= 20
    assert min(map(kinds.count, KINDS)) >= 4


def test_the_table_counts_what_failed_and_what_was_not_found():
    valid = {"kind": "bit flip", "passed": True, "array_data_hit": [20], "resumed_from": 15, "bitwise": True}
    missed = {"kind": "bit flip", "passed": False, "array_data_hit": [20], "resumed_from": 20}
    moved = {"kind": "processes changed", "passed": True, "lost": 4, "loss_difference": 3e-6}
    lines = table([valid, missed, moved]).splitlines()
    assert "| bit flip | 2 | 1 | 1 | 0 |" in lines
    assert "| processes changed | 1 | 1 | 0 | 4 |" in lines
    assert lines[-1].startswith("Trials with damaged array data: 2, not found: 1. ")
    assert lines[-1].endswith("3.0e-06.")


def test_a_signal_s_code_is_the_one_that_launchers_know():
    assert [shell_code(code) for code in (0, 2, 43, -6, -9)] == [0, 2, 43, 134, 137]
    assert [shell_code(code) in RESTART_CODES for code in (0, 1, 2, 43, 44, -6)] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_metrics_are_garbled_as_the_trial_says():
    data = b"".join(b'{"step": %d}\n' % step for step in range(1, 9))
    for seed in range(50):
        spoiled = garble(data, "byte", random.Random(seed))
        assert len(spoiled) == len(data)
        assert spoiled.count(b"\xff") == 1
        assert data.startswith(cut := garble(data, "cut", random.Random(seed)))
        assert len(cut) < len(data)
        twice = garble(data, "twice", random.Random(seed)).splitlines()
        assert 9 <= len(twice) <= 12
        assert set(twice) == set(data.splitlines())


READ_AND_WRITE = """
import os, sys
from pathlib import Path

def attempt(action):
    try:
        return action()
    except OSError as error:
        return error.errno

path, other = map(Path, sys.argv[1:])
print([attempt(path.read_text), attempt(path.read_text), attempt(other.read_text)])
file = os.open(path, os.O_RDONLY)
new, sync, elsewhere = lambda: path.write_text("new"), lambda: os.fsync(file), lambda: other.write_text("new")
print([attempt(new), attempt(sync), attempt(elsewhere)])
"""


@pytest.mark.parametrize(
    ("mode", "count", "found"),
    [
        ("r", 0, [[errno.ESTALE, errno.ESTALE, "old"], []]),
        ("r", 1, [[errno.ESTALE, "old", "old"], [3, None, 3]]),
        ("w", 0, [["old", "old", "old"], [errno.ESTALE, errno.ESTALE, 3]]),
        ("off", 0, [["old", "old", "old"], [3, None, 3]]),
    ],
)
def test_calls_on_the_files_of_a_trial_fail_and_no_others(tmp_path, mode, count, found):
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    (tmp_path / "checkpoints").mkdir()
    paths = [tmp_path / "checkpoints/a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")
    faults = Faults(tmp_path, "/checkpoints/", mode[0], errno.ESTALE, count)
    if mode != "off":
        faults.on()
    command = [sys.executable, "-c", READ_AND_WRITE, *paths]
    done = subprocess.run(command, env=os.environ | faults.environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [str(line) for line in found if line]
    assert (faults.made() > 0) == (mode != "off")
    assert count in (0, faults.made())
