"""Trains: `python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji`. The same command also resumes."""

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
    "workdir", None, "Directory or gs://BUCKET/PATH for checkpoints, metrics and samples.", required=True
)
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "If the workdir has lost its checkpoints, start at step 0 and move its metrics and records to before_start_over/. "
    "A run with checkpoints resumes from them even with this flag.",
)
DATA_ORDER = flags.DEFINE_bool(
    "accept_data_order",
    False,
    "Resume from a checkpoint of another version of grain, which may order the data differently.",
)
INIT_DIFFERENCES = flags.DEFINE_bool(
    "accept_init_differences",
    False,
    "Start from the weights of checkpoint.init_from although its model, text encoder or vocabulary differs.",
)
CHECKED = flags.DEFINE_string("checked", "", "Config and code that a launcher checked; others are refused.")


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
