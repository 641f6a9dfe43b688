"""Tests that every second of a run is accounted for, across kills and restarts."""

import signal
import sys
import time

import pytest

from ecdit.runs.goodput_table import table
from ecdit.runs.ledger import Record, account, life, read_records
from tests.forking import run_forked
from tests.runs import command, run

# A start of the toy: it sleeps while it waits for batches 6 and 8, and is killed in batch 7 if it is told to.
START = """
import os, signal, sys, time
from pathlib import Path
from ecdit.runs import ledger
from tests.checkpoints.toy import Toy

ledger.WRITE_SECONDS = {False: 0.1, True: 60.0}
toy = Toy(Path(sys.argv[1]))
toy.at[6] = lambda: time.sleep(1.5)
toy.at[8] = lambda: time.sleep(1.0)
if sys.argv[2] == "killed":
    toy.at[7] = lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL))
toy.train(num_steps=9, every=4)
print("ENDED", time.time(), flush=True)
"""


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory, cpu_env_of_module):
    """The workdir of a run that was killed in step 7 and went on from step 4, after two seconds; and its life."""
    workdir = tmp_path_factory.mktemp("goodput") / "run"
    begin = time.time()
    done = run([sys.executable, "-c", START, str(workdir), "killed"], cpu_env_of_module)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ended = time.time()
    time.sleep(2.0)
    done = run([sys.executable, "-c", START, str(workdir), ""], cpu_env_of_module)
    assert done.returncode == 0, done.stderr
    return workdir, float(done.stdout.split("ENDED")[1]) - begin, ended


@pytest.fixture(scope="module")
def cpu_env_of_module():
    from launch.local import cpu_environment

    return cpu_environment(8)


def test_every_second_is_booked_by_another_clock(killed_once):
    workdir, seconds, _ = killed_once
    records = read_records(workdir)
    assert life(records) == pytest.approx(seconds, rel=0.01)
    assert sum(account(records).values()) == pytest.approx(seconds, rel=0.01)


def test_sleeps_are_booked_as_what_they_were(killed_once):
    """The first start did steps 5 and 6 for nothing, with 1.5 s of waiting; the second one waited 1.5 s and 1 s."""
    workdir, _, ended = killed_once
    records = read_records(workdir)
    seconds = account(records)
    assert [record.first for record in records] == [0, 4]
    assert 2.5 <= seconds["data"] < 3.2
    assert 1.5 <= seconds["lost"] < 3.0
    assert 2.0 <= seconds["down"] < 3.0
    assert records[0].seen == pytest.approx(ended, abs=0.7)  # the last write before the kill
    assert seconds["start"] > 1.0  # two imports of JAX


def test_the_command_prints_where_the_time_went(killed_once, cpu_env):
    workdir, seconds, _ = killed_once
    done = run_forked(command("goodput", f"--workdir={workdir}"), cpu_env())
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert rows["all"] == pytest.approx(seconds, rel=0.01)
    assert abs(rows["unknown"]) < 0.01 * seconds
    assert sum(rows.values()) == pytest.approx(2 * rows["all"], abs=1.0)


def test_a_run_without_records_is_refused(tmp_path, cpu_env):
    done = run_forked(command("goodput", f"--workdir={tmp_path}"), cpu_env())
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path} has no record of a start\n")


FIRST = Record(
    began=1000.0,
    seen=1100.0,
    first=0,
    seconds={"start": 10.0, "compile": 20.0, "step": 50.0, "data": 8.0, "save": 12.0},
    marks={"4": {"start": 10.0, "compile": 20.0, "step": 22.0, "data": 3.0}, "8": {"step": 40.0, "data": 6.0}},
)
SECOND = Record(began=1130.0, seen=1160.0, first=8, seconds={"start": 10.0, "step": 20.0}, marks={})
THIRD = Record(began=1160.5, seen=1170.5, first=4, seconds={"start": 4.0, "step": 6.0}, marks={})


def test_accounts_by_hand():
    """After step 8 the first start spent 10 s on steps and 2 s on data."""
    assert account([FIRST]) == {**FIRST.seconds, "lost": 0.0, "down": 0.0}
    kept = {"start": 20.0, "compile": 20.0, "step": 60.0, "data": 6.0, "save": 12.0}
    assert account([FIRST, SECOND]) == {**kept, "lost": 12.0, "down": 30.0}
    assert sum(account([FIRST, SECOND]).values()) == life([FIRST, SECOND]) == 160.0


def test_a_start_that_goes_on_from_before_an_earlier_one_loses_both():
    """Step 8 was damaged: the third start goes on from step 4, so that all of the second one's steps are lost."""
    seconds = account([FIRST, SECOND, THIRD])
    assert seconds == {
        **{"start": 24.0, "compile": 20.0, "step": 28.0, "data": 3.0, "save": 12.0},
        **{"lost": 28.0 + 5.0 + 20.0, "down": 30.5},
    }
    assert sum(seconds.values()) == life([FIRST, SECOND, THIRD])


def test_the_table_shows_shares():
    lines = list(table([FIRST, SECOND]))
    assert "step            60.0 s   37.5%  steps that stayed" in lines
    assert "lost            12.0 s    7.5%  steps and batches that a later start did again" in lines
    assert "unknown          0.0 s    0.0%  not accounted for" in lines
