"""Runs the points of a sweep file, one run per point, and makes tables and plots of their results.

    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes
    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes --collect

A point trains in WORKDIR/NAME. All points are checked and counted before the first one starts. On this machine,
--parallel of them run at a time, and the same command continues where an earlier one ended. On pods, each point is a
job, as `launch.tpu` would start it, unless its checkpoints in the bucket are complete. `--config.x=y` applies to all.
The exit code is 0 if all are done (on pods: done or started), 1 if one failed, 42 (PREEMPTED) if some were stopped.
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
from launch.backends.protocol import Backend
from launch.flags import JobLocation, define_location_flags
from launch.job import Job, job_name
from launch.starting import checked_job, description
from launch.sweeps.collecting import collect
from launch.sweeps.hyper import SweepError
from launch.sweeps.points import PREFIX, SweepPoint, load_points
from launch.sweeps.running import is_done, run_points

LOCATION = define_location_flags(backend="local")
SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, such as configs/sweeps/model_sizes.py.", required=True)
CONFIG = flags.DEFINE_string("config", "", "Config file of the points, instead of the sweep's CONFIG.")
ACCELERATOR = flags.DEFINE_string("accelerator", "", "Slices of each point; local, empty: one process per point.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "local: points that run at a time.", lower_bound=1)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Write each point's manifest, script or command into --out, and stop.")
OUT = flags.DEFINE_string("out", "", "Directory for --dry-run; empty: printed.")
COLLECT = flags.DEFINE_bool("collect", False, "Run nothing, and write tables and plots of the runs into --workdir.")
FINAL_SHARE = 0.2  # a run's final loss is the mean over this share of its steps, at the end


def main(argv: list[str]) -> None:
    """Runs or collects the sweep, and exits with the code in the module's docstring."""
    jax.config.update("jax_platforms", "cpu")  # counting needs no device, and must not take one from the points
    overrides, location = config_overrides(argv[1:]), LOCATION()
    backend, workdir = location.backend, location.workdir
    if not workdir:
        raise UserError("--workdir is missing: a directory, or gs://BUCKET/PATH for pods; points train in it")
    if location.name != job_name(workdir):
        raise UserError(f"--name={location.name}: must not be set, because jobs of a sweep are named after workdirs")
    if OUT.value and not DRY_RUN.value:
        raise UserError(f"--out={OUT.value}: is for --dry-run")
    points = load_points(SWEEP.value, CONFIG.value, overrides)
    if COLLECT.value:
        for path in collect(points, as_path(workdir), FINAL_SHARE):
            print(f"wrote {path}")
        return
    if backend.runs_here and is_remote(workdir):
        raise UserError(f"--workdir={workdir}: must be a directory for --backend={backend.name}, whose logs are in it")
    for point in points:
        print(planned(point), flush=True)
    jobs = make_jobs(points, location)
    if DRY_RUN.value:
        dry_run(points, jobs, location)
        return
    if backend.runs_here:
        commands = {point.name: shlex.split(command_line(point, jobs, location)) for point in points}
        # The command line begins with "python", which stands for this interpreter.
        commands = {name: [sys.executable, *command[1:]] for name, command in commands.items()}
        sys.exit(run_points(points, commands, Path(workdir), PARALLEL.value))
    done = [point.name for point in points if is_done(point, as_path(jobs[point.name].workdir))]
    if done:
        print(f"done already: {', '.join(done)}", flush=True)
    sys.exit(start_jobs({name: job for name, job in jobs.items() if name not in done}, backend))


def config_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the overrides for all points, {"config.a.b": "value"} for `--config.a.b=value`.

    Raises:
      UserError: an argument has another form.
    """
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith(f"--{PREFIX}") or not equals:
            raise UserError(f"{argument}: no flag of this command, and no --{PREFIX}KEY=VALUE")
        overrides[key] = value
    return overrides


def planned(point: SweepPoint) -> str:
    """Returns a line with the size of a point's model and its steps."""
    counts = point.counts()
    flops = sum(part["flops"] for part in counts.flops_per_image.values())
    sizes = f"{counts.denoiser_params / 1e6:.3f} M parameters, {counts.activated_params / 1e6:.3f} M activated"
    steps = point.experiment.train.num_steps
    return f"{point.name}: {sizes}, {flops / 1e9:.4f} GFLOP an image, {steps} steps"


def point_location(point: SweepPoint, location: JobLocation) -> JobLocation:
    """Returns the location of a point of the sweep at `location`."""
    workdir = f"{location.workdir.rstrip('/')}/{point.name}"
    return dataclasses.replace(location, workdir=workdir, name=job_name(workdir))


def make_jobs(points: Sequence[SweepPoint], location: JobLocation) -> dict[str, Job]:
    """Checks all points. Returns their jobs by name, or none if they are single processes of this machine.

    Raises:
      SweepError: a point cannot run there; the message names it.
    """
    backend = location.backend
    if not backend.runs_here and not ACCELERATOR.value:
        raise UserError(f"--accelerator is missing: --backend={backend.name} needs slices, such as v5p-256")
    jobs = {}
    for point in points:
        try:
            if ACCELERATOR.value:
                at, where = point_location(point, location), find_slice(ACCELERATOR.value)
                jobs[point.name] = checked_job(point.experiment, point.origin, at, where)
            else:
                check_alone(point)
        except UserError as error:
            raise SweepError(f"point {point.name}: {error}") from None
    return jobs


def check_alone(point: SweepPoint) -> None:
    """Checks divisibility on the smallest possible mesh; larger ones would fail too.

    Raises:
      ConfigError: a value does not divide.
    """
    mesh = point.experiment.mesh
    fewest = math.prod(max(getattr(mesh, axis), 1) for axis in MESH_AXES)
    check_mesh(point.experiment, abstract_mesh(mesh, fewest))


def command_line(point: SweepPoint, jobs: dict[str, Job], location: JobLocation) -> str:
    """Returns the command that runs a point on this machine: its job's, or that of a single process without a job."""
    if point.name in jobs:
        return location.backend.text(jobs[point.name])
    workdir = point_location(point, location).workdir
    return f"{shlex.join(['python', '-m', 'ecdit.train', *point.flags, f'--workdir={workdir}'])}\n"


def dry_run(points: Sequence[SweepPoint], jobs: dict[str, Job], location: JobLocation) -> None:
    """Writes a file for each point into --out, or prints it."""
    backend = location.backend
    for point in points:
        if backend.runs_here:
            text = command_line(point, jobs, location)
        else:
            print(description(jobs[point.name], backend), flush=True)
            text = backend.text(jobs[point.name])
        if not OUT.value:
            print(text, end="")
            continue
        path = Path(OUT.value) / f"{point.name}.{backend.file_ending}"
        check_writable(path.parent)
        os.makedirs(path.parent, exist_ok=True)
        replace_text(path, text)
        print(f"dry run: wrote {path}")


def start_jobs(jobs: dict[str, Job], backend: Backend) -> int:
    """Starts a job for each point, and continues if one fails to start. Returns 1 in that case, else 0."""
    failed = []
    for name, job in jobs.items():
        print(description(job, backend), flush=True)
        if backend.start(job):
            failed.append(name)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs are started", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main, known_only=True)
