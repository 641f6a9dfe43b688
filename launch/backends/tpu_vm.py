"""The backend `tpu-vm`: runs a job on TPU VMs without GKE, by queued resources.

One bash script does everything, the same that a dry run writes: it asks for the TPUs, waits for them, copies the code
(or names a container), and starts a loop on all workers, detached from the connection, which restarts the training.
If the script is cut off, run it again: it goes on from there. On TPU VMs jax.distributed finds the workers of all
slices by itself.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch.commands import run, run_all
from launch.job import RESTART_CODES, ROOT, Job, LaunchError, describe_restarts, training_environment

FLAGS: Any = flags.FLAGS  # absl types every value as perhaps None
GCLOUD = ["gcloud", "compute", "tpus"]
RUNTIMES = {  # by `Slice.chip`: the VMs' images, cloud.google.com/tpu/docs/runtimes; TPU7x has no queued resources
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5e": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}
CODE = ("ecdit", "launch", "configs", "setup.py", "pyproject.toml")
EXTRAS = "tpu,gcs,wandb"  # of setup.py, as in launch/Dockerfile
PYTHON = "3.11"  # the images have an older one
HOME = "ecdit-run"  # on a worker, in its home directory
RESTART_PAUSE_SECONDS = 10  # for the other hosts to end as well
END_STATES = "FAILED|SUSPENDING|SUSPENDED|DELETING"  # of a queued resource from which none becomes active


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job runs on TPU VMs; "" leaves a value to the configuration of gcloud."""

    project: str
    zone: str
    image: str  # a container to run; "" for the code of this checkout
    runtime_version: str  # of the VMs; "" for the usual one
    service_account: str
    capacity: str  # on-demand | spot | reserved
    max_restarts: int
    env: tuple[str, ...]  # NAME=VALUE


def check(job: Job) -> None:
    """Raises LaunchError for slices that queued resources do not offer, or that no accelerator's name means."""
    if job.slice.chip not in RUNTIMES:
        raise LaunchError(
            f"accelerator {job.slice.accelerator}: tpu-vm takes {', '.join(RUNTIMES)}; --backend=jobset takes this one"
        )
    if not job.slice.is_usual:
        raise LaunchError(
            f"accelerator {job.slice.chip}:{job.slice.topology}: tpu-vm takes accelerators by name, and "
            f"{job.slice.accelerator} has another layout; --backend=jobset takes this one"
        )


def nodes(name: str, slices: int) -> list[str]:
    """Returns the names of the TPU VMs of a queued resource: each is a slice with all its workers."""
    return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]


def create_command(job: Job, options: Options) -> list[str]:
    """Returns the command that asks for the TPUs."""
    count = [f"--node-id={job.name}"]
    if job.slices > 1:
        count = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    capacity = {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}[options.capacity]
    account = [f"--service-account={options.service_account}"] if options.service_account else []
    return [
        *GCLOUD,
        *("queued-resources", "create", job.name),
        f"--accelerator-type={job.slice.accelerator}",
        f"--runtime-version={options.runtime_version or RUNTIMES[job.slice.chip]}",
        *(*count, *capacity, *account, *_zone_flags(options.project, options.zone), "--quiet"),
    ]


def describe_command(name: str, project: str, zone: str) -> list[str]:
    """Returns the command that prints the state of the queued resource."""
    describe = ["queued-resources", "describe", name, "--format=value(state.state)"]
    return [*GCLOUD, *describe, *_zone_flags(project, zone)]


def ssh_command(node: str, command: str, project: str, zone: str) -> list[str]:
    """Returns the command that runs a shell command on all workers of a TPU VM."""
    return [
        *GCLOUD,
        "tpu-vm",
        "ssh",
        node,
        "--worker=all",
        f"--command={command}",
        *_zone_flags(project, zone),
        "--quiet",
    ]


def copy_command(node: str, files: Sequence[str], project: str, zone: str) -> list[str]:
    """Returns the command that copies files to the home directory of all workers of a TPU VM."""
    return [*GCLOUD, "tpu-vm", "scp", *files, f"{node}:", "--worker=all", *_zone_flags(project, zone), "--quiet"]


