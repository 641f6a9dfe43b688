"""A process that hangs, for real."""

import subprocess
import sys
import time

import pytest

from ecdit.exit_codes import HUNG
from ecdit.training.watchdog import PATIENCE

HANG = """
import sys, time
from ecdit.training.watchdog import Watchdog
def stuck_here():
    time.sleep(60)
watchdog = Watchdog(float(sys.argv[1]))
watchdog.enter("waiting for the data of step 6")
watchdog.enter("in step 7", slow=sys.argv[2] == "slow")
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


@pytest.mark.parametrize(("how", "factor"), [("", 1), ("slow", PATIENCE)])
def test_a_phase_that_takes_too_long_ends_the_process_by_name(how, factor):
    code, said, seconds = hang(0.5, how)
    assert code == HUNG
    assert f"hung: in step 7 for {0.5 * factor:g} s (config.train.watchdog_seconds = 0.5)" in said
    assert "stuck_here" in said
    assert 0.5 * factor < seconds < 0.5 * factor + 15


def test_a_closed_watchdog_ends_nothing():
    assert hang(0.5, "close")[:2] == (5, "")
