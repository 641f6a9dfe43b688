"""Tests that a forked command behaves like the command: output, errors, exit code, environment, signals."""

import os
import subprocess
import sys

import pytest

from tests.forking import run_forked
from tests.runs import ROOT, command, run


def test_it_prints_and_ends_as_a_fresh_process_does(cpu_env, tmp_path):
    arguments = command("train", f"--config={ROOT}/configs/emoji.py", f"--workdir={tmp_path}/r", "--config.seeed=3")
    fresh, forked = run(arguments, cpu_env()), run_forked(arguments, cpu_env())
    assert (forked.returncode, forked.stdout, forked.stderr) == (2, "", fresh.stderr)
    assert fresh.returncode == 2


def test_it_has_the_devices_and_the_cache_of_its_environment(cpu_env):
    for devices in (1, 3):
        shown = run_forked([sys.executable, "-m", "tests.devices"], cpu_env(devices))
        assert shown.stdout.split() == [str(devices), cpu_env()["JAX_COMPILATION_CACHE_DIR"]], shown.stderr


@pytest.mark.parametrize("setting", [{"JAX_ENABLE_X64": "1"}, {"JAX_NUMPY_RANK_PROMOTION": "allow"}])
def test_what_only_a_fresh_process_can_see_is_refused(setting, cpu_env):
    refused = run_forked([sys.executable, "-m", "tests.devices"], cpu_env() | setting)
    assert refused.returncode == 1
    assert f"only a fresh process can see {list(setting)}" in refused.stderr


def test_one_that_does_not_end_in_time_is_killed(cpu_env):
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked([sys.executable, "-m", "tests.devices", "60"], cpu_env(), timeout=1)
    assert os.environ.get("OPENBLAS_NUM_THREADS") is None
