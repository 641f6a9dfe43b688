"""Trains: `python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji`. The same command again resumes."""

import sys

from absl import flags

from ecdit import runtime
from ecdit.command_line import config_origin, config_values, define_config_flag, run_command
from ecdit.experiment import make_experiment
from ecdit.runs.checked import refuse_other
from ecdit.runs.training_run import train
from ecdit.storage import as_path

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "For checkpoints, metrics and samples: a directory or gs://BUCKET/PATH.", required=True
)
CHECKED = flags.DEFINE_string("checked", "", "What a launcher checked; anything else is refused. Launchers set it.")


def main(argv: list[str]) -> None:
    """Exits with what `loop.train` returns."""
    del argv
    experiment = make_experiment(config_values(CONFIG))
    if CHECKED.value:
        refuse_other(CHECKED.value, experiment)
    workdir = as_path(WORKDIR.value)
    runtime.configure(experiment.runtime, workdir)
    sys.exit(train(experiment, workdir, config_origin(CONFIG)))


if __name__ == "__main__":
    run_command(main)
