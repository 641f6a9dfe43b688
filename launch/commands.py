"""Runs the backends' programs: kubectl, gcloud and bash."""

import subprocess
from collections.abc import Sequence

from launch.errors import LaunchError


def run(command: Sequence[str], text: str | None = None) -> int:
    """Runs `command` with this process's output, `text` as its input. Returns its exit code.

    Raises:
      LaunchError: the program is not installed.
    """
    try:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed, or not on PATH") from None


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Runs all `commands` in order, even if one fails. Returns the exit code of the first failure, or 0."""
    codes = [run(command) for command in commands]
    return next((code for code in codes if code), 0)
