"""Fetches the nine emoji sets of the task `emoji_styles` with npm: `python -m ecdit.fetch_emoji_styles`.

    python -m ecdit.fetch_emoji_styles --out=DIRECTORY    # for a task of your own (docs/emoji_styles.md)

It keeps sets that are already complete, and runs no code of the packages.
"""

from pathlib import Path

from absl import flags

from ecdit.command_line import run_command
from ecdit.data.emoji_packages import fetch
from ecdit.data.emoji_styles import DIRECTORY

OUT = flags.DEFINE_string("out", DIRECTORY, "The directory for the sets.")


def main(argv: list[str]) -> None:
    """Fetches the sets and prints their licences."""
    del argv
    fetch(Path(OUT.value))


if __name__ == "__main__":
    run_command(main)
