"""The backends by their flags: checks a job, says what a backend is given, and starts it.

What `launch.tpu` does with one job, and `launch.sweep` with several.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

from ecdit import __version__
from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.topology import Slice
from launch import jobset, local_job, tpu_vm
from launch.check import check_plan, check_pod, make_job
from launch.commands import run
from launch.flags import Place
from launch.job import SHOWN_CODES, Job, describe

NO_IMAGE = f"image.invalid/ecdit:{__version__}"  # a name that no registry can have: of dry runs

IMAGE = flags.DEFINE_string("image", "", "Container of launch/Dockerfile; tpu-vm, empty: the code of this checkout.")
SERVICE_ACCOUNT = flags.DEFINE_string("service-account", "", "May read and write the bucket; empty: the default one.")
MAX_RESTARTS = flags.DEFINE_integer("max-restarts", 100, f"After exit codes {SHOWN_CODES}.", lower_bound=1)
ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for the training processes; several times for several.")
QUEUE = flags.DEFINE_string("queue", "multislice-queue", "jobset: Kueue's LocalQueue.")
PRIORITY = flags.DEFINE_string("priority", "medium", "jobset: PriorityClass; empty: none.")
GRACE = flags.DEFINE_integer("grace-seconds", 0, "jobset: to save in after SIGTERM; 0: what a checkpoint needs.")
WRITE_RATE = flags.DEFINE_float(
    "write-rate", 0.5, "jobset: GB/s that a host writes to its bucket, assumed.", lower_bound=1e-3
)
DATA = flags.DEFINE_string("data", "", "jobset: gs:// path of prepared data, to mount as data.directory.")
SKIP_PLAN = flags.DEFINE_bool("skip-plan", False, "Do not compile the step to see that it fits the chips' memory.")
LARGE_HOSTS = flags.DEFINE_bool("large-hosts", False, "jobset: node pools that have 8 chips of v5e or v6e in one host.")
CAPACITY = flags.DEFINE_enum("capacity", "on-demand", ["on-demand", "spot", "reserved"], "tpu-vm: which TPUs.")
RUNTIME_VERSION = flags.DEFINE_string("runtime-version", "", "tpu-vm: image of the VMs; empty: the usual one.")


def checked_job(experiment: Experiment, origin: Mapping[str, Any], place: Place, where: Slice) -> Job:
    """The job, or a UserError that says why it cannot run there; `origin` is that of `command_line.config_origin`."""
    if not place.workdir:
        raise UserError("--workdir is missing: gs://BUCKET/PATH, or a directory for --backend=local")
    if place.backend == "tpu-vm" or LARGE_HOSTS.value:
        where = where.on_large_hosts()
    job = make_job(experiment, origin, where, place.slices, place.workdir, place.name)
    if place.backend == "local":
        local_job.check(job)
    else:
        check_pod(job, experiment, origin["config"])
        if not SKIP_PLAN.value:
            check_plan(job, experiment)
    return job


def backend_text(job: Job, place: Place) -> str:
    """What the backend is given: a manifest, a script, or a command."""
    if place.backend == "jobset":
        return jobset.text(job, jobset_options(place))
    if place.backend == "tpu-vm":
        tpu_vm.check(job)
        return tpu_vm.script(job, tpu_vm_options(place))
    return local_job.command_line(job)


def backend_summary(job: Job, place: Place) -> str:
    """For people: how the backend runs it."""
    restarts = f"restarts after exit codes {SHOWN_CODES}, at most {MAX_RESTARTS.value} times"
    if place.backend == "jobset":
        options = jobset_options(place)
        grace = jobset.grace_seconds(job, options)
        seconds = f"{job.save_seconds(options.write_rate):.0f} s at an assumed {WRITE_RATE.value:g} GB/s a host"
        return f": {options.image}, queue {QUEUE.value}; {restarts}; {grace} s to save in, which takes {seconds}"
    if place.backend == "tpu-vm":
        return f": queued resource {job.name}, {CAPACITY.value}; {restarts}"
    return f": {job.hosts} processes here, logs in {local_job.LOGS / job.name}"


def description(job: Job, place: Place) -> str:
    """Lines for people: what runs where, and how."""
    return "\n".join([*describe(job), f"backend     {place.backend}{backend_summary(job, place)}"])


def jobset_options(place: Place) -> jobset.Options:
    """The flags of the backend `jobset`."""
    return jobset.Options(
        image=IMAGE.value or NO_IMAGE,
        namespace=place.namespace,
        queue=QUEUE.value,
        priority=PRIORITY.value,
        service_account=SERVICE_ACCOUNT.value,
        max_restarts=MAX_RESTARTS.value,
        grace_seconds=GRACE.value,
        write_rate=WRITE_RATE.value * 1e9,
        data=DATA.value,
        env=tuple(ENV.value),
    )


def tpu_vm_options(place: Place) -> tpu_vm.Options:
    """The flags of the backend `tpu-vm`."""
    return tpu_vm.Options(
        project=place.project,
        zone=place.zone,
        image=IMAGE.value,
        runtime_version=RUNTIME_VERSION.value,
        service_account=SERVICE_ACCOUNT.value,
        capacity=CAPACITY.value,
        max_restarts=MAX_RESTARTS.value,
        env=tuple(ENV.value),
    )


def start(job: Job, place: Place, text: str) -> int:
    """Does what `text` says. Returns its exit code.

    Raises:
      UserError: it lacks what a dry run does not need.
    """
    if place.backend == "local":
        return local_job.run(job)
    if place.backend == "tpu-vm":
        return run(["bash", "-c", text])  # not as its input, which ssh would read
    if not IMAGE.value:
        raise UserError("--image is missing: build launch/Dockerfile, push it, and name it")
    return run(jobset.launch_command("-", place.context), text)
