"""Checks from its config and the sizes of the slices alone that a run can be launched."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ecdit.checkpoints.restore import state_parts
from ecdit.config import ConfigError
from ecdit.experiment import Experiment, check_mesh, check_tokenizers, check_trainable
from ecdit.partitioning import MeshConfig, abstract_mesh, batch_shards
from ecdit.planning.cache import largest, plan_phases
from ecdit.planning.compiler import DoesNotFit, find_target, use_compiler
from ecdit.planning.table import known_better
from ecdit.runs.checked import describe_checked
from ecdit.runs.inputs import check_placeholder, inputs_line
from ecdit.system import make_system
from ecdit.topology import Slice
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, state_shardings
from launch.errors import LaunchError
from launch.folders import folders_of, tokenizer_files
from launch.job import ROOT, Job, check_name, job_name
from launch.values import check_characters


def make_job(
    experiment: Experiment, origin: Mapping[str, Any], where: Slice, slices: int, workdir: str, name: str = ""
) -> Job:
    """Returns the job of an experiment, after checking from shapes alone that it can train on the slices.

    Args:
      experiment: the experiment to train.
      origin: its config file and overrides, from `command_line.config_origin`.
      where: one of the slices.
      slices: number of slices.
      workdir: the run's workdir.
      name: the job's name; "" derives it from the workdir, so that a run has only one job.

    Raises:
      UserError: the mesh, the batch, a group or a parameter does not divide, or an argument is wrong.
    """
    check_characters("--config", origin["config"])
    check_characters("--workdir", workdir)
    for key, value in origin["overrides"].items():
        check_characters(f"--config.{key}", str(value))
    experiment, overrides = _on_slices(experiment, dict(origin["overrides"]), slices)
    mesh = abstract_mesh(experiment.mesh, where.devices * slices)
    if mesh.shape["slices"] != slices:
        raise ConfigError("mesh.slices", mesh.shape["slices"], f"must be the number of slices, {slices}")
    check_mesh(experiment, mesh)
    for phase in experiment.resolved_phases():
        check_placeholder(phase.experiment.data, [phase.experiment.data.task], where.hosts * slices)
    check_trainable(experiment)
    tokenizers = tokenizer_files(experiment)
    check_tokenizers(experiment)
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    state = abstract_state(
        system, optimizer, state_shardings(system, optimizer, mesh)
    )  # raises if a parameter does not divide
    train = experiment.train
    images = train.batch_size // (batch_shards(mesh) * train.accumulation)
    together = system.parts.denoiser.images_together("train")
    return Job(
        name=check_name(name) if name else job_name(workdir),
        slice=where,
        slices=slices,
        workdir=workdir,
        train_flags=(
            f"--config={origin['config']}",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in sorted(overrides.items())),
        ),
        files=(
            origin["config"].partition(":")[0],
            *experiment.user_files(),
            *tokenizers,
        ),
        folders=folders_of(experiment),
        mesh=dict(mesh.shape),
        batch=f"{train.batch_size} images: {images} to each of {batch_shards(mesh)} parts, "
        f"{together} at a time compete for experts",
        checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_parts(state))),
        checked=describe_checked(experiment),
        inputs=inputs_line(experiment),
        better=known_better(origin, experiment, where, slices),
    )


def _on_slices(experiment: Experiment, overrides: dict[str, Any], slices: int) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment and its overrides with `slices` in the mesh, unless an override sets mesh.slices."""
    mesh = experiment.mesh
    if slices > 1 and mesh.slices == 1 and "mesh.slices" not in overrides:
        overrides["mesh.slices"] = slices
        experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(mesh, slices=slices))
    return experiment, overrides


def check_pod(job: Job, experiment: Experiment, config_file: str) -> None:
    """Raises LaunchError or ConfigError for a job that can run on one machine but not on the hosts of a pod."""
    if not re.fullmatch(r"gs://[^/]+(/[^/]+)+/?", job.workdir):
        raise LaunchError(
            f"--workdir={job.workdir}: must be gs://BUCKET/PATH, because the hosts of a pod share no local directory "
            f"and lose theirs when they end"
        )
    for file in job.files:
        path, key = Path(file), _key_of(file, experiment, config_file)
        if path.is_absolute() or ".." in path.parts:
            raise LaunchError(f"{key}={path}: must be a path inside the checkout, at which the hosts have it too")
        if path.resolve() != (ROOT / path).resolve():
            raise LaunchError(
                f"{key}={path}: is {path.resolve()} here, but the hosts get {ROOT / path}: launch from {ROOT}"
            )
    if job.hosts > 1 and not experiment.runtime.distributed:
        raise ConfigError("runtime.distributed", False, f"must be True, or each of {job.hosts} hosts would train alone")


def _key_of(path: str, experiment: Experiment, config_file: str) -> str:
    """Returns the flag or the config key that names a user's file."""
    named = {
        **{file: f"config.{key}" for file, key in tokenizer_files(experiment).items()},
        experiment.data.module: "config.data.module",
        config_file.partition(":")[0]: "--config",
    }
    return named.get(path, "config.denoiser")


def check_plan(job: Job, experiment: Experiment) -> None:
    """Raises LaunchError if the step does not fit the memory of the job's chips. Compiles it, which takes minutes.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    use_compiler()
    slices = f"{job.slices}x" if job.slices > 1 else ""
    target = find_target(f"{slices}{job.slice.chip}:{job.slice.topology}")
    laid_out = dataclasses.replace(experiment, mesh=MeshConfig(**job.mesh))
    print(f"planning for {target.name} (--skip-plan skips this)", flush=True)
    try:
        plan = largest(plan_phases(laid_out, target))
    except DoesNotFit as error:
        raise LaunchError(
            f"--accelerator: the step does not fit {target.name}: {error}\n`python -m ecdit.plan "
            f"--topology={target.name}` finds settings that fit"
        ) from error
    print(f"fits: {plan.hbm_bytes_per_device / 1e9:.1f} GB of {plan.hbm_limit / 1e9:.0f} GB a device", flush=True)
