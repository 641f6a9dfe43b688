"""Implements the backend `jobset`: runs a job on GKE, as a JobSet (jobset.x-k8s.io/v1alpha2) in a Kueue queue.

Every slice is a Job of the JobSet and every host one of its pods. When a pod ends with one of RESTART_CODES, its Job
fails, and the JobSet restarts all its Jobs. Any other exit code except 0 fails the JobSet. GKE describes the processes
to each other (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_* for several slices); jax.distributed reads that.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from ecdit import __version__
from ecdit.errors import UserError
from launch.commands import run, run_all
from launch.errors import LaunchError
from launch.job import (
    DATA,
    RESTART_CODES,
    Job,
    describe_files,
    describe_folders,
    describe_restarts,
    training_environment,
)
from launch.values import check_characters, check_image, check_secret_names, kubernetes_text

FLAGS: Any = flags.FLAGS  # Any, because absl types every value as optional
ACCELERATORS = {  # the nodes' label cloud.google.com/gke-tpu-accelerator by `Slice.chip`
    "v4": "tpu-v4-podslice",
    "v5p": "tpu-v5p-slice",
    "v5e": "tpu-v5-lite-podslice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
KIND = "jobsets.jobset.x-k8s.io"
NO_IMAGE = f"image.invalid/ecdit:{__version__}"  # a name that no registry can have, for dry runs without --image
# Lifts the limit of locked memory, because chips lock their buffers in memory, and then runs its arguments.
START = ["bash", "-c", 'ulimit -l unlimited && exec "$@"', "ecdit"]
SLICE, CONTAINER = "slice", "train"
DATA_MOUNT = "/data"
MIN_GRACE_SECONDS = 120
SETTLE_SECONDS = 60  # time for the running step and a running save before the last save begins
KEPT_SECONDS = 12 * 3600  # time for which an ended JobSet, its pods and their logs are kept


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a job on GKE."""

    image: str
    namespace: str
    queue: str  # Kueue's LocalQueue
    priority: str  # PriorityClass; "" for none
    service_account: str  # Kubernetes account that may read and write the bucket; "" for the namespace's default
    max_restarts: int
    grace_seconds: int  # time from SIGTERM to SIGKILL; 0 for the time that a checkpoint needs
    write_rate: float  # assumed bytes/s that a host writes to its bucket
    data: str  # gs:// path of prepared data, mounted as the run's data.directory; "" for none
    env: tuple[str, ...]  # NAME=VALUE
    secret_env: tuple[str, ...] = ()  # names of variables, which are keys of `secret`
    secret: str = ""  # name of a Secret of the namespace
    unpinned_image: bool = False
    privileged: bool = False


def grace_seconds(job: Job, options: Options) -> int:
    """Returns how long a pod may take to save after SIGTERM.

    Raises:
      LaunchError: --grace-seconds is too short for a checkpoint.
    """
    needed = math.ceil(job.save_seconds(options.write_rate)) + SETTLE_SECONDS
    if not options.grace_seconds:
        return max(needed, MIN_GRACE_SECONDS)
    if options.grace_seconds < needed:
        raise LaunchError(
            f"--grace-seconds={options.grace_seconds}: must be {needed} or more: a host's "
            f"{job.checkpoint_bytes / job.hosts / 1e9:.1f} GB of a checkpoint at {options.write_rate / 1e9:g} GB/s, "
            f"and {SETTLE_SECONDS} s before it"
        )
    return options.grace_seconds


def manifest(job: Job, options: Options) -> dict[str, Any]:
    """Returns the JobSet as plain data.

    Raises:
      LaunchError: the grace period is too short, or GKE does not join such slices.
    """
    if job.slices > 1 and job.slice.hosts == 1:
        raise LaunchError(
            f"--slices={job.slices}: GKE joins only slices of several hosts, and {job.slice.accelerator} has one; "
            f"take one larger slice"
        )
    hosts = job.slice.hosts
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": options.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": options.queue, "app.kubernetes.io/name": "ecdit"},
            # Each Job gets a node pool of its own, which is a slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {
                    "name": SLICE,
                    "replicas": job.slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,  # a slice cannot compute without one of its hosts
                            "podFailurePolicy": {"rules": [_fail_unless_restarted()]},
                            "template": _pod(job, options),
                        }
                    },
                }
            ],
        },
    }


def _fail_unless_restarted() -> dict[str, Any]:
    codes = {"containerName": CONTAINER, "operator": "NotIn", "values": list(RESTART_CODES)}
    return {"action": "FailJob", "onExitCodes": codes}


