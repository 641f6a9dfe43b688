"""Describes a training run on TPU slices that it fits, for all backends. `launch.check` makes the description.

Flags of `launch.tpu`, not the config, name the place where a run executes (image, project, queue, ...). The config is
saved with the checkpoints and compared on resume, whereas a run may move to another cluster.
"""

import copy
import dataclasses
import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit.exit_codes import HUNG, INTERRUPTED, OUTAGE, PREEMPTED
from ecdit.topology import Slice
from launch.errors import LaunchError
from launch.values import parse_environment

ROOT = Path(__file__).parents[1]  # the checkout, which has the config files
CODE = ("ecdit", "launch", "configs", "setup.py", "pyproject.toml")  # in the checkout; launch/Dockerfile copies these
DATA = "data.directory"  # the key of prepared data
MAX_NAME = 40  # characters; a pod's name adds the replicated job, indices and a suffix, and must stay below 64
# A signal ended the process, often because another host died. INTERRUPTED is none of them: launchers and machines send
# SIGTERM, so somebody sent SIGINT by hand and wants the run to end.
SIGNAL_CODES = tuple(code for code in range(127, 256) if code != INTERRUPTED)
# A run that ends with one of these is restarted. Any other code is an error that would occur again.
RESTART_CODES = (PREEMPTED, HUNG, OUTAGE, *SIGNAL_CODES)
SHOWN_CODES = (
    f"{PREEMPTED}, {HUNG}, {OUTAGE} and {SIGNAL_CODES[0]} to {SIGNAL_CODES[-1]} without {INTERRUPTED} (SIGINT)"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on slices that it fits."""

    name: str  # its name in the backend
    slice: Slice
    slices: int  # number of slices, joined by the data-centre network
    workdir: str
    train_flags: tuple[str, ...]  # flags of `python -m ecdit.train`
    files: tuple[str, ...]  # paths of the user's files that training reads, such as the config and a denoiser
    folders: Mapping[str, tuple[str, ...]]  # that every host reads, by key of the config: see `folders.folders_of`
    mesh: Mapping[str, int]  # sizes by axis
    batch: str  # text that describes the batch
    checkpoint_bytes: int
    checked: Mapping[str, Any]  # the checked config and code, from `checked.describe_checked`
    inputs: str  # text that names data and weights
    better: str  # text that names a layout known to be faster; "" for none

    def checked_flag(self, changes: Mapping[str, Any] | None = None) -> str:
        """Returns the flag with which the trainer refuses any other config or code than the checked one.

        Args:
          changes: changes of the config that the backend makes by its own flags, {"data.directory": value}.
        """
        from ecdit.runs.checked import encode_checked  # imports JAX, which status and stop do not need

        config = copy.deepcopy(dict(self.checked["config"]))
        for key, value in (changes or {}).items():
            group, _, name = key.partition(".")
            config[group][name] = value
        return f"--checked={encode_checked({**self.checked, 'config': config})}"

    @property
    def hosts(self) -> int:
        """Returns the number of the run's hosts, which is its number of processes."""
        return self.slice.hosts * self.slices

    def save_seconds(self, bytes_per_second: float) -> float:
        """Returns how long a checkpoint takes if each host writes its share at this rate."""
        return self.checkpoint_bytes / self.hosts / bytes_per_second


def job_name(workdir: str) -> str:
    """Returns the job's name for a workdir: its last part and six digits of a hash of the whole path."""
    words = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digits = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:6]
    letters = words if words[:1].isalpha() else f"run-{words}"
    return f"{letters[: MAX_NAME - len(digits) - 1].strip('-')}-{digits}"


def check_name(name: str) -> str:
    """Returns `name`. Raises LaunchError if Kubernetes or Google Cloud would refuse it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > MAX_NAME:
        raise LaunchError(
            f"--name={name}: must be lower-case letters, digits and dashes, start with a letter, end with no dash, "
            f"and have at most {MAX_NAME} characters"
        )
    return name


def training_environment(extra: Sequence[str]) -> dict[str, str]:
    """Returns the variables of a training process on a TPU host: the fixed ones, then `extra`, each NAME=VALUE.

    Raises:
      LaunchError: an item of `extra` does not have that form, or looks like a secret.
    """
    fixed = {
        "JAX_PLATFORMS": "tpu,cpu",  # an error if the TPU does not start; otherwise JAX would fall back to the CPU
        "PYTHONUNBUFFERED": "1",
    }
    return fixed | parse_environment(extra)


def describe_restarts(most: int) -> str:
    """Returns text that says when and how often a backend restarts a job."""
    return f"restarts after exit codes {SHOWN_CODES}, at most {most} times"


def describe(job: Job) -> list[str]:
    """Returns lines that describe the job and its slices."""
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


def own_files(job: Job) -> list[str]:
    """Returns the user's files that are not in CODE."""
    return [path for path in job.files if Path(path).parts[0] not in CODE]


def describe_files(job: Job) -> list[str]:
    """Returns a line with the user's files that an image must have, besides those in the job's folders; or no line."""
    folders = [folder for paths in job.folders.values() for folder in paths]
    named = [path for path in own_files(job) if not any(Path(path).is_relative_to(folder) for folder in folders)]
    return [f"hosts need  in the image, at the same paths (see launch/Dockerfile): {', '.join(named)}"] if named else []


def describe_folders(folders: Mapping[str, tuple[str, ...]], place: Callable[[str, str], str]) -> list[str]:
    """Returns a line for every place where hosts need folders.

    Args:
      folders: paths by key.
      place: says for a key and a path where hosts find it; "" if the launcher brings it.
    """
    places: dict[str, list[str]] = {}
    for key, paths in folders.items():
        for path in paths:
            places.setdefault(place(key, path), []).append(f"{key} {path}")
    return [f"hosts need  {where}: {', '.join(named)}" for where, named in places.items() if where]
