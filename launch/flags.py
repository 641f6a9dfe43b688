"""Defines the flags that name a job and its place, which all commands of launch share."""

import dataclasses
from collections.abc import Callable

from absl import flags

from ecdit.errors import UserError
from launch.backends import BACKENDS
from launch.backends.protocol import Backend
from launch.job import check_name, job_name


@dataclasses.dataclass(frozen=True)
class JobLocation:
    """The name and the backend of a job. The backend's own flags name the exact place."""

    backend: Backend
    workdir: str  # "" if only the name was given
    name: str
    slices: int


def define_location_flags(backend: str | None = None) -> Callable[[], JobLocation]:
    """Defines the flags, and returns a function that reads them after they are parsed.

    That function raises UserError if both --workdir and --name are missing.

    Args:
      backend: the default of --backend; None makes the flag required.
    """
    chosen = flags.DEFINE_enum("backend", backend, list(BACKENDS), "What runs the job.", required=backend is None)
    workdir = flags.DEFINE_string("workdir", "", "The run's workdir; gs://BUCKET/PATH for a pod.")
    name = flags.DEFINE_string("name", "", "The job's name; empty: derived from the workdir.")
    slices = flags.DEFINE_integer("slices", 1, "The number of slices.", lower_bound=1)
    for known in BACKENDS.values():
        known.define_location_flags()

    def location() -> JobLocation:
        if not workdir.value and not name.value:
            raise UserError("--workdir is missing: the run's workdir, or --name=NAME of its job")
        job = check_name(name.value) if name.value else job_name(workdir.value)
        return JobLocation(BACKENDS[str(chosen.value)], workdir.value, job, slices.value)

    return location
