"""Tests the first trials of a campaign and its table. `python -m tests.faults.campaign` runs all of it."""

import json
import subprocess
import sys

import pytest

from tests.faults.campaign import PATTERN, table
from tests.faults.faults import KINDS
from tests.runs import run


@pytest.mark.slow
def test_the_first_trials_pass_and_none_is_done_twice(tmp_path, emoji_data, compilation_cache, cpu_env):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    out = tmp_path / "campaign.jsonl"
    options = [f"--out={out}", f"--data={emoji_data}", f"--cache={compilation_cache}"]
    command = [sys.executable, "-m", "tests.faults.campaign", "--trials=4", *options]
    done = run(command, cpu_env(), timeout=900)
    logs = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [log["kind"] for log in logs] == list(PATTERN[:4])
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
