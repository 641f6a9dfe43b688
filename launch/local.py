"""Runs one training run as several processes on this machine, on CPU devices, joined by jax.distributed.

    python -m launch.local --processes=2 --devices=2 -- --config=configs/emoji.py --workdir=runs/emoji

Everything after `--` goes to `python -m ecdit.train`. ECDIT_COORDINATOR, ECDIT_NUM_PROCESSES and ECDIT_PROCESS_ID tell
each process whom to join. Each writes a log file; the log of process 0, which reports, is also printed here. The
processes end together: when one fails, the others are terminated. SIGINT and SIGTERM are forwarded to all, so that each
can save. The exit code is that of the first process that failed, or 128 + n if signal n killed it.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
POLL_SECONDS = 0.05
GRACE_SECONDS = 30.0  # time from the first failure until the others are killed, in which they can save
TAIL_LINES = 20  # lines of the failing process's log on stderr


def launch(
    command: Sequence[str],
    processes: int,
    devices: int,
    log_dir: str | Path,
    grace_seconds: float = GRACE_SECONDS,
    on_start: Callable[[list[int]], None] = lambda pids: None,
) -> int:
    """Runs `command` as `processes` processes with `devices` CPU devices each until all end. Main thread only.

    The output of process i goes to `process_i.log` in `log_dir`, which is made if it is missing; older logs are
    overwritten. The output of process 0 is also printed here. `on_start` gets the processes' ids when all have started.

    Returns:
      0 if all succeeded, else the exit code of the first failure (of the lowest id if several failed at once).
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = [log_dir / f"process_{i}.log" for i in range(processes)]
    coordinator = f"127.0.0.1:{_free_port()}"
    children: list[subprocess.Popen] = []
    with collect_signals() as pending:
        try:
            for i, log in enumerate(logs):
                children.append(_start(command, process_environment(coordinator, processes, i, devices), log))
            on_start([child.pid for child in children])
            with logs[0].open("rb") as shown:
                failed = _wait(children, pending, grace_seconds, lambda: _show(shown))
        finally:
            for child in children:
                _kill_group(child)
    if failed is None:
        return 0
    code = _exit_code(children[failed])
    print(f"process {failed} failed with exit code {code}; the end of {logs[failed]}:", file=sys.stderr)
    print("\n".join(logs[failed].read_text(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)
    return code


def cpu_environment(devices: int) -> dict[str, str]:
    """Returns this process's environment, changed so that JAX sees `devices` CPU devices and no others."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT_FLAG)]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*kept, f"{DEVICE_COUNT_FLAG}={devices}"])}


def process_environment(coordinator: str, processes: int, process_id: int, devices: int) -> dict[str, str]:
    """Returns the environment of process `process_id`, which `ecdit.runtime` reads."""
    return {
        **cpu_environment(devices),
        "ECDIT_COORDINATOR": coordinator,
        "ECDIT_NUM_PROCESSES": str(processes),
        "ECDIT_PROCESS_ID": str(process_id),
        "PYTHONUNBUFFERED": "1",  # so that the log can be followed, and its end survives a kill
    }


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Starts a process in its own session, so that a terminal's Ctrl-C reaches it only through this process."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _show(log: BinaryIO) -> None:
    """Prints the text added to a log since the last call. A closed output is no error."""
    if added := log.read():
        with contextlib.suppress(BrokenPipeError):
            print(added.decode(errors="replace"), end="", flush=True)


def _wait(
    children: Sequence[subprocess.Popen], pending: list[int], grace_seconds: float, show: Callable[[], None]
) -> int | None:
    """Waits until all have ended, forwards `pending` signals, and calls `show` in every round.

    Returns the index of the first process that failed, or None.
    """
    failed, deadline, stopping = None, float("inf"), False
    while True:
        codes = [child.poll() for child in children]
        show()
        while pending:
            number, stopping = pending.pop(0), True
            _send(children, number)
        if failed is None:
            failed = next((i for i, code in enumerate(codes) if code), None)
            if failed is not None:
                deadline = time.monotonic() + grace_seconds
                if not stopping:  # a second signal could interrupt their save
                    _send(children, signal.SIGTERM)
        if all(code is not None for code in codes):
            return failed
        if time.monotonic() > deadline:
            _send(children, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _send(children: Sequence[subprocess.Popen], number: int) -> None:
    """Signals the running processes but not their workers, because each process ends its own workers."""
    for child in children:
        child.send_signal(number)  # does nothing if it has ended


def _kill_group(child: subprocess.Popen) -> None:
    """Kills a process if it still runs, and any workers that it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _exit_code(child: subprocess.Popen) -> int:
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Appends SIGINT and SIGTERM to the yielded list, so that a process that is starting cannot miss one."""
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: pending.append(number)) for number in numbers]
    try:
        yield pending
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _free_port() -> int:
    """Returns a port that is free now. Another program could still take it before the coordinator does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and launches `python -m ecdit.train` with the flags that follow `--`."""
    parser = argparse.ArgumentParser(prog="launch.local", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=_positive, default=2, help="how many processes (default 2)")
    parser.add_argument("--devices", type=_positive, default=1, help="CPU devices of each process (default 1)")
    parser.add_argument("--log_dir", default="runs/local", help="where process_i.log go (default runs/local)")
    parser.add_argument("train_flags", nargs="*", help="flags of ecdit.train, after --")
    options = parser.parse_args(argv)
    sizes = f"{options.processes} processes of {options.devices} devices"
    print(f"{sizes}; logs: {options.log_dir}/process_*.log, of which that of process 0 follows", flush=True)
    command = [sys.executable, "-m", "ecdit.train", *options.train_flags]
    return launch(command, options.processes, options.devices, options.log_dir)


if __name__ == "__main__":
    sys.exit(main())