def _pod(job: Job, options: Options) -> dict[str, Any]:
    chips = job.slice.chips_per_host
    train_flags, annotations, changes = list(job.train_flags), {}, {}
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # for libtpu and the loader
    if options.data:
        train_flags.append(_data_flag(job))
        changes = {"data.directory": DATA_MOUNT}
        annotations["gke-gcsfuse/volumes"] = "true"
        volumes.append({"name": "data", "csi": bucket_mount(options.data, job.slices > 1)})
        mounts.append({"name": "data", "mountPath": DATA_MOUNT, "readOnly": True})
    container = {
        "name": CONTAINER,
        "image": options.image if options.image == NO_IMAGE else check_image(options.image, options.unpinned_image),
        "command": [kubernetes_text(word) for word in START],
        "args": [
            kubernetes_text(check_characters("argument", word))
            for word in ("python", "-m", "ecdit.train", *train_flags, job.checked_flag(changes))
        ],
        "env": _environment(options),
        "securityContext": _privileges(options),
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "Never",  # the JobSet restarts all hosts together
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[job.slice.chip],
            "cloud.google.com/gke-tpu-topology": job.slice.topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "terminationGracePeriodSeconds": grace_seconds(job, options),
        "containers": [container],
        "volumes": volumes,
    }
    if job.slices > 1:
        # Slices reduce gradients over the data-centre network, which is faster without the pods' own network. The chips
        # of one slice have links of their own.
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    for key, value in (("priorityClassName", options.priority), ("serviceAccountName", options.service_account)):
        if value:
            spec[key] = value
    return {"metadata": {"labels": {"app.kubernetes.io/name": "ecdit"}, "annotations": annotations}, "spec": spec}


def _environment(options: Options) -> list[dict[str, Any]]:
    """Returns the container's variables: public values, and references to keys of a Secret."""
    given = training_environment(options.env)
    names = check_secret_names(options.secret_env, tuple(given))
    if names and not options.secret:
        raise LaunchError("--secret is missing: the Secret of the namespace that has the variables of --secret-env")
    return [
        *({"name": key, "value": kubernetes_text(value)} for key, value in given.items()),
        *({"name": key, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": key}}} for key in names),
    ]


def _privileges(options: Options) -> dict[str, Any]:
    """Returns the container's permissions, which are the least that the chips need.

    From GKE 1.28 on, GKE's device plugin gives the chips to unprivileged containers. The container runs as root, which
    owns the device files, and may raise its limit of locked memory (SYS_RESOURCE).
    """
    if options.privileged:
        return {"privileged": True}
    return {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_RESOURCE"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


# A global shuffle reads single records of some 20 to 60 KB, so the kernel reads no more ahead than that. Metadata of
# files is cached forever, because prepared data never changes.
_MOUNT_OPTIONS = (
    "implicit-dirs",
    "read_ahead_kb=64",
    "metadata-cache:ttl-secs:-1",
    "metadata-cache:stat-cache-max-size-mb:-1",
    "metadata-cache:type-cache-max-size-mb:-1",
)


def bucket_mount(data: str, host_network: bool) -> dict[str, Any]:
    """Returns the ephemeral volume of Cloud Storage FUSE that mounts `data`, gs://BUCKET[/PATH], as a directory.

    Raises:
      LaunchError: `data` is not such a path, or has characters that mount options cannot have.
    """
    matched = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]*)(?:/(.+?))?/?", check_characters("--data", data))
    if not matched:
        raise LaunchError(f"--data={data}: must be gs://BUCKET or gs://BUCKET/PATH")
    bucket, path = matched.groups()
    for letter in set(path or "") & set(",\"'\\ "):
        raise LaunchError(
            f"--data={data}: must have no {letter!r}, which would end the mount option that names the path"
        )
    attributes = {
        "bucketName": bucket,
        "mountOptions": ",".join([*_MOUNT_OPTIONS, *([f"only-dir={path}"] if path else [])]),
    }
    if host_network:  # otherwise pods on the host's network would use the node's service account
        attributes["hostNetworkPodKSA"] = "true"
    return {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}


def needs(job: Job, options: Options) -> list[str]:
    """Returns lines that say where the pods must have the folders and files that they read, and as which account."""
    config = job.checked["config"]
    in_phases = [phase["changes"].get(DATA) for phase in config["phases"]]  # --data does not change these
    mounted = config["data"]["directory"]

    def place(key: str, path: str) -> str:
        if options.data and key == DATA and path == mounted and path not in in_phases:
            return ""  # the mount takes its place
        if options.data and Path(path).is_relative_to(DATA_MOUNT):
            return f"in {options.data}, mounted at {DATA_MOUNT}"
        return "in the image, though launch/Dockerfile copies none"

    lines = describe_folders(job.folders, place) + describe_files(job)
    if options.service_account and job.slices > 1:
        lines.append(
            f"hosts need  the bucket for their node pool's account, not for --service-account="
            f"{options.service_account}: pods of several slices use the hosts' network"
        )
    return lines


def _data_flag(job: Job) -> str:
    flag = "--config.data.directory="
    given = [known for known in job.train_flags if known.startswith(flag)]
    if given:
        raise LaunchError(f"{given[0]}: must not be given with --data, which is mounted at {DATA_MOUNT}")
    return flag + DATA_MOUNT


def text(job: Job, options: Options) -> str:
    """Returns the manifest as YAML, for `launch_command`."""
    head = f"# python -m launch.tpu wrote this. Start it: {' '.join(launch_command('FILE', ''))}\n"
    return head + yaml.safe_dump(manifest(job, options), sort_keys=False, default_flow_style=None, width=120)


def launch_command(file: str, context: str) -> list[str]:
    """Returns the command that creates the JobSet in `file` ("-" for the input). kubectl refuses existing names."""
    return ["kubectl", "create", f"--filename={file}", *_context(context)]


def status_commands(name: str, namespace: str, context: str) -> list[list[str]]:
    """Returns the commands that show the JobSet, its pods, and the last lines of its first process."""
    here = [f"--namespace={namespace}", *_context(context)]
    pods = f"jobset.sigs.k8s.io/jobset-name={name}"
    first = f"{pods},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return [
        ["kubectl", "get", KIND, name, *here],
        ["kubectl", "get", "pods", f"--selector={pods}", "--output=wide", *here],
        ["kubectl", "logs", f"--selector={first}", f"--container={CONTAINER}", "--tail=10", *here],
    ]


