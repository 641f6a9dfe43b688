"""Implements the backend `local`: runs a job on this machine, with a process for every host of its slices.

Each process has as many CPU devices as JAX would list on the host, so this tries a pod job without a pod. Nothing
restarts the job. `launch.status` and `launch.stop` find it by the record that it writes beside the logs, in
runs/local/NAME.
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

from absl import flags

from ecdit.files import replace_text
from launch.errors import LaunchError
from launch.job import Job
from launch.local import launch

FLAGS = flags.FLAGS
LOGS = Path("runs/local")  # has a directory for each job, by name
RECORD = "processes.json"
MAX_PROCESSES = 16
POLL_SECONDS = 0.1


def check(job: Job) -> None:
    """Raises LaunchError for slices with more hosts than MAX_PROCESSES."""
    if job.hosts > MAX_PROCESSES:
        raise LaunchError(
            f"accelerator {job.slice.accelerator}: the local backend starts a process for each of {job.hosts} hosts, "
            f"and at most {MAX_PROCESSES}; try a smaller one, such as v4-16 of two hosts"
        )


def command_line(job: Job) -> str:
    """Returns the command line that does the same as `run_job`."""
    sizes = [f"--processes={job.hosts}", f"--devices={job.slice.devices_per_host}", f"--log_dir={LOGS / job.name}"]
    return f"{shlex.join(['python', '-m', 'launch.local', *sizes, '--', *job.train_flags])}\n"


def run_job(job: Job) -> int:
    """Runs the job to its end. Returns the exit code of `launch.local.launch`."""
    command, log_dir = [sys.executable, "-m", "ecdit.train", *job.train_flags], LOGS / job.name

    def record(pids: list[int]) -> None:
        write_record(log_dir, command, pids)

    return launch(command, job.hosts, job.slice.devices_per_host, log_dir, on_start=record)


def write_record(log_dir: Path, command: Sequence[str], pids: Sequence[int]) -> None:
    """Records the processes with their commands, because another process can get the id of one that has ended."""
    record = {
        "launcher": {"pid": os.getpid(), "command": sys.orig_argv},
        "processes": [{"pid": pid, "command": list(command)} for pid in pids],
    }
    replace_text(log_dir / RECORD, json.dumps(record, indent=2) + "\n")


def status_lines(name: str) -> list[str]:
    """Returns a line for each process of the job, with the last line of its log.

    Raises:
      LaunchError: no job with this name was launched here.
    """
    lines = []
    for i, process in enumerate(_read_record(name)["processes"]):
        log = LOGS / name / f"process_{i}.log"
        printed = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
        lines.append(f"process {i} ({process['pid']}) {'runs' if _runs(process) else 'has ended'}: {''.join(printed)}")
    return lines


def stop_job(name: str) -> bool:
    """Tells all processes to save and end, and waits for that. Returns False if they had ended before.

    Raises:
      LaunchError: no job with this name was launched here.
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
    """Returns whether the process is alive and runs the recorded command."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "stat=,args=", "-p", str(process["pid"])], capture_output=True, text=True, check=False
    )
    state, _, command = listed.stdout.strip().partition(" ")
    # Only letters and digits are compared, because ps replaces some other characters.
    plain, noted = (re.sub(r"[^A-Za-z0-9]", "", line) for line in (command, "".join(process["command"])))
    return bool(state) and not state.startswith("Z") and plain == noted


class LocalProcesses:
    """The backend."""

    name = "local"
    file_ending = "sh"
    has_large_hosts = False
    runs_here = True

    def define_location_flags(self) -> None:
        """Defines nothing, because jobs are found in LOGS."""

    def define_launch_flags(self) -> None:
        """Defines nothing."""

    def check(self, job: Job) -> None:
        """Raises LaunchError for slices with too many hosts, or for --env or --secret-env."""
        for flag in ("env", "secret-env"):
            if FLAGS[flag].value:
                raise LaunchError(f"--{flag}: is for pods; processes here have the variables of this shell")
        check(job)

    def text(self, job: Job) -> str:
        """Returns the command."""
        return command_line(job)

    def summary(self, job: Job) -> str:
        """Returns the number of processes and the directory of their logs."""
        return f"{job.hosts} processes here, logs in {LOGS / job.name}"

    def needs(self, job: Job) -> list[str]:
        """Returns nothing: processes here read the same folders as the launcher."""
        return []

    def start(self, job: Job) -> int:
        """Runs the job to its end. Returns its exit code."""
        return run_job(job)

    def status(self, name: str, slices: int) -> int:
        """Prints a line for each process."""
        print("\n".join(status_lines(name)))
        return 0

    def stop(self, name: str, slices: int) -> int:
        """Lets the processes save, and ends them."""
        print(f"{name} {'has stopped' if stop_job(name) else 'had ended already'}")
        return 0
