"""The flags, checks and descriptions that `launch.tpu`, for one job, and `launch.sweep`, for several, share."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.topology import Slice
from launch.backends import BACKENDS
from launch.backends.protocol import Backend
from launch.check import check_plan, check_pod, make_job
from launch.flags import JobLocation
from launch.job import SHOWN_CODES, Job, describe

SKIP_PLAN = flags.DEFINE_bool("skip-plan", False, "Do not compile the step to see that it fits the chips' memory.")
LARGE_HOSTS = flags.DEFINE_bool("large-hosts", False, "jobset: node pools that have 8 chips of v5e or v6e in one host.")
# Several backends read these, by name.
flags.DEFINE_string("image", "", "Container of launch/Dockerfile; tpu-vm, empty: the code of this checkout.")
flags.DEFINE_string("service-account", "", "May read and write the bucket; empty: the default one.")
flags.DEFINE_integer("max-restarts", 100, f"After exit codes {SHOWN_CODES}.", lower_bound=1)
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the training processes; several times for several.")
flags.DEFINE_multi_string("secret-env", [], "NAME of a variable that --secret or --secret-file has; several times.")
flags.DEFINE_bool("unpinned-image", False, "Take an --image without a digest, which may change between restarts.")
for _backend in BACKENDS.values():
    _backend.define_launch_flags()


def checked_job(experiment: Experiment, origin: Mapping[str, Any], location: JobLocation, where: Slice) -> Job:
    """Returns the job of an experiment on slices like `where`.

    Args:
      experiment: what to train.
      origin: where its values come from, as `command_line.config_origin` returns it.
      location: the job's backend, name and workdir.
      where: one of the slices.

    Raises:
      UserError: the job cannot run there; the message says why.
    """
    if not location.workdir:
        raise UserError("--workdir is missing: gs://BUCKET/PATH, or a directory for --backend=local")
    backend = location.backend
    if backend.has_large_hosts or LARGE_HOSTS.value:
        where = where.on_large_hosts()
    job = make_job(experiment, origin, where, location.slices, location.workdir, location.name)
    if not backend.runs_here:
        check_pod(job, experiment, origin["config"])
    backend.check(job)
    if not backend.runs_here and not SKIP_PLAN.value:
        check_plan(job, experiment)  # last, because it takes minutes
    return job


def description(job: Job, backend: Backend) -> str:
    """Returns lines for people: what runs, on which slices, and how the backend runs it."""
    return "\n".join([*describe(job), f"backend     {backend.name}: {backend.summary(job)}"])