def status_commands(name: str, slices: int, project: str, zone: str) -> list[list[str]]:
    """Returns the commands that show the state of the queued resource, and the last line of every worker."""
    tail = f'echo "$(hostname): $(tail -n 1 {HOME}/log)"'
    return [
        describe_command(name, project, zone),
        *(ssh_command(node, tail, project, zone) for node in nodes(name, slices)),
    ]


def stop_commands(name: str, slices: int, project: str, zone: str) -> list[list[str]]:
    """Returns the commands that let every worker save and end, and then give the TPUs back."""
    end = f"cd {HOME} && kill -TERM $(cat pid) && while kill -0 $(cat pid) 2>/dev/null; do sleep 1; done"
    delete = ["queued-resources", "delete", name, "--force", *_zone_flags(project, zone), "--quiet"]
    return [*(ssh_command(node, end, project, zone) for node in nodes(name, slices)), [*GCLOUD, *delete]]


def restart_loop(job: Job, options: Options) -> str:
    """Returns the bash script of a worker, which runs training again after each of RESTART_CODES, until SIGTERM."""
    codes = " || ".join(f"(code >= {first} && code <= {last})" for first, last in _ranges(RESTART_CODES))
    return f"""#!/usr/bin/env bash
# Trains on this worker. SIGTERM is passed on, so that training saves, and ends the loop.
echo $$ > pid
stopped=0 restarts=0 child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
while (( ! stopped )); do
  {_train_command(job, options)} &
  child=$!
  wait "$child"; code=$?
  # SIGTERM interrupts wait: the child is still saving.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  if (( stopped )); then echo "stopped, exit code $code"; exit "$code"; fi
  if ! (( {codes} )) || (( restarts >= {options.max_restarts} )); then echo "ended, exit code $code"; exit "$code"; fi
  restarts=$(( restarts + 1 ))
  echo "exit code $code: restart $restarts of at most {options.max_restarts}"
  sleep {RESTART_PAUSE_SECONDS}
done
"""


def script(job: Job, options: Options) -> str:
    """Returns the bash script that does everything, from this checkout."""
    location = (options.project, options.zone)
    create, describe = (shlex.join(c) for c in (create_command(job, options), describe_command(job.name, *location)))
    lines = [
        "#!/usr/bin/env bash",
        "# python -m launch.tpu wrote this: it does what that does without --dry-run.",
        "set -euo pipefail",
        f"{describe} > /dev/null 2>&1 || {create}",
        f'while state=$({describe}); [ "$state" != ACTIVE ]; do',
        f'  case "$state" in {END_STATES}) echo "{job.name} is $state: stop it first" >&2; exit 1 ;; esac',
        f'  echo "{job.name} is $state"; sleep 30',
        "done",
        "scratch=$(mktemp -d)",
        "trap 'rm -rf \"$scratch\"' EXIT",
        "cat > \"$scratch/run.sh\" <<'END_OF_LOOP'",
        f"{restart_loop(job, options)}END_OF_LOOP",
        f'mkdir "$scratch/{HOME}" && mv "$scratch/run.sh" "$scratch/{HOME}"',
    ]
    if not options.image:
        copied = shlex.join(["tar", "-cf", "-", "--exclude=__pycache__", "-C", str(ROOT), *_files(job)])
        lines.append(f'{copied} | tar -xf - -C "$scratch/{HOME}"')
    lines.append(f'tar -czf "$scratch/{job.name}.tar.gz" -C "$scratch" {HOME}')
    for node in nodes(job.name, job.slices):
        copy = shlex.join(copy_command(node, ["ARCHIVE"], *location)).replace(
            "ARCHIVE", f'"$scratch/{job.name}.tar.gz"'
        )
        lines += [copy, *(shlex.join(ssh_command(node, step, *location)) for step in _setup(job, options))]
    # Only now, for all slices: the processes wait for each other.
    lines += [shlex.join(ssh_command(node, _start(), *location)) for node in nodes(job.name, job.slices)]
    return "\n".join([*lines, f'echo "{job.name} runs: python -m launch.status shows it"', ""])