def stop_commands(name: str, namespace: str, context: str) -> list[list[str]]:
    """Returns the command that deletes the JobSet and waits: its pods get SIGTERM and the grace period to save."""
    return [["kubectl", "delete", KIND, name, "--cascade=foreground", f"--namespace={namespace}", *_context(context)]]


def _context(context: str) -> list[str]:
    return [f"--context={context}"] if context else []


class JobSet:
    """The backend, which reads `Options` from the flags."""

    name = "jobset"
    file_ending = "yaml"
    has_large_hosts = False
    runs_here = False

    def define_location_flags(self) -> None:
        """Defines the flags that name the cluster and the namespace."""
        flags.DEFINE_string("namespace", "default", "jobset: Kubernetes namespace.")
        flags.DEFINE_string(
            "context", "", "jobset: kubectl's context, which names the cluster; empty: the current one."
        )

    def define_launch_flags(self) -> None:
        """Defines the flags of Kueue, of the grace period and of the mounted data."""
        flags.DEFINE_string("queue", "multislice-queue", "jobset: Kueue's LocalQueue.")
        flags.DEFINE_string("priority", "medium", "jobset: PriorityClass; empty: none.")
        flags.DEFINE_integer("grace-seconds", 0, "jobset: time to save after SIGTERM; 0: what a checkpoint needs.")
        flags.DEFINE_float(
            "write-rate", 0.5, "jobset: assumed GB/s that a host writes to its bucket.", lower_bound=1e-3
        )
        flags.DEFINE_string("data", "", "jobset: gs:// path of prepared data, to mount as data.directory.")
        flags.DEFINE_string("secret", "", "jobset: Secret of the namespace whose keys are the names of --secret-env.")
        flags.DEFINE_bool("privileged", False, "jobset: privileged pods, for node pools older than GKE 1.28.")

    def check(self, job: Job) -> None:
        """Raises LaunchError for slices, a grace period, data or variables that GKE would refuse."""
        manifest(job, _options())

    def text(self, job: Job) -> str:
        """Returns the manifest."""
        return text(job, _options())

    def summary(self, job: Job) -> str:
        """Returns the image, the queue, the restarts and the grace period."""
        options = _options()
        seconds = job.save_seconds(options.write_rate)
        return (
            f"{options.image}, queue {options.queue}; {describe_restarts(options.max_restarts)}; "
            f"{grace_seconds(job, options)} s to save in, which takes {seconds:.0f} s "
            f"at an assumed {options.write_rate / 1e9:g} GB/s a host"
        )

    def needs(self, job: Job) -> list[str]:
        """Returns a line for every place where pods need folders or files: in the bucket of --data, or the image."""
        return needs(job, _options())

    def start(self, job: Job) -> int:
        """Creates the JobSet. Returns kubectl's exit code.

        Raises:
          UserError: there is no image to run.
        """
        if not FLAGS["image"].value:
            raise UserError("--image is missing: build launch/Dockerfile, push it, and name it")
        return run(launch_command("-", FLAGS["context"].value), self.text(job))

    def status(self, name: str, slices: int) -> int:
        """Shows the JobSet, its pods, and the last lines of its first process."""
        return run_all(status_commands(name, FLAGS["namespace"].value, FLAGS["context"].value))

    def stop(self, name: str, slices: int) -> int:
        """Deletes the JobSet, whose pods save in their grace period."""
        return run_all(stop_commands(name, FLAGS["namespace"].value, FLAGS["context"].value))


def _options() -> Options:
    return Options(
        image=FLAGS["image"].value or NO_IMAGE,
        namespace=FLAGS["namespace"].value,
        queue=FLAGS["queue"].value,
        priority=FLAGS["priority"].value,
        service_account=FLAGS["service-account"].value,
        max_restarts=FLAGS["max-restarts"].value,
        grace_seconds=FLAGS["grace-seconds"].value,
        write_rate=FLAGS["write-rate"].value * 1e9,
        data=FLAGS["data"].value,
        env=tuple(FLAGS["env"].value),
        secret_env=tuple(FLAGS["secret-env"].value),
        secret=FLAGS["secret"].value,
        unpinned_image=FLAGS["unpinned-image"].value,
        privileged=FLAGS["privileged"].value,
    )
