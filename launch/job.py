"""A training run on TPU slices that it fits: the value that every backend takes. `launch.check` makes one.

The place where a run executes (image, project, queue, ...) is given by flags of `launch.tpu` and not by the config: the
config is saved with the checkpoints and compared on resume, and a run may move to another cluster.
"""

import copy
import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit.exit_codes import HUNG, OUTAGE, PREEMPTED
from ecdit.topology import Slice
from launch.errors import LaunchError
from launch.values import parse_environment

ROOT = Path(__file__).parents[1]  # the checkout, in which configs are files
MAX_NAME = 40  # characters: with replicated job, indices and a suffix, a pod's name must stay below 64
SIGNAL_CODES = range(127, 256)  # a signal ended the process, often because another host died
# A run that ends with one of these is started again. Any other code is an error that would come again.
RESTART_CODES = (PREEMPTED, HUNG, OUTAGE, *SIGNAL_CODES)
SHOWN_CODES = f"{PREEMPTED}, {HUNG}, {OUTAGE} and {SIGNAL_CODES[0]} to {SIGNAL_CODES[-1]}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on slices that it fits."""

    name: str  # under which the backend creates it
    slice: Slice
    slices: int  # how many, joined by the data-centre network
    workdir: str
    train_flags: tuple[str, ...]  # of `python -m ecdit.train`, as you would type them
    files: tuple[str, ...]  # paths of the user's files that training reads: the config, a denoiser of their own
    mesh: Mapping[str, int]  # sizes by axis
    batch: str  # for people
    checkpoint_bytes: int
    checked: Mapping[str, Any]  # what was checked, as `checked.describe_checked` returns it
    inputs: str  # for people: which data and weights
    better: str  # for people: a layout that is known to be faster; "" for none

    def checked_flag(self, changes: Mapping[str, Any] | None = None) -> str:
        """Returns the flag by which the trainer refuses all but what was checked.

        Args:
          changes: {"data.directory": value}, of the config, which the backend makes by flags of its own.
        """
        from ecdit.runs.checked import encode_checked  # takes JAX, which looking at a job does not need

        config = copy.deepcopy(dict(self.checked["config"]))
        for key, value in (changes or {}).items():
            group, _, name = key.partition(".")
            config[group][name] = value
        return f"--checked={encode_checked({**self.checked, 'config': config})}"

    @property
    def hosts(self) -> int:
        """The number of the run's processes."""
        return self.slice.hosts * self.slices

    def save_seconds(self, bytes_per_second: float) -> float:
        """Returns how long a checkpoint takes if each host writes its share at this rate."""
        return self.checkpoint_bytes / self.hosts / bytes_per_second


def job_name(workdir: str) -> str:
    """Returns the job's name for a workdir: its last part and a few digits of a hash of the whole."""
    words = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digits = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:6]
    letters = words if words[:1].isalpha() else f"run-{words}"
    return f"{letters[: MAX_NAME - len(digits) - 1].strip('-')}-{digits}"


def check_name(name: str) -> str:
    """Returns `name`; raises LaunchError if Kubernetes or Google Cloud would refuse it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > MAX_NAME:
        raise LaunchError(
            f"--name={name}: must be lower-case letters, digits and dashes, start with a letter, end with no dash, "
            f"and have at most {MAX_NAME} characters"
        )
    return name


def training_environment(extra: Sequence[str]) -> dict[str, str]:
    """Returns the variables of a training process on a TPU host: the fixed ones, then `extra`, each NAME=VALUE.

    Raises:
      LaunchError: one of `extra` does not have that form, or looks like a secret.
    """
    fixed = {
        "JAX_PLATFORMS": "tpu,cpu",  # fails if the TPU does not start; without it JAX would fall back to the CPU
        "PYTHONUNBUFFERED": "1",
    }
    return fixed | parse_environment(extra)


def describe_restarts(most: int) -> str:
    """Returns for people: when a backend that restarts a job does so, and how often at most."""
    return f"restarts after exit codes {SHOWN_CODES}, at most {most} times"


def describe(job: Job) -> list[str]:
    """Returns lines for people: what runs, and on which slices."""
    where = job.slice
    sizes = " x ".join(f"{axis} {size}" for axis, size in job.mesh.items())
    return [
        job.inputs,
        f"job         {job.name}: python -m ecdit.train {shlex.join(job.train_flags)}",
        f"slices      {job.slices} x {where.accelerator} ({where.topology}), each: chips {where.chips}, "
        f"hosts {where.hosts}, chips a host {where.chips_per_host}, devices a host {where.devices_per_host}",
        f"mesh        {sizes}",
        f"batch       {job.batch}",
        f"checkpoint  {job.checkpoint_bytes / 1e9:.1f} GB, {job.checkpoint_bytes / job.hosts / 1e9:.1f} GB a host",
        *([f"faster      {job.better}"] if job.better else []),
    ]