def _setup(job: Job, options: Options) -> list[str]:
    """Returns shell commands that prepare a worker. The first refuses a worker on which training runs."""
    alive = f"[ -e {HOME}/pid ] && kill -0 $(cat {HOME}/pid) 2>/dev/null"
    unpack = f"if {alive}; then echo training runs already; exit 1; fi; tar -xzf {job.name}.tar.gz"
    if options.image:
        return [unpack, f"sudo docker pull {shlex.quote(options.image)}"]
    install = (
        f"cd {HOME} && python3 -m pip install --user --quiet uv "
        f"&& python3 -m uv venv --allow-existing --python {PYTHON} venv "
        f"&& python3 -m uv pip install --quiet --python venv/bin/python -e '.[{EXTRAS}]'"
    )
    return [unpack, install]


def _start() -> str:
    return f"cd {HOME} && (nohup setsid bash run.sh > log 2>&1 < /dev/null &)"


def _train_command(job: Job, options: Options) -> str:
    pairs = [f"{name}={value}" for name, value in training_environment(options.env).items()]
    train = ["-m", "ecdit.train", *job.train_flags]
    if not options.image:
        return shlex.join(["env", *pairs, "venv/bin/python", *train])
    given = [argument for pair in pairs for argument in ("--env", pair)]
    docker = ["sudo", "docker", "run", "--rm", "--privileged", "--network=host", *given, options.image]
    return shlex.join([*docker, "python", *train])


def _files(job: Job) -> list[str]:
    """Returns the files of the checkout that a worker needs, the user's own included."""
    return [*CODE, *(path for path in job.files if path.split("/")[0] not in CODE)]


def _ranges(codes: Sequence[int]) -> list[tuple[int, int]]:
    """Returns ascending codes as ranges, (first, last)."""
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges


def _zone_flags(project: str, zone: str) -> list[str]:
    return [*([f"--project={project}"] if project else []), *([f"--zone={zone}"] if zone else [])]


class TpuVm:
    """The backend, which takes the options above from the flags."""

    name = "tpu-vm"
    file_ending = "sh"
    has_large_hosts = True
    runs_here = False

    def define_location_flags(self) -> None:
        """Defines the flags that name the project and the zone."""
        flags.DEFINE_string("project", "", "tpu-vm: Google Cloud's; empty: as gcloud is configured.")
        flags.DEFINE_string("zone", "", "tpu-vm: such as us-east5-a; empty: as gcloud is configured.")

    def define_launch_flags(self) -> None:
        """Defines the flags that say which TPUs, and with which image of the VMs."""
        flags.DEFINE_enum("capacity", "on-demand", ["on-demand", "spot", "reserved"], "tpu-vm: which TPUs.")
        flags.DEFINE_string("runtime-version", "", "tpu-vm: image of the VMs; empty: the usual one.")

    def check(self, job: Job) -> None:
        """Raises LaunchError for slices or variables that a queued resource cannot have."""
        check(job)
        script(job, _options())

    def text(self, job: Job) -> str:
        """Returns the script."""
        return script(job, _options())

    def summary(self, job: Job) -> str:
        """Returns the name of the queued resource, the kind of TPUs and the restarts."""
        options = _options()
        return f"queued resource {job.name}, {options.capacity}; {describe_restarts(options.max_restarts)}"

    def start(self, job: Job) -> int:
        """Runs the script. Returns its exit code."""
        return run(["bash", "-c", self.text(job)])  # not as the input of bash, which ssh would read

    def status(self, name: str, slices: int) -> int:
        """Shows the state of the queued resource, and the last line of every worker."""
        return run_all(status_commands(name, slices, FLAGS["project"].value, FLAGS["zone"].value))

    def stop(self, name: str, slices: int) -> int:
        """Lets every worker save and end, and gives the TPUs back."""
        return run_all(stop_commands(name, slices, FLAGS["project"].value, FLAGS["zone"].value))


def _options() -> Options:
    return Options(
        project=FLAGS["project"].value,
        zone=FLAGS["zone"].value,
        image=FLAGS["image"].value,
        runtime_version=FLAGS["runtime-version"].value,
        service_account=FLAGS["service-account"].value,
        capacity=FLAGS["capacity"].value,
        max_restarts=FLAGS["max-restarts"].value,
        env=tuple(FLAGS["env"].value),
    )
