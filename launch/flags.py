"""Flags that say which job is meant, and where it is: the same for all commands of launch."""

import dataclasses
from collections.abc import Callable

from absl import flags

from ecdit.errors import UserError
from launch.job import check_name, job_name

BACKENDS = ("jobset", "tpu-vm", "local")


@dataclasses.dataclass(frozen=True)
class Place:
    """A job's name and where its backend keeps it."""

    backend: str
    workdir: str  # "" where the name was given alone
    name: str
    slices: int
    namespace: str
    context: str
    project: str
    zone: str


def define_place(backend: str | None = None) -> Callable[[], Place]:
    """Defines the flags, --backend with this default or none; call the result once they are parsed.

    That raises UserError where neither --workdir nor --name says which job.
    """
    chosen_backend = flags.DEFINE_enum("backend", backend, BACKENDS, "What runs the job.", required=backend is None)
    workdir = flags.DEFINE_string("workdir", "", "The run's workdir; gs://BUCKET/PATH for a pod.")
    name = flags.DEFINE_string("name", "", "Of the job; empty: made of the workdir.")
    slices = flags.DEFINE_integer("slices", 1, "How many slices.", lower_bound=1)
    namespace = flags.DEFINE_string("namespace", "default", "jobset: of Kubernetes.")
    context = flags.DEFINE_string("context", "", "jobset: kubectl's, which names the cluster; empty: the current one.")
    project = flags.DEFINE_string("project", "", "tpu-vm: Google Cloud's; empty: as gcloud is configured.")
    zone = flags.DEFINE_string("zone", "", "tpu-vm: such as us-east5-a; empty: as gcloud is configured.")

    def place() -> Place:
        if not workdir.value and not name.value:
            raise UserError("--workdir is missing: the run's workdir, or --name=NAME of its job")
        chosen = check_name(name.value) if name.value else job_name(workdir.value)
        where = (namespace.value, context.value, project.value, zone.value)
        return Place(chosen_backend.value, workdir.value, chosen, slices.value, *where)

    return place
