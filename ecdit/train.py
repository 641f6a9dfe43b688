"""Trains: `python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji`. The same command again resumes."""

import contextlib
import sys

from absl import flags

from ecdit import runtime
from ecdit.command_line import config_origin, config_values, define_config_flag, run_command
from ecdit.experiment import make_experiment
from ecdit.runs.activity import Activity
from ecdit.runs.checked import refuse_other
from ecdit.runs.training_run import Accepted, train
from ecdit.storage import as_path

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "For checkpoints, metrics and samples: a directory or gs://BUCKET/PATH.", required=True
)
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "Where the workdir has lost its checkpoints, begin at step 0 and move its metrics and records to "
    "before_start_over/. A run that has checkpoints goes on from them, with this flag too.",
)
DATA_ORDER = flags.DEFINE_bool(
    "accept_data_order",
    False,
    "Go on from a checkpoint though another version of grain has written it, which may order the data in another way.",
)
INIT_DIFFERENCES = flags.DEFINE_bool(
    "accept_init_differences",
    False,
    "Start from the weights of checkpoint.init_from though its model, text encoder or vocabulary differs.",
)
CHECKED = flags.DEFINE_string("checked", "", "What a launcher checked; anything else is refused. Launchers set it.")


def main(argv: list[str]) -> None:
    """Exits with the code that `training_run.train` returns."""
    del argv
    experiment = make_experiment(config_values(CONFIG))
    if CHECKED.value:
        refuse_other(CHECKED.value, experiment)
    workdir = as_path(WORKDIR.value)
    accepted = Accepted(START_OVER.value, DATA_ORDER.value, INIT_DIFFERENCES.value)
    with contextlib.closing(Activity(experiment.train)) as activity:
        runtime.configure(experiment.runtime, workdir)
        code = train(experiment, workdir, config_origin(CONFIG), accepted, activity)
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
