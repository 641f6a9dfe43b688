"""Makes the gcloud commands for queued resources and their TPU VMs, and stops jobs on them."""

import shlex
from collections.abc import Sequence

from launch.commands import read, run, run_all
from launch.errors import LaunchError
from launch.worker import DIRECTORY, STOP_COMMAND

GCLOUD = ["gcloud", "compute", "tpus"]
ALPHA = ["gcloud", "alpha", "compute", "tpus"]  # only the alpha commands have --autocheckpoint-enabled


def nodes(name: str, slices: int) -> list[str]:
    """Returns the names of the TPU VMs of a queued resource. Each TPU VM is a slice with all its workers."""
    return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]


def describe_command(name: str, project: str, zone: str) -> list[str]:
    """Returns the command that prints the state of the queued resource."""
    describe = ["queued-resources", "describe", name, "--format=value(state.state)"]
    return [*GCLOUD, *describe, *zone_flags(project, zone)]


def ssh_command(node: str, command: str, project: str, zone: str) -> list[str]:
    """Returns the command that runs a shell command on all workers of a TPU VM."""
    return [
        *GCLOUD,
        "tpu-vm",
        "ssh",
        node,
        "--worker=all",
        f"--command={command}",
        *zone_flags(project, zone),
        "--quiet",
    ]


def copy_command(node: str, files: Sequence[str], project: str, zone: str) -> list[str]:
    """Returns the command that copies files to the home directory of all workers of a TPU VM."""
    return [*GCLOUD, "tpu-vm", "scp", *files, f"{node}:", "--worker=all", *zone_flags(project, zone), "--quiet"]


def status_commands(name: str, slices: int, project: str, zone: str) -> list[list[str]]:
    """Returns the commands that show the state of the queued resource, and the last line of every worker."""
    tail = f'echo "$(hostname): $(tail -n 1 {DIRECTORY}/log)"'
    return [
        describe_command(name, project, zone),
        *(ssh_command(node, tail, project, zone) for node in nodes(name, slices)),
    ]


def stop_commands(name: str, slices: int, project: str, zone: str) -> list[list[str]]:
    """Returns the commands that let every worker save and end, and then, as the last one, release the TPUs."""
    delete = ["queued-resources", "delete", name, "--force", *zone_flags(project, zone), "--quiet"]
    return [*(ssh_command(node, STOP_COMMAND, project, zone) for node in nodes(name, slices)), [*GCLOUD, *delete]]


def stop(name: str, slices: int, project: str, zone: str) -> int:
    """Lets every worker save and end, and then releases the TPUs. Returns the exit code of gcloud.

    Only a queued resource that is ACTIVE has workers that can save. Any other one is released at once.

    Raises:
      LaunchError: some workers could not be told to save. The TPUs are kept, so that nothing is lost.
    """
    code, state = read(describe_command(name, project, zone))
    if code:
        return code  # gcloud has said why
    *saves, delete = stop_commands(name, slices, project, zone)
    if state == "ACTIVE" and run_all(saves):
        place = " ".join([f"--name={name}", *zone_flags(project, zone)])
        raise LaunchError(
            f"--slices={slices}: stopping training failed on {name}, so its TPUs are kept and cost money. If the job "
            f"has another number of slices, stop it with that: python -m launch.stop --backend=tpu-vm {place} "
            f"--slices=N. To release the TPUs although workers may not have saved: {shlex.join(delete)}"
        )
    return run(delete)


def zone_flags(project: str, zone: str) -> list[str]:
    """Returns the flags of the place; none for what gcloud is configured for."""
    return [*([f"--project={project}"] if project else []), *([f"--zone={zone}"] if zone else [])]
