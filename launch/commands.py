"""Runs the backends' programs: kubectl, gcloud and bash."""

import subprocess
from collections.abc import Sequence
from typing import Any

from launch.errors import LaunchError


def run(command: Sequence[str], text: str | None = None) -> int:
    """Runs `command` with this process's output, `text` as its input. Returns its exit code.

    Raises:
      LaunchError: the program is not installed.
    """
    return _run(command, input=text).returncode


def read(command: Sequence[str]) -> tuple[int, str]:
    """Runs `command`, whose errors go to this process's. Returns its exit code and its output, stripped.

    Raises:
      LaunchError: the program is not installed.
    """
    done = _run(command, stdout=subprocess.PIPE)
    return done.returncode, done.stdout.strip()


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Runs all `commands` in order, even if one fails. Returns the exit code of the first failure, or 0."""
    codes = [run(command) for command in commands]
    return next((code for code in codes if code), 0)


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, text=True, check=False, **options)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed, or not on PATH") from None
