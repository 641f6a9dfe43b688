"""A training run on TPU slices that it fits: what every backend takes. `launch.check` makes one.

Where a run executes (image, project, queue, ...) is a flag of `launch.tpu` and no section of the config: the config is
saved with the checkpoints and compared on resume, and a run may move to another cluster.
"""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from ecdit.errors import UserError
from ecdit.topology import Slice

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
    mesh: Mapping[str, int]  # sizes by axis
    batch: str  # for people
    checkpoint_bytes: int

    @property
    def hosts(self) -> int:
        """Processes of the run."""
        return self.slice.hosts * self.slices

    def save_seconds(self, bytes_per_second: float) -> float:
        """How long the hosts write at a checkpoint, each its share at this rate."""
        return self.checkpoint_bytes / self.hosts / bytes_per_second


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
    sizes = " x ".join(f"{axis} {size}" for axis, size in job.mesh.items())
    return [
        f"job         {job.name}: python -m ecdit.train {shlex.join(job.train_flags)}",
        f"slices      {job.slices} x {where.accelerator} ({where.topology}), each: chips {where.chips}, "
        f"hosts {where.hosts}, chips a host {where.chips_per_host}, devices a host {where.devices_per_host}",
        f"mesh        {sizes}",
        f"batch       {job.batch}",
        f"checkpoint  {job.checkpoint_bytes / 1e9:.1f} GB, {job.checkpoint_bytes / job.hosts / 1e9:.1f} GB a host",
    ]
