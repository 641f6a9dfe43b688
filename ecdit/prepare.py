"""Prepares a config's data: `python -m ecdit.prepare --config=configs/emoji.py`. Does nothing if it is prepared.

    python -m ecdit.prepare --config=... --limit=1000            # a first look: rejections, speed, and ten images
    python -m ecdit.prepare --config=... --verify                # reads everything again and compares checksums
    python -m ecdit.prepare --config=... --vocabulary=F.model    # prepares records and tokenizer, and copies the latter

It can be killed at any time. The same command then continues and ends with the same bytes.
"""

import os
import shutil
from pathlib import Path

from absl import flags

from ecdit.command_line import config_values, define_config_flag, run_command
from ecdit.data.first_look import first_look
from ecdit.data.manifest import task_directory
from ecdit.data.preparation import prepare_records
from ecdit.data.prepared import prepare
from ecdit.data.tokens import make_tokenizer
from ecdit.data.verification import verify
from ecdit.experiment import make_experiment
from ecdit.sampling.grids import save_grid

CONFIG = define_config_flag()
CORES = len(os.sched_getaffinity(0))
WORKERS = flags.DEFINE_integer("workers", CORES, "Processes that read, decode and write.", lower_bound=1)
LIMIT = flags.DEFINE_integer(
    "limit", None, "Prepare only this many pairs in memory, and write only an image.", lower_bound=1
)
VERIFY = flags.DEFINE_bool("verify", False, "Read all prepared data again and compare its checksums.")
VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Prepare only the records and the tokenizer, and copy the tokenizer to this .model file."
)


def main(argv: list[str]) -> None:
    """Prepares the data and prints where it is."""
    del argv
    config = make_experiment(config_values(CONFIG)).data
    if LIMIT.value:
        first_look(config, LIMIT.value, save_grid)
    elif VERIFY.value:
        verify(config)
    elif VOCABULARY.value:
        trained = make_tokenizer(config, prepare_records(config, WORKERS.value, print))
        shutil.copyfile(trained, Path(VOCABULARY.value))
        print(f"trained {VOCABULARY.value}")
    else:
        prepare(config, WORKERS.value)
        print(f"the data is in {task_directory(config)}")


if __name__ == "__main__":
    run_command(main)
