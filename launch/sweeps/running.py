"""Runs the points of a sweep on this machine, some at a time. Skips points that are done.

A point that fails does not stop the others. SIGTERM and SIGINT let every running point save and end. If this process is
killed, the kernel sends SIGTERM to its points (`launch.tied`), and the next start waits until they have ended, because
they hold a lock in the sweep's directory.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import orbax.checkpoint as ocp

from ecdit.checkpoints.restore import checkpoint_directory
from ecdit.errors import UserError
from ecdit.exit_codes import PREEMPTED
from ecdit.files import check_writable
from ecdit.runs.provenance import recorded_files
from ecdit.runs.trained_run import CONFIG_FILE
from ecdit.storage import reading
from launch.local import collect_signals
from launch.sweeps.hyper import SweepError
from launch.sweeps.points import SweepPoint

LOGS = "logs"  # directory of NAME.log, to which every start of a point appends
SWEEP_LOCK, POINTS_LOCK = ".sweep.lock", ".points.lock"  # the sweep holds both, its points' processes the second
POLL_SECONDS = 0.1


@dataclasses.dataclass
class Progress:
    """The names of a sweep's points by their state."""

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # name: exit code and last line
    stopped: list[str] = dataclasses.field(default_factory=list)  # they saved before they ended
    waiting: list[str] = dataclasses.field(default_factory=list)  # they have not started

    def exit_code(self) -> int:
        """Returns 0 if all are done, 1 if one failed, else PREEMPTED, after which the same command continues."""
        if self.failed:
            return 1
        return PREEMPTED if self.stopped or self.waiting else 0


def newest_step(workdir: Path) -> int:
    """Returns the step of a run's newest complete checkpoint, or 0 without one."""
    return max(ocp.utils.checkpoint_steps(checkpoint_directory(workdir)), default=0)


def is_done(point: SweepPoint, workdir: Path) -> bool:
    """Returns whether the run in `workdir` has done and saved all its steps.

    Raises:
      UserError: the run has another config (a SweepError), or its bucket cannot be read.
    """
    config, differences = workdir / CONFIG_FILE, []
    with reading(workdir):
        step = newest_step(workdir)
        done = step >= point.experiment.train.num_steps
        if step and config.exists():
            differences = point.differences(json.loads(config.read_text()), step, inputs=done)
            try:
                differences += point.file_differences(recorded_files(workdir)) if done else []
            except UserError as error:
                raise SweepError(f"point {point.name}: {error}") from None
    if differences:
        changed = "\n  ".join(differences)
        raise SweepError(f"point {point.name}: {workdir} holds another run:\n  {changed}\nTake another --workdir.")
    return done


def run_points(
    points: Sequence[SweepPoint], commands: Mapping[str, Sequence[str]], directory: Path, parallel: int
) -> int:
    """Runs the points' `commands`, `parallel` at a time. Main thread only.

    Args:
      points: the points of the sweep.
      commands: commands by the points' names; each trains in `directory`/NAME.
      directory: the sweep's directory.
      parallel: number of points that run at a time.

    Returns:
      The exit code (see `Progress.exit_code`).

    Raises:
      UserError: a workdir has another run, or another sweep runs in `directory`.
    """
    check_writable(directory)
    (directory / LOGS).mkdir(parents=True, exist_ok=True)
    with _lock(directory / SWEEP_LOCK) as held, collect_signals() as pending:
        if held is None:
            raise UserError(f"--workdir={directory}: another sweep runs in it")
        with _lock(directory / POINTS_LOCK, pending) as points_lock:
            progress = Progress()
            if points_lock is not None:
                _run(points, commands, directory, parallel, points_lock, pending, progress)
            else:
                progress.waiting = [point.name for point in points if not is_done(point, directory / point.name)]
    _report(progress, [point.name for point in points])
    return progress.exit_code()


def _run(
    points: Sequence[SweepPoint],
    commands: Mapping[str, Sequence[str]],
    directory: Path,
    parallel: int,
    points_lock: IO[str],
    pending: list[int],
    progress: Progress,
) -> None:
    """Runs the points that are not done until all have ended or, after a signal, until the running ones have ended."""
    waiting = progress.waiting
    for point in points:
        done = is_done(point, directory / point.name)
        (progress.done if done else waiting).append(point.name)
    if progress.done:
        print(f"done already: {', '.join(progress.done)}", flush=True)
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    stopping = False
    try:
        while running or (waiting and not stopping):
            if pending:
                pending.clear()
                if not stopping:  # a second signal could interrupt a save
                    print(f"stopping: {', '.join(running)} may save", flush=True)
                    _terminate(running)
                stopping = True
            while waiting and len(running) < parallel and not stopping:
                name = waiting.pop(0)
                running[name] = (_start(commands[name], _log(directory, name), points_lock), time.monotonic())
                print(f"{name}: started, {_log(directory, name)}", flush=True)
            for name in [name for name, (child, _) in running.items() if child.poll() is not None]:
                child, begin = running.pop(name)
                _settle(name, child.returncode, time.monotonic() - begin, directory, stopping, progress)
            time.sleep(POLL_SECONDS)
    finally:  # no point keeps running after an error here
        _terminate(running)
        for child, _ in running.values():
            child.wait()


def _settle(name: str, code: int, seconds: float, directory: Path, stopping: bool, progress: Progress) -> None:
    """Records the result of a point."""
    code = code if code >= 0 else 128 - code
    if code == 0:
        progress.done.append(name)
        print(f"{name}: done in {seconds:.0f} s", flush=True)
    # SIGTERM kills a point that has not set its handler yet. Such a point has nothing to save.
    elif code == PREEMPTED or (stopping and code == 128 + signal.SIGTERM):
        progress.stopped.append(name)
        print(f"{name}: stopped", flush=True)
    else:
        lines = _log(directory, name).read_text(errors="replace").splitlines()
        progress.failed[name] = f"exit code {code}: {lines[-1] if lines else ''}"
        print(f"{name}: failed, {progress.failed[name]}", flush=True)


def _report(progress: Progress, names: Sequence[str]) -> None:
    """Prints the result in the sweep's order, because points end in any order."""
    left = [name for name in names if name in progress.stopped or name in progress.waiting]
    print(f"{len(progress.done)} of {len(names)} points are done", flush=True)
    if left:
        print(f"left: {', '.join(left)}; the same command continues", flush=True)
    for name in names:
        if name in progress.failed:
            print(f"failed: {name}: {progress.failed[name]}", flush=True)


def _log(directory: Path, name: str) -> Path:
    return directory / LOGS / f"{name}.log"


def _start(command: Sequence[str], log: Path, points_lock: IO[str]) -> subprocess.Popen:
    """Starts a point in its own session, so that a terminal's Ctrl-C reaches it only through this process."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "launch.tied", str(os.getpid()), *command],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[points_lock.fileno()],  # the lock is released when the last process with it ends
        )


def _terminate(running: Mapping[str, tuple[subprocess.Popen, float]]) -> None:
    for child, _ in running.values():
        child.terminate()


@contextlib.contextmanager
def _lock(path: Path, pending: list[int] | None = None) -> Iterator[IO[str] | None]:
    """Yields the locked file, or None if another process has the lock.

    With `pending` it waits for the lock, and yields None if a signal comes before.
    """
    with path.open("a") as file:
        told = False
        while not _try_lock(file):
            if pending is None or pending:
                yield None
                return
            if not told:
                print(f"waiting for points of an earlier start to end: they hold {path}", flush=True)
                told = True
            time.sleep(POLL_SECONDS)
        yield file


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
