"""Runs a job on GKE, as a JobSet (jobset.x-k8s.io/v1alpha2) in a Kueue queue: the manifest, and the commands around it.

Every slice is a Job of the JobSet and every host one of its pods. When a pod ends with one of RESTART_CODES its Job
fails, and the JobSet starts all its Jobs again; any other code but 0 fails the JobSet. GKE itself tells the processes
of each other (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_* of several slices), which jax.distributed reads.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.job import RESTART_CODES, Job, LaunchError

ACCELERATORS = {  # by `Slice.chip`: the nodes' label cloud.google.com/gke-tpu-accelerator
    "v4": "tpu-v4-podslice",
    "v5p": "tpu-v5p-slice",
    "v5e": "tpu-v5-lite-podslice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
KIND = "jobsets.jobset.x-k8s.io"
SLICE, CONTAINER = "slice", "train"
DATA_MOUNT = "/data"
MIN_GRACE_SECONDS = 120
SETTLE_SECONDS = 60  # for the step that runs, and a save that is under way, before the last save begins
KEPT_SECONDS = 12 * 3600  # of an ended JobSet with its pods and their logs


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job runs on GKE."""

    image: str
    namespace: str
    queue: str  # Kueue's LocalQueue
    priority: str  # PriorityClass; "" for none
    service_account: str  # of Kubernetes, allowed to read and write the bucket; "" for the namespace's default
    max_restarts: int
    grace_seconds: int  # from SIGTERM to SIGKILL; 0 for what a checkpoint needs
    write_rate: float  # bytes a second that a host writes to its bucket, assumed
    data: str  # gs:// path of prepared data, mounted as the run's data.directory; "" for none
    env: tuple[str, ...]  # NAME=VALUE


def grace_seconds(job: Job, options: Options) -> int:
    """The time that a pod is given to save.

    Raises:
      LaunchError: the one asked for is too short for a checkpoint.
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
    """The JobSet as plain data.

    Raises:
      LaunchError: the grace period is too short, or GKE has no such slices.
    """
    if job.slices > 1 and job.slice.hosts == 1:
        raise LaunchError(
            f"--slices={job.slices}: GKE joins slices of several hosts only, and {job.slice.accelerator} has one; "
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
            # One Job to a node pool: a node pool is a slice.
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
                            "backoffLimit": 0,  # without one of its hosts a slice computes nothing
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
    train_flags, annotations = list(job.train_flags), {}
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # libtpu's and the loader's
    if options.data:
        train_flags.append(_data_flag(job))
        annotations["gke-gcsfuse/volumes"] = "true"
        volumes.append({"name": "data", "csi": bucket_mount(options.data)})
        mounts.append({"name": "data", "mountPath": DATA_MOUNT, "readOnly": True})
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "-m", "ecdit.train", *train_flags],
        "env": environment(options.env),
        "securityContext": {"privileged": True},  # the chips are devices of the host
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
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": grace_seconds(job, options),
        "containers": [container],
        "volumes": volumes,
    }
    for key, value in (("priorityClassName", options.priority), ("serviceAccountName", options.service_account)):
        if value:
            spec[key] = value
    return {"metadata": {"labels": {"app.kubernetes.io/name": "ecdit"}, "annotations": annotations}, "spec": spec}


def environment(extra: Sequence[str]) -> list[dict[str, str]]:
    """Variables of the training process: the fixed ones, then `extra`, each NAME=VALUE.

    Raises:
      LaunchError: one of `extra` is not of that form.
    """
    fixed = {
        "JAX_PLATFORMS": "tpu,cpu",  # said, it is an error where the TPU does not start; unsaid, JAX would use the CPU
        "PYTHONUNBUFFERED": "1",
    }
    for pair in extra:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair, re.DOTALL):
            raise LaunchError(f"--env={pair}: must be NAME=VALUE")
    return [{"name": key, "value": value} for key, value in (fixed | dict(p.split("=", 1) for p in extra)).items()]


def bucket_mount(data: str) -> dict[str, Any]:
    """The ephemeral volume of Cloud Storage FUSE that shows `data`, gs://BUCKET[/PATH], as a directory.

    Raises:
      LaunchError: `data` is no such path.
    """
    matched = re.fullmatch(r"gs://([^/]+)(?:/(.+?))?/?", data)
    if not matched:
        raise LaunchError(f"--data={data}: must be gs://BUCKET or gs://BUCKET/PATH")
    bucket, path = matched.groups()
    return {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {
            "bucketName": bucket,
            "mountOptions": ",".join(["implicit-dirs", *([f"only-dir={path}"] if path else [])]),
            "hostNetworkPodKSA": "true",  # pods on the host's network else mount as the node's service account
        },
    }


def _data_flag(job: Job) -> str:
    flag = "--config.data.directory="
    given = [known for known in job.train_flags if known.startswith(flag)]
    if given:
        raise LaunchError(f"{given[0]}: must not be given with --data, which is mounted at {DATA_MOUNT}")
    return flag + DATA_MOUNT


def text(job: Job, options: Options) -> str:
    """The manifest as YAML, which is what `launch_command` reads."""
    head = f"# python -m launch.tpu wrote this. Start it: {' '.join(launch_command('FILE', ''))}\n"
    return head + yaml.safe_dump(manifest(job, options), sort_keys=False, default_flow_style=None, width=120)


def launch_command(file: str, context: str) -> list[str]:
    """Creates what `file` ("-": the input) says; kubectl refuses it where a JobSet of that name is."""
    return ["kubectl", "create", f"--filename={file}", *_context(context)]


def status_commands(name: str, namespace: str, context: str) -> list[list[str]]:
    """Shows the JobSet, its pods, and what its first process printed last."""
    here = [f"--namespace={namespace}", *_context(context)]
    pods = f"jobset.sigs.k8s.io/jobset-name={name}"
    first = f"{pods},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return [
        ["kubectl", "get", KIND, name, *here],
        ["kubectl", "get", "pods", f"--selector={pods}", "--output=wide", *here],
        ["kubectl", "logs", f"--selector={first}", f"--container={CONTAINER}", "--tail=10", *here],
    ]


def stop_commands(name: str, namespace: str, context: str) -> list[list[str]]:
    """Deletes the JobSet and waits: its pods get SIGTERM and the grace period to save in."""
    return [["kubectl", "delete", KIND, name, "--cascade=foreground", f"--namespace={namespace}", *_context(context)]]


def _context(context: str) -> list[str]:
    return [f"--context={context}"] if context else []
