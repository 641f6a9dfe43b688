"""Launches a training run on TPUs after checking that it fits them.

    python -m launch.tpu --config=configs/ec_dit.py:M-64E --config.data.placeholder_ok=True \
        --config.text.frozen_random_ok=True --accelerator=v5p-256 --workdir=gs://BUCKET/m-64e \
        --backend=jobset --dry-run --out=job.yaml

It checks the job, describes it, and starts it. With --dry-run it only writes the manifest (jobset), the script (tpu-vm)
or the command (local) to --out, or prints it, which needs no network. The launched command is the one that you would
type yourself, and it resumes by itself.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from ecdit.command_line import config_origin, config_values, define_config_flag, run_command
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.files import check_file_writable, replace_text
from ecdit.topology import find_slice
from launch.flags import define_location_flags
from launch.starting import checked_job, description

CONFIG = define_config_flag()
LOCATION = define_location_flags()
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Each slice: v5p-256, or v5p:4x4x8.", required=True)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Write the manifest, script or command to --out, and stop.")
OUT = flags.DEFINE_string("out", "", "File for --dry-run; empty: printed.")


def main(argv: list[str]) -> None:
    """Launches the run, and exits with the backend's exit code."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # checks need no device, and must not take a TPU host's
    experiment, location = make_experiment(config_values(CONFIG)), LOCATION()
    backend = location.backend
    job = checked_job(experiment, config_origin(CONFIG), location, find_slice(ACCELERATOR.value))
    if OUT.value and not DRY_RUN.value:
        raise UserError(f"--out={OUT.value}: is for --dry-run")
    print(description(job, backend), flush=True)
    if not DRY_RUN.value:
        sys.exit(backend.start(job))
    if not OUT.value:
        print(backend.text(job), end="")
        return
    check_file_writable(Path(OUT.value))
    replace_text(Path(OUT.value), backend.text(job))
    print(f"dry run: wrote {OUT.value}")


if __name__ == "__main__":
    run_command(main)
