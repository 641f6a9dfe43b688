"""The flags that say which job is meant and where it is: the same for all commands of launch."""

import dataclasses
from collections.abc import Callable

from absl import flags

from ecdit.errors import UserError
from launch.backends import BACKENDS
from launch.backends.protocol import Backend
from launch.job import check_name, job_name


@dataclasses.dataclass(frozen=True)
class JobLocation:
    """The name by which a job is found, and the backend that keeps it. The backend's own flags say where exactly."""

    backend: Backend
    workdir: str  # "" if only the name was given
    name: str
    slices: int


def define_location_flags(backend: str | None = None) -> Callable[[], JobLocation]:
    """Defines the flags. Returns a function that reads them once they are parsed.

    It raises UserError if neither --workdir nor --name says which job is meant.

    Args:
      backend: the default of --backend; None makes the flag required.
    """
    chosen = flags.DEFINE_enum("backend", backend, list(BACKENDS), "What runs the job.", required=backend is None)
    workdir = flags.DEFINE_string("workdir", "", "The run's workdir; gs://BUCKET/PATH for a pod.")
    name = flags.DEFINE_string("name", "", "Of the job; empty: made of the workdir.")
    slices = flags.DEFINE_integer("slices", 1, "How many slices.", lower_bound=1)
    for known in BACKENDS.values():
        known.define_location_flags()

    def location() -> JobLocation:
        if not workdir.value and not name.value:
            raise UserError("--workdir is missing: the run's workdir, or --name=NAME of its job")
        job = check_name(name.value) if name.value else job_name(workdir.value)
        return JobLocation(BACKENDS[str(chosen.value)], workdir.value, job, slices.value)

    return location
