"""Runs a job here: a process for every host of its slices, of as many CPU devices as JAX would list there.

How to try a pod job at home. Nothing restarts it. `launch.status` and `launch.stop` find it by the record that it
writes beside the logs, in runs/local/NAME.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import local
from launch.job import Job, LaunchError

LOGS = Path("runs/local")  # of jobs, each in a directory of its name
RECORD = "processes.json"
MAX_PROCESSES = 16
POLL_SECONDS = 0.1


def check(job: Job) -> None:
    """Raises LaunchError for slices of more hosts than processes are started here."""
    if job.hosts > MAX_PROCESSES:
        raise LaunchError(
            f"accelerator {job.slice.accelerator}: the local backend starts a process for each of {job.hosts} hosts, "
            f"and at most {MAX_PROCESSES}; try a smaller one, such as v4-16 of two hosts"
        )


def arguments(job: Job) -> list[str]:
    """Of the Python that does what `run` does."""
    sizes = [f"--processes={job.hosts}", f"--devices={job.slice.devices_per_host}", f"--log_dir={LOGS / job.name}"]
    return ["-m", "launch.local", *sizes, "--", *job.train_flags]


def command_line(job: Job) -> str:
    """What `run` does, as one would type it."""
    return f"python {shlex.join(arguments(job))}\n"


def run(job: Job) -> int:
    """Runs the job to its end; see `local.launch` for what it returns."""
    command, log_dir = [sys.executable, "-m", "ecdit.train", *job.train_flags], LOGS / job.name

    def record(pids: list[int]) -> None:
        write_record(log_dir, command, pids)

    return local.launch(command, job.hosts, job.slice.devices_per_host, log_dir, on_start=record)


def write_record(log_dir: Path, command: Sequence[str], pids: Sequence[int]) -> None:
    """Notes who runs, and what: once a process has ended, another one can get its number."""
    record = {
        "launcher": {"pid": os.getpid(), "command": sys.orig_argv},
        "processes": [{"pid": pid, "command": list(command)} for pid in pids],
    }
    (log_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def status(name: str) -> list[str]:
    """A line for each process of the job, with the end of its log.

    Raises:
      LaunchError: no such job was launched here.
    """
    lines = []
    for i, process in enumerate(_read_record(name)["processes"]):
        log = LOGS / name / f"process_{i}.log"
        printed = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
        lines.append(f"process {i} ({process['pid']}) {'runs' if _runs(process) else 'has ended'}: {''.join(printed)}")
    return lines


def stop(name: str) -> bool:
    """Asks all processes to save and end, and waits until they have. Returns whether there was something to stop.

    Raises:
      LaunchError: no such job was launched here.
    """
    launcher = _read_record(name)["launcher"]
    if not _runs(launcher):
        return False
    os.kill(launcher["pid"], signal.SIGTERM)
    while _runs(launcher):
        time.sleep(POLL_SECONDS)
    return True


def _read_record(name: str) -> dict[str, Any]:
    try:
        return json.loads((LOGS / name / RECORD).read_text())
    except FileNotFoundError:
        raise LaunchError(f"{LOGS / name} has no {RECORD}: no such job was launched from this directory") from None


def _runs(process: dict[str, Any]) -> bool:
    """Whether the process is alive, and still the one that was noted."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "stat=,args=", "-p", str(process["pid"])], capture_output=True, text=True, check=False
    )
    state, _, command = listed.stdout.strip().partition(" ")
    # ps shows some characters as others.
    plain, noted = (re.sub(r"[^A-Za-z0-9]", "", line) for line in (command, "".join(process["command"])))
    return bool(state) and not state.startswith("Z") and plain == noted
