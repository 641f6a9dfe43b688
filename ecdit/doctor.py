"""Checks whether this machine can train: its devices, versions, data, weights, disk, bucket rights and clock.

    python -m ecdit.doctor [--config=configs/emoji.py] [--workdir=runs/emoji]

Each check prints a line that begins with ok, warn or fail and says what to do. The exit code is 1 if any check fails.
"""

import os
import sys

from absl import flags

from ecdit.command_line import config_values, define_config_flag, run_command
from ecdit.experiment import make_experiment
from ecdit.runs.diagnosis import diagnose, is_left_behind
from ecdit.storage import as_path

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "The run's workdir: a directory or gs://BUCKET/PATH.")


def main(argv: list[str]) -> None:
    """Prints the findings as they come."""
    del argv
    experiment = make_experiment(config_values(CONFIG)) if CONFIG.value is not None else None
    workdir = as_path(WORKDIR.value) if WORKDIR.value else None
    failed = False
    for finding in diagnose(experiment, workdir):
        failed |= finding.verdict == "fail"
        print(finding.line(), flush=True)
    if is_left_behind():
        os._exit(1)  # a check that hangs may keep Python from exiting
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
