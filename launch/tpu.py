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

from ecdit import __version__
from ecdit.config import (
    UserError,
    check_writable,
    config_origin,
    config_values,
    define_config_flag,
    replace_text,
    run_command,
)
from ecdit.topology import Slice, find_slice
from ecdit.training.experiment import Experiment, make_experiment
from launch import jobset, local_job, tpu_vm
from launch.check import check_plan, check_pod, make_job
from launch.commands import run
from launch.flags import Place, define_place
from launch.job import SHOWN_CODES, Job, describe

NO_IMAGE = f"image.invalid/ecdit:{__version__}"  # a name that no registry can have: of dry runs

CONFIG = define_config_flag()
PLACE = define_place()
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Of each slice: v5p-256, or v5p:4x4x8.", required=True)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Write what would be run to --out, and stop.")
OUT = flags.DEFINE_string("out", "", "File for --dry-run; empty: printed.")
IMAGE = flags.DEFINE_string("image", "", "Container of launch/Dockerfile; tpu-vm, empty: the code of this checkout.")
SERVICE_ACCOUNT = flags.DEFINE_string("service-account", "", "May read and write the bucket; empty: the default one.")
MAX_RESTARTS = flags.DEFINE_integer("max-restarts", 100, f"After exit codes {SHOWN_CODES}.", lower_bound=1)
ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for the training processes; several times for several.")
QUEUE = flags.DEFINE_string("queue", "multislice-queue", "jobset: Kueue's LocalQueue.")
PRIORITY = flags.DEFINE_string("priority", "medium", "jobset: PriorityClass; empty: none.")
GRACE = flags.DEFINE_integer("grace-seconds", 0, "jobset: to save in after SIGTERM; 0: what a checkpoint needs.")
WRITE_RATE = flags.DEFINE_float(
    "write-rate", 0.5, "jobset: GB/s that a host writes to its bucket, assumed.", lower_bound=1e-3
)
DATA = flags.DEFINE_string("data", "", "jobset: gs:// path of prepared data, to mount as data.directory.")
SKIP_PLAN = flags.DEFINE_bool("skip-plan", False, "Do not compile the step to see that it fits the chips' memory.")
LARGE_HOSTS = flags.DEFINE_bool("large-hosts", False, "jobset: node pools that have 8 chips of v5e or v6e in one host.")
CAPACITY = flags.DEFINE_enum("capacity", "on-demand", ["on-demand", "spot", "reserved"], "tpu-vm: which TPUs.")
RUNTIME_VERSION = flags.DEFINE_string("runtime-version", "", "tpu-vm: image of the VMs; empty: the usual one.")


def main(argv: list[str]) -> None:
    """Exits with the backend's exit code."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # checks need no device, and are not to take a TPU host's
    experiment, place = make_experiment(config_values(CONFIG)), PLACE()
    job = checked_job(experiment, place, find_slice(ACCELERATOR.value))
    text = backend_text(job, place)
    if OUT.value and not DRY_RUN.value:
        raise UserError(f"--out={OUT.value}: is for --dry-run")
    print("\n".join([*describe(job), f"backend     {place.backend}{backend_summary(job, place)}"]), flush=True)
    if not DRY_RUN.value:
        sys.exit(start(job, place, text))
    if not OUT.value:
        print(text, end="")
        return
    check_writable(Path(OUT.value))
    replace_text(Path(OUT.value), text)
    print(f"dry run: wrote {OUT.value}")


def checked_job(experiment: Experiment, place: Place, where: Slice) -> Job:
    """The job, or a UserError that says why it cannot run there."""
    if not place.workdir:
        raise UserError("--workdir is missing: gs://BUCKET/PATH, or a directory for --backend=local")
    if place.backend == "tpu-vm" or LARGE_HOSTS.value:
        where = where.on_large_hosts()
    origin = config_origin(CONFIG)
    job = make_job(experiment, origin, where, place.slices, place.workdir, place.name)
    if place.backend == "local":
        local_job.check(job)
    else:
        check_pod(job, experiment, origin["config"])
        if not SKIP_PLAN.value:
            check_plan(job, experiment)
    return job


def backend_text(job: Job, place: Place) -> str:
    """What the backend is given: a manifest, a script, or a command."""
    if place.backend == "jobset":
        return jobset.text(job, jobset_options(place))
    if place.backend == "tpu-vm":
        tpu_vm.check(job)
        return tpu_vm.script(job, tpu_vm_options(place))
    return local_job.command_line(job)


def backend_summary(job: Job, place: Place) -> str:
    """For people: how the backend runs it."""
    restarts = f"restarts after exit codes {SHOWN_CODES}, at most {MAX_RESTARTS.value} times"
    if place.backend == "jobset":
        options = jobset_options(place)
        grace = jobset.grace_seconds(job, options)
        seconds = f"{job.save_seconds(options.write_rate):.0f} s at an assumed {WRITE_RATE.value:g} GB/s a host"
        return f": {options.image}, queue {QUEUE.value}; {restarts}; {grace} s to save in, which takes {seconds}"
    if place.backend == "tpu-vm":
        return f": queued resource {job.name}, {CAPACITY.value}; {restarts}"
    return f": {job.hosts} processes here, logs in {local_job.LOGS / job.name}"


def jobset_options(place: Place) -> jobset.Options:
    """The flags of the backend `jobset`."""
    return jobset.Options(
        image=IMAGE.value or NO_IMAGE,
        namespace=place.namespace,
        queue=QUEUE.value,
        priority=PRIORITY.value,
        service_account=SERVICE_ACCOUNT.value,
        max_restarts=MAX_RESTARTS.value,
        grace_seconds=GRACE.value,
        write_rate=WRITE_RATE.value * 1e9,
        data=DATA.value,
        env=tuple(ENV.value),
    )


def tpu_vm_options(place: Place) -> tpu_vm.Options:
    """The flags of the backend `tpu-vm`."""
    return tpu_vm.Options(
        project=place.project,
        zone=place.zone,
        image=IMAGE.value,
        runtime_version=RUNTIME_VERSION.value,
        service_account=SERVICE_ACCOUNT.value,
        capacity=CAPACITY.value,
        max_restarts=MAX_RESTARTS.value,
        env=tuple(ENV.value),
    )


def start(job: Job, place: Place, text: str) -> int:
    """Does what `text` says. Returns its exit code.

    Raises:
      UserError: it lacks what a dry run does not need.
    """
    if place.backend == "local":
        return local_job.run(job)
    if place.backend == "tpu-vm":
        return run(["bash", "-c", text])  # not as its input, which ssh would read
    if not IMAGE.value:
        raise UserError("--image is missing: build launch/Dockerfile, push it, and name it")
    return run(jobset.launch_command("-", place.context), text)


if __name__ == "__main__":
    run_command(main)
