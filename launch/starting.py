"""Defines flags, checks and descriptions that `launch.tpu` and `launch.sweep` share."""

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
LARGE_HOSTS = flags.DEFINE_bool("large-hosts", False, "jobset: the node pools have 8 chips of v5e or v6e per host.")
# Several backends read these flags by name.
flags.DEFINE_string("image", "", "Container of launch/Dockerfile; tpu-vm, empty: the code of this checkout.")
flags.DEFINE_string("service-account", "", "Account that may read and write the bucket; empty: the default one.")
flags.DEFINE_integer("max-restarts", 100, f"Restarts after exit codes {SHOWN_CODES}.", lower_bound=1)
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the training processes; may be repeated.")
flags.DEFINE_multi_string("secret-env", [], "NAME of a variable in --secret or --secret-file; may be repeated.")
flags.DEFINE_bool("unpinned-image", False, "Allow an --image without a digest, which may change between restarts.")
for _backend in BACKENDS.values():
    _backend.define_launch_flags()


def checked_job(experiment: Experiment, origin: Mapping[str, Any], location: JobLocation, where: Slice) -> Job:
    """Returns the job of an experiment on slices like `where`.

    Args:
      experiment: the experiment to train.
      origin: its config file and overrides, from `command_line.config_origin`.
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
    """Returns lines that describe the job, its slices and how the backend runs it."""
    return "\n".join([*describe(job), *backend.needs(job), f"backend     {backend.name}: {backend.summary(job)}"])
