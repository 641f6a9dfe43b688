"""Launches a training run on TPUs, after checking that it fits them.

    python -m launch.tpu --config=configs/ec_dit.py:M-64E --accelerator=v5p-256 --workdir=gs://BUCKET/m-64e \
        --backend=jobset --dry-run --out=job.yaml

Checks, prints what it will do, and does it. With --dry-run it writes the manifest (jobset), the script (tpu-vm) or the
command (local) to --out, or prints it, and stops; that needs no network. The launched command is the one that one would
type, and it resumes by itself.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from ecdit.command_line import config_origin, config_values, define_config_flag, run_command
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.files import check_writable, replace_text
from ecdit.topology import find_slice
from launch import backends
from launch.flags import define_place

CONFIG = define_config_flag()
PLACE = define_place()
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Of each slice: v5p-256, or v5p:4x4x8.", required=True)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Write what would be run to --out, and stop.")
OUT = flags.DEFINE_string("out", "", "File for --dry-run; empty: printed.")


def main(argv: list[str]) -> None:
    """Exits with the backend's exit code."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # checks need no device, and are not to take a TPU host's
    experiment, place = make_experiment(config_values(CONFIG)), PLACE()
    job = backends.checked_job(experiment, config_origin(CONFIG), place, find_slice(ACCELERATOR.value))
    text = backends.backend_text(job, place)
    if OUT.value and not DRY_RUN.value:
        raise UserError(f"--out={OUT.value}: is for --dry-run")
    print(backends.description(job, place), flush=True)
    if not DRY_RUN.value:
        sys.exit(backends.start(job, place, text))
    if not OUT.value:
        print(text, end="")
        return
    check_writable(Path(OUT.value))
    replace_text(Path(OUT.value), text)
    print(f"dry run: wrote {OUT.value}")


if __name__ == "__main__":
    run_command(main)
