"""A disk that is full when a run saves, as its user meets it: real processes on a file system of a few megabytes."""

import contextlib
import subprocess

import pytest

from ecdit.config import UserError
from ecdit.training.reporting import Reporter
from launch.local import launch
from tests.runs import run, tiny, train_command

CHANGES = {"train__num_steps": 60, "checkpoint__every": 4, "checkpoint__keep": 10, "optimizer__warmup_steps": 4}


@pytest.fixture
def disk(tmp_path):
    """Room for less than one checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_the_user_reads_one_line_and_not_the_tracebacks_of_threads(disk, emoji_data, cpu_env):
    result = run(train_command(disk / "run", emoji_data, **CHANGES), cpu_env())
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: saving to {disk}/run/checkpoints failed")
    assert result.stderr.count("Traceback") == 0, f"{len(result.stderr.splitlines())} lines"


def test_metrics_that_cannot_be_written_are_named(disk):
    """While a save fills the disk, a line of the metrics is what finds it full."""
    with (disk / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
        while fill.write(bytes(1 << 12)):
            pass
    config = tiny(**CHANGES).train
    reporter = Reporter(disk, 0, config, ["w"])
    with pytest.raises(UserError, match=f"{disk}/metrics.jsonl.*No space left"):
        reporter.report(1, {"loss": 0.5, "grad_norm": 1.0, "bad_in_row": 0, "bad_leaf": -1})
    with contextlib.suppress(UserError):
        reporter.close()


@pytest.mark.slow
def test_two_processes_end_soon_and_say_why(disk, emoji_data, compilation_cache, tmp_path, monkeypatch):
    """One process's write fails; the other waits for it, but not for twenty minutes."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    command = train_command(disk / "run", emoji_data, **CHANGES)
    code = launch(["timeout", "--signal=KILL", "240", *command], processes=2, devices=1, log_dir=tmp_path / "logs")
    logs = [(tmp_path / "logs" / f"process_{i}.log").read_text() for i in range(2)]
    assert code == 2, logs[0][-1000:] + logs[1][-1000:]
    assert any(f"error: saving to {disk}/run/checkpoints failed: " in log for log in logs)
    assert any("No space left on device" in log for log in logs)
