"""A training run on TPU slices, checked before anything is started: what every backend takes.

Where a run executes (image, project, queue, ...) is a flag of `launch.tpu` and no section of the config: the config is
saved with the checkpoints and compared on resume, and a run may move to another cluster.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ecdit.conditioning.text_to_image import make_system
from ecdit.config import ConfigError, UserError
from ecdit.models.config import group_size
from ecdit.partitioning import MESH_AXES, abstract_mesh, batch_shards
from ecdit.topology import Slice
from ecdit.training.experiment import Experiment, check_mesh
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, state_shardings

ROOT = Path(__file__).parents[1]  # of the checkout, which configs are files of
MAX_NAME = 40  # characters: with replicated job, indices and a suffix, a pod's name must stay below 64
# A run that ends with one of these is started again: saved after SIGTERM, a watchdog's, and those of signals. Any other
# is an error that would come again.
RESTART_CODES = (42, 43, *range(127, 256))
SHOWN_CODES = "42, 43 and 127 to 255"


class LaunchError(UserError, ValueError):
    """A run that cannot be started as asked."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on slices that it fits."""

    name: str  # of what the backend creates
    slice: Slice
    slices: int  # of them, joined by the data-centre network
    workdir: str
    train_flags: tuple[str, ...]  # of `python -m ecdit.train`, as one would type them
    mesh: tuple[int, ...]  # sizes of MESH_AXES
    batch: str  # for people
    checkpoint_bytes: int

    @property
    def hosts(self) -> int:
        """Processes of the run."""
        return self.slice.hosts * self.slices

    def save_seconds(self, bytes_per_second: float) -> float:
        """How long the hosts write at a checkpoint, each its share at this rate."""
        return self.checkpoint_bytes / self.hosts / bytes_per_second


def make_job(
    experiment: Experiment, origin: Mapping[str, Any], where: Slice, slices: int, workdir: str, name: str = ""
) -> Job:
    """Checks that `experiment` can train on the slices, from shapes alone.

    Args:
      experiment: what to train.
      origin: of the experiment: see `config.config_origin`.
      where: one of the slices.
      slices: how many.
      workdir: of the run.
      name: of the job; "" for one that is made of the workdir, so that a run has one job.

    Raises:
      UserError: (its subclasses) the mesh, the batch, a group or a parameter does not divide, or an argument is wrong.
    """
    experiment, overrides = _on_slices(experiment, dict(origin["overrides"]), slices)
    mesh = abstract_mesh(experiment.mesh, where.chips * slices)
    if mesh.shape["slices"] != slices:
        raise ConfigError("mesh.slices", mesh.shape["slices"], f"must be the number of slices, {slices}")
    check_mesh(experiment, mesh)
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    state = abstract_state(
        system, optimizer, state_shardings(system, optimizer, mesh)
    )  # refuses what cannot be laid out
    train, model = experiment.train, experiment.model
    images = train.batch_size // (batch_shards(mesh) * train.accumulation)
    size = group_size(model.group, model.num_kept)
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
        mesh=tuple(mesh.shape[axis] for axis in MESH_AXES),
        batch=f"{train.batch_size} images: {images} to each of {batch_shards(mesh)} parts, "
        f"{images * model.num_kept // size} groups of {size} tokens",
        checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def _on_slices(experiment: Experiment, overrides: dict[str, Any], slices: int) -> tuple[Experiment, dict[str, Any]]:
    """The experiment with as many slices in its mesh, unless the mesh was given some."""
    mesh = experiment.mesh
    if slices > 1 and mesh.slices == 1 and "mesh.slices" not in overrides:
        overrides["mesh.slices"] = slices
        experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(mesh, slices=slices))
    return experiment, overrides


def check_pod(job: Job, experiment: Experiment, config_file: str) -> None:
    """Raises LaunchError or ConfigError for what runs here but not on the hosts of a pod."""
    if not re.fullmatch(r"gs://[^/]+(/[^/]+)*/?", job.workdir):
        raise LaunchError(
            f"--workdir={job.workdir}: must be gs://BUCKET/PATH: the hosts of a pod share no local directory, and what "
            f"one of them writes is gone with it"
        )
    path = Path(config_file.partition(":")[0])
    if path.is_absolute() or ".." in path.parts:
        raise LaunchError(f"--config={config_file}: must be a path inside the checkout, which the hosts get a copy of")
    if job.hosts > 1 and not experiment.runtime.distributed:
        raise ConfigError(
            "runtime.distributed", False, f"must be True: else {job.hosts} hosts each train by themselves"
        )


def job_name(workdir: str) -> str:
    """A name for the run in `workdir`, the same each time: its last part and a few digits of a hash of the whole."""
    words = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digits = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:6]
    letters = words if words[:1].isalpha() else f"run-{words}"
    return f"{letters[: MAX_NAME - len(digits) - 1].strip('-')}-{digits}"


def check_name(name: str) -> str:
    """`name`, or a LaunchError if Kubernetes and Google Cloud would refuse it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > MAX_NAME:
        raise LaunchError(
            f"--name={name}: must be lower-case letters, digits and dashes, start with a letter, end with no dash, "
            f"and have at most {MAX_NAME} characters"
        )
    return name


def describe(job: Job) -> list[str]:
    """Lines for people: what runs where."""
    where = job.slice
    sizes = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, job.mesh, strict=True))
    return [
        f"job         {job.name}: python -m ecdit.train {' '.join(job.train_flags)}",
        f"slices      {job.slices} of {where.accelerator} ({where.topology}): each {where.chips} chips, "
        f"{where.hosts} hosts of {where.chips_per_host}",
        f"mesh        {sizes}",
        f"batch       {job.batch}",
        f"checkpoint  {job.checkpoint_bytes / 1e9:.1f} GB, {job.checkpoint_bytes / job.hosts / 1e9:.1f} GB a host",
    ]
