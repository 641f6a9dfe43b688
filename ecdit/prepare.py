"""Prepares a config's data: `python -m ecdit.prepare --config=configs/emoji.py`.

    python -m ecdit.prepare --config=... --limit=1000      # a first look: what would be left out, and ten images
    python -m ecdit.prepare --config=... --verify          # reads all of it again and compares checksums
    python -m ecdit.prepare --config=... --vocabulary=F.model    # the records and the tokenizer, which is copied there
    python -m ecdit.prepare --config=... --same_source     # keeps records although module or source have changed
    python -m ecdit.prepare --config=... --what=latents    # what the config's public autoencoder makes of each image
    python -m ecdit.prepare --config=... --what=text       # what its public text encoder makes of each caption
    python -m ecdit.prepare --config=... --share=3/16      # one of 16 processes, on as many hosts: docs/data.md

It can be killed at any time. The same command then continues and ends with the same bytes. Where the data is prepared,
it only compares its source with what was read.
"""

import os
import shutil
from pathlib import Path

import jax
from absl import flags

from ecdit.command_line import config_values, define_config_flag, run_command
from ecdit.config import require
from ecdit.data import DataError
from ecdit.data.columns import column_directory
from ecdit.data.first_look import first_look
from ecdit.data.latents import LatentsColumn
from ecdit.data.manifest import task_directory
from ecdit.data.preparation import check_sources, prepare_records, prepare_share, read_composition
from ecdit.data.prepared import prepare, prepare_captions, prepare_column
from ecdit.data.shares import Share, parse_share
from ecdit.data.text_states import TextColumn
from ecdit.data.tokens import make_tokenizer, tokenizer_path
from ecdit.data.verification import verify
from ecdit.experiment import Experiment, check_tokenizers, make_experiment
from ecdit.sampling.grids import save_grid

CONFIG = define_config_flag()
CORES = len(os.sched_getaffinity(0))
WORKERS = flags.DEFINE_integer("workers", CORES, "Processes that read, decode and write.", lower_bound=1)
LIMIT = flags.DEFINE_integer(
    "limit", None, "Prepare only this many pairs in memory, and write only an image.", lower_bound=1
)
VERIFY = flags.DEFINE_bool("verify", False, "Read all prepared data again and compare its checksums.")
WHAT = flags.DEFINE_enum(
    "what",
    "captions",
    ["captions", "latents", "text"],
    "captions: records and tokens; latents, text: those and the column data.latents or data.text_states.",
)
VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Prepare only the records and the tokenizer, and copy the tokenizer to this .model file."
)
SAME_SOURCE = flags.DEFINE_bool(
    "same_source", False, "Keep finished records although data.module or the times of their source's files changed."
)
SHARE = flags.DEFINE_string(
    "share",
    None,
    "I/N: prepare the parts whose index modulo N is I, of the records or of the column of --what, and join nothing.",
)


def main(argv: list[str]) -> None:
    """Prepares the data and prints where it is."""
    del argv
    share = parse_share(SHARE.value) if SHARE.value is not None else None
    if share and (LIMIT.value or VERIFY.value or VOCABULARY.value):
        raise DataError(f"--share={share}: --limit, --verify and --vocabulary are not divided; give them without it")
    experiment = make_experiment(config_values(CONFIG))
    check_tokenizers(experiment)
    config = experiment.data
    if LIMIT.value:
        first_look(config, LIMIT.value, save_grid)
    elif VERIFY.value:
        verify(config)
    elif VOCABULARY.value:
        allowed = 'must be a .model file or "" for --vocabulary'
        require(not config.tokenizer_folders, "data.tokenizer", config.tokenizer, allowed)
        check_sources(config, print, SAME_SOURCE.value)
        trained = make_tokenizer(config, prepare_records(config, WORKERS.value, print, SAME_SOURCE.value))
        shutil.copyfile(trained, Path(VOCABULARY.value))
        print(f"trained {VOCABULARY.value}")
    elif share:
        fill_share(experiment, WHAT.value, share)
    else:
        fill_columns(experiment, WHAT.value)


def fill_share(experiment: Experiment, what: str, share: Share) -> None:
    """Prepares a share of the records, or of the column that `--what` asks for once records and tokens are there."""
    config = experiment.data
    column = _column(experiment, what)
    if column is None:
        prepare_share(config, share, WORKERS.value, print)
        return
    read_composition(config)  # raises unless the records are joined
    tokenizer = tokenizer_path(config)
    if not tokenizer.exists():
        raise DataError(f"there is no tokenizer {tokenizer}: first prepare records and tokens, without --share")
    prepare_column(config, column, _workers(), print, share=share)


def fill_columns(experiment: Experiment, what: str) -> None:
    """Prepares records and tokens, and what `--what` asks for; says which columns are left."""
    config, column = experiment.data, _column(experiment, what)
    if column is None:
        check_sources(config, print, SAME_SOURCE.value)
    prepare_captions(config, WORKERS.value, print, SAME_SOURCE.value)
    if column is not None:
        constants = column.constants if isinstance(column, TextColumn) else dict
        prepare_column(config, column, _workers(), print, constants)
    made = experiment.autoencoder == "vae" and experiment.system.reads_latents
    wanted = {"text": config.text_states, "latents": config.latents if made else ""}
    names = [component.task for component in read_composition(config).components if not component.generated]
    folders = [task_directory(config, name) for name in names]
    left = [
        kind
        for kind, label in wanted.items()
        if label and not all(column_directory(folder, f"{kind}-{label}").exists() for folder in folders)
    ]
    if left:
        flags = " and ".join(f"--what={kind}" for kind in left)
        print(f"records and tokens are in {task_directory(config)}; {flags} prepares the {' and '.join(left)}")
    else:
        prepare(config, WORKERS.value)
        print(f"the data is in {task_directory(config)}")


def _column(experiment: Experiment, what: str) -> LatentsColumn | TextColumn | None:
    """Returns what makes the column that `--what` asks for, or None for records and tokens."""
    if what == "latents":
        return experiment.latents_column()
    return experiment.text_column() if what == "text" else None


def _workers() -> int:
    """Returns how many processes compute a column: several cannot share an accelerator, and one uses all its chips."""
    return WORKERS.value if jax.default_backend() == "cpu" else 1


if __name__ == "__main__":
    run_command(main)
