"""Runs the points of a sweep file, one run each, and makes tables and plots of what came of them.

    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes
    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes --collect

A point trains in WORKDIR/NAME. All are checked and counted before the first starts. Here, --parallel run at a time;
the same command goes on where an earlier one ended. On pods each point is a job, as `launch.tpu` would start it; those
whose checkpoints in the bucket say that they are done get none. `--config.x=y` are for all points.
Exit code: 0 if all are done (on pods: done or started), 1 if one failed, 42 if some were stopped.
"""

import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.experiment import check_mesh
from ecdit.files import check_writable, is_remote, replace_text
from ecdit.partitioning import MESH_AXES, abstract_mesh
from ecdit.storage import as_path
from ecdit.topology import find_slice
from launch import backends, local_job
from launch.flags import Place, define_place
from launch.job import Job, job_name
from launch.sweeps.collecting import collect
from launch.sweeps.hyper import SweepError
from launch.sweeps.points import PREFIX, Point, load_points
from launch.sweeps.running import is_done, run_points

PLACE = define_place(backend="local")
SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, such as configs/sweeps/model_sizes.py.", required=True)
CONFIG = flags.DEFINE_string("config", "", "Config file of the points, in place of the sweep's CONFIG.")
ACCELERATOR = flags.DEFINE_string("accelerator", "", "Of each point's slices; local, empty: one process, as typed.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "local: points at a time.", lower_bound=1)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Write what would be run for each point into --out, and stop.")
OUT = flags.DEFINE_string("out", "", "Directory for --dry-run; empty: printed.")
COLLECT = flags.DEFINE_bool("collect", False, "Run nothing: write tables and plots of the runs into --workdir.")
FINAL_SHARE = 0.2  # of a run's steps, the last ones: its final loss is the mean over them
ENDINGS = {"jobset": "yaml", "tpu-vm": "sh", "local": "sh"}  # of files of a dry run


def main(argv: list[str]) -> None:
    """Exits as the module says."""
    jax.config.update("jax_platforms", "cpu")  # counting needs no device, and is not to take one from the points
    overrides, place = config_overrides(argv[1:]), PLACE()
    if not place.workdir:
        raise UserError("--workdir is missing: a directory, or gs://BUCKET/PATH for pods; points train in it")
    if place.name != job_name(place.workdir):
        raise UserError(f"--name={place.name}: is of no sweep, whose jobs are named after their workdirs")
    if OUT.value and not DRY_RUN.value:
        raise UserError(f"--out={OUT.value}: is for --dry-run")
    points = load_points(SWEEP.value, CONFIG.value, overrides)
    if COLLECT.value:
        for path in collect(points, as_path(place.workdir), FINAL_SHARE):
            print(f"wrote {path}")
        return
    if place.backend == "local" and is_remote(place.workdir):
        raise UserError(f"--workdir={place.workdir}: must be a directory for --backend=local, whose logs are in it")
    for point in points:
        print(planned(point), flush=True)
    jobs = make_jobs(points, place)
    if DRY_RUN.value:
        dry_run(points, jobs, place)
        return
    if place.backend == "local":
        commands = {point.name: [sys.executable, *local_arguments(point, jobs, place)] for point in points}
        sys.exit(run_points(points, commands, Path(place.workdir), PARALLEL.value))
    done = [point.name for point in points if is_done(point, as_path(jobs[point.name].workdir))]
    if done:
        print(f"done already: {', '.join(done)}", flush=True)
    sys.exit(start_jobs({name: job for name, job in jobs.items() if name not in done}, place))


def config_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """{"config.a.b": "value"} of `--config.a.b=value`.

    Raises:
      UserError: something else.
    """
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith(f"--{PREFIX}") or not equals:
            raise UserError(f"{argument}: no flag of this command, and no --{PREFIX}KEY=VALUE")
        overrides[key] = value
    return overrides


def planned(point: Point) -> str:
    """For people: what a point is made of."""
    counts = point.counts()
    flops = sum(part["flops"] for part in counts.flops_per_image.values())
    sizes = f"{counts.denoiser_params / 1e6:.3f} M parameters, {counts.activated_params / 1e6:.3f} M activated"
    steps = point.experiment.train.num_steps
    return f"{point.name}: {sizes}, {flops / 1e9:.4f} GFLOP an image, {steps} steps"


def place_of(point: Point, place: Place) -> Place:
    """Where a point of a sweep in `place` runs."""
    workdir = f"{place.workdir.rstrip('/')}/{point.name}"
    return dataclasses.replace(place, workdir=workdir, name=job_name(workdir))


def make_jobs(points: Sequence[Point], place: Place) -> dict[str, Job]:
    """A job for each point by its name, checked; none for single processes here, which are checked too.

    Raises:
      SweepError: a point cannot run there; the message names it.
    """
    if place.backend != "local" and not ACCELERATOR.value:
        raise UserError(f"--accelerator is missing: --backend={place.backend} needs slices, such as v5p-256")
    jobs = {}
    for point in points:
        try:
            if ACCELERATOR.value:
                at = place_of(point, place)
                job = backends.checked_job(point.experiment, point.origin, at, find_slice(ACCELERATOR.value))
                backends.backend_text(job, at)  # refuses what the backend cannot do
                jobs[point.name] = job
            else:
                check_alone(point)
        except UserError as error:
            raise SweepError(f"point {point.name}: {error}") from None
    return jobs


def check_alone(point: Point) -> None:
    """Raises ConfigError for what divides over no number of devices: over more than the fewest, it would not either."""
    mesh = point.experiment.mesh
    fewest = math.prod(max(getattr(mesh, axis), 1) for axis in MESH_AXES)
    check_mesh(point.experiment, abstract_mesh(mesh, fewest))


def local_arguments(point: Point, jobs: dict[str, Job], place: Place) -> list[str]:
    """Of the Python that runs a point here: a process, or one for every host of its slices."""
    if point.name in jobs:
        return local_job.arguments(jobs[point.name])
    return ["-m", "ecdit.train", *point.flags, f"--workdir={place_of(point, place).workdir}"]


def dry_run(points: Sequence[Point], jobs: dict[str, Job], place: Place) -> None:
    """Writes a file for each point into --out, or prints them."""
    for point in points:
        if place.backend == "local":
            text = f"python {shlex.join(local_arguments(point, jobs, place))}\n"
        else:
            at = place_of(point, place)
            print(backends.description(jobs[point.name], at), flush=True)
            text = backends.backend_text(jobs[point.name], at)
        if not OUT.value:
            print(text, end="")
            continue
        path = Path(OUT.value) / f"{point.name}.{ENDINGS[place.backend]}"
        check_writable(path.parent)
        os.makedirs(path.parent, exist_ok=True)
        replace_text(path, text)
        print(f"dry run: wrote {path}")


def start_jobs(jobs: dict[str, Job], place: Place) -> int:
    """Starts a job for each point, also after one that was not started. Returns 1 if there was such a one, else 0."""
    failed = []
    for name, job in jobs.items():
        at = dataclasses.replace(place, workdir=job.workdir, name=job.name)
        print(backends.description(job, at), flush=True)
        if backends.start(job, at, backends.backend_text(job, at)):
            failed.append(name)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs are started", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main, known_only=True)
