"""Implements the backend `tpu-vm`: runs a job on TPU VMs without GKE, by queued resources.

One bash script, which a dry run writes, does everything: it requests TPUs, waits for them, copies the code (or names a
container), and starts a systemd unit on all workers, which restarts training, also after a reboot (`launch.worker`).
The user's values are sent to the workers encoded. A script that was interrupted continues when it is run again. On TPU
VMs jax.distributed finds the workers of all slices by itself.
"""

import dataclasses
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch.commands import run, run_all
from launch.errors import LaunchError
from launch.job import ROOT, Job, describe_folders, describe_restarts, training_environment
from launch.values import check_characters, check_image, check_option, check_secret_names
from launch.worker import (
    DIRECTORY,
    REFUSE_RUNNING,
    SECRETS,
    STOP_COMMAND,
    UNIT,
    UNIT_TEXT,
    restart_loop,
    start_command,
)

FLAGS: Any = flags.FLAGS  # Any, because absl types every value as optional
GCLOUD = ["gcloud", "compute", "tpus"]
ALPHA = ["gcloud", "alpha", "compute", "tpus"]  # only the alpha commands have --autocheckpoint-enabled
RUNTIMES = {  # the VMs' images by `Slice.chip` (cloud.google.com/tpu/docs/runtimes); TPU7x has no queued resources
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5e": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}
CODE = ("ecdit", "launch", "configs", "setup.py", "pyproject.toml")
LOCK = "launch/requirements.lock"  # packages of workers and of launch/Dockerfile, with hashes
BUILD_LOCK = "launch/build.lock"  # of the package's build, which would otherwise fetch the newest setuptools
UV = "uv==0.13.9"
PYTHON = "3.11"  # the images have an older version
END_STATES = "FAILED|SUSPENDING|SUSPENDED|DELETING"  # states from which a queued resource never becomes active


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a job on TPU VMs; "" leaves a value to gcloud's configuration."""

    project: str
    zone: str
    image: str  # a container to run; "" for the code of this checkout
    runtime_version: str  # image of the VMs; "" for the one in RUNTIMES
    service_account: str
    capacity: str  # on-demand | spot | reserved
    max_restarts: int
    env: tuple[str, ...]  # NAME=VALUE
    secret_env: tuple[str, ...] = ()  # names of variables in `secret_file`
    secret_file: str = ""  # file on this machine of mode 0600 with lines NAME=VALUE
    unpinned_image: bool = False
    autocheckpoint: bool = True  # sends SIGTERM before a maintenance event, if the project may use the alpha API


def check(job: Job) -> None:
    """Raises LaunchError for slices that queued resources do not offer, or without an accelerator name."""
    if job.slice.chip not in RUNTIMES:
        raise LaunchError(
            f"accelerator {job.slice.accelerator}: tpu-vm takes {', '.join(RUNTIMES)}; --backend=jobset takes this one"
        )
    if not job.slice.is_usual:
        raise LaunchError(
            f"accelerator {job.slice.chip}:{job.slice.topology}: tpu-vm takes accelerators by name, and "
            f"{job.slice.accelerator} has another layout; --backend=jobset takes this one"
        )


def check_options(options: Options) -> None:
    """Raises LaunchError for values that Google Cloud or the workers would refuse, before any TPU is requested."""
    for key in ("project", "zone", "runtime_version", "service_account"):
        check_option(key.replace("_", "-"), getattr(options, key))
    check_image(options.image, options.unpinned_image)
    names = check_secret_names(options.secret_env, tuple(training_environment(options.env)))
    if names:
        _check_secret_file(options.secret_file, names)
    missing = [name for name in (*CODE, LOCK, BUILD_LOCK) if not (ROOT / name).exists()]
    if missing and not options.image:
        raise LaunchError(
            f"{ROOT} is no checkout: it has no {', '.join(missing)}. Launch from a checkout (pip install -e), or set "
            f"--image to a container with the code"
        )


def check_folders(job: Job, options: Options) -> None:
    """Raises LaunchError for a folder in the checkout of which the workers would get nothing."""
    for key, paths in job.folders.items():
        for path in paths:
            if not options.image and not Path(path).is_absolute() and "tokenizer" not in key:
                raise LaunchError(
                    f"config.{key}={path}: would be missing on the workers, which get code and small files alone: must "
                    "be an absolute path that every worker has, as of a disk or of a bucket that is mounted there"
                )


def needs(job: Job, options: Options) -> list[str]:
    """Returns lines that say where the workers must have the folders that they read."""

    def place(key: str, path: str) -> str:
        if options.image:
            return "in the image, though launch/Dockerfile copies none"
        return "on every worker, where nothing is mounted or copied to" if Path(path).is_absolute() else ""

    return describe_folders(job.folders, place)


def _check_secret_file(file: str, names: Sequence[str]) -> None:
    if not file:
        raise LaunchError("--secret-file is missing: a file of mode 0600 with lines NAME=VALUE for --secret-env")
    path = Path(check_characters("--secret-file", file))
    try:
        mode, lines = stat.S_IMODE(path.stat().st_mode), path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--secret-file={file}: {error}") from None
    if mode & 0o077:
        raise LaunchError(f"--secret-file={file}: has mode {mode:04o}, others could read it: must be 0600")
    for name in names:
        if sum(line.startswith(f"{name}=") for line in lines) != 1:
            raise LaunchError(f"--secret-file={file}: must have one line {name}=VALUE")


def nodes(name: str, slices: int) -> list[str]:
    """Returns the names of the TPU VMs of a queued resource. Each TPU VM is a slice with all its workers."""
    return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]


def create_command(job: Job, options: Options, autocheckpoint: bool = False) -> list[str]:
    """Returns the command that requests the TPUs; with `autocheckpoint` it uses gcloud's alpha API."""
    count = [f"--node-id={job.name}"]
    if job.slices > 1:
        count = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    capacity = {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}[options.capacity]
    account = [f"--service-account={options.service_account}"] if options.service_account else []
    return [
        *(ALPHA if autocheckpoint else GCLOUD),
        *("queued-resources", "create", job.name),
        f"--accelerator-type={job.slice.accelerator}",
        f"--runtime-version={options.runtime_version or RUNTIMES[job.slice.chip]}",
        *(["--autocheckpoint-enabled"] if autocheckpoint else []),
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
    tail = f'echo "$(hostname): $(tail -n 1 {DIRECTORY}/log)"'
    return [
        describe_command(name, project, zone),
        *(ssh_command(node, tail, project, zone) for node in nodes(name, slices)),
    ]


def stop_commands(name: str, slices: int, project: str, zone: str) -> list[list[str]]:
    """Returns the commands that let every worker save and end, and then release the TPUs."""
    delete = ["queued-resources", "delete", name, "--force", *_zone_flags(project, zone), "--quiet"]
    return [*(ssh_command(node, STOP_COMMAND, project, zone) for node in nodes(name, slices)), [*GCLOUD, *delete]]


def script(job: Job, options: Options) -> str:
    """Returns the bash script that does everything, from this checkout.

    Raises:
      LaunchError: a value cannot be used (see `check_options`).
    """
    check_options(options)
    location = (options.project, options.zone)
    describe = shlex.join(describe_command(job.name, *location))
    loop = restart_loop(
        _train_command(job, options), options.max_restarts, bool(options.secret_env) and not options.image
    )
    lines = [
        "#!/usr/bin/env bash",
        "# python -m launch.tpu wrote this: it does what that does without --dry-run.",
        "set -euo pipefail",
        "umask 077",
        *_secret_check(options),
        f"{describe} > /dev/null 2>&1 || {_create(job, options)}",
        f'while state=$({describe}); [ "$state" != ACTIVE ]; do',
        f'  case "$state" in {END_STATES}) echo "{job.name} is $state: stop it first" >&2; exit 1 ;; esac',
        f'  echo "{job.name} is $state"; sleep 30',
        "done",
        "scratch=$(mktemp -d)",
        "trap 'rm -rf \"$scratch\"' EXIT",
        f'run="$scratch/{DIRECTORY}"',
        'mkdir "$run"',
        "cat > \"$run/run.sh\" <<'END_OF_LOOP'",
        f"{loop}END_OF_LOOP",
        f"cat > \"$run/{UNIT}\" <<'END_OF_UNIT'",
        f"{UNIT_TEXT}END_OF_UNIT",
    ]
    if options.secret_env:
        chosen = "|".join(options.secret_env)
        lines.append(f"grep -E '^({chosen})=' {shlex.quote(options.secret_file)} > \"$run/{SECRETS}\"")
    if not options.image:
        copied = shlex.join(
            ["tar", "-cf", "-", "--dereference", "--exclude=__pycache__", "-C", str(ROOT), "--", *_files(job)]
        )
        lines.append(f'{copied} | tar -xf - -C "$run"')
    lines.append(f'tar -czf "$scratch/{job.name}.tar.gz" -C "$scratch" {DIRECTORY}')
    for node in nodes(job.name, job.slices):
        copy = shlex.join(copy_command(node, ["ARCHIVE"], *location)).replace(
            "ARCHIVE", f'"$scratch/{job.name}.tar.gz"'
        )
        lines += [copy, *(shlex.join(ssh_command(node, step, *location)) for step in _setup(job, options))]
    # Training starts after the setup of all slices, because the processes wait for each other.
    start = start_command(as_root=bool(options.image))
    lines += [shlex.join(ssh_command(node, start, *location)) for node in nodes(job.name, job.slices)]
    return "\n".join([*lines, f'echo "{job.name} runs: python -m launch.status shows it"', ""])


def _create(job: Job, options: Options) -> str:
    """Returns the shell command that requests the TPUs.

    A project that may not use the alpha API gets TPUs without autocheckpoint. Maintenance then ends training without a
    warning, and training resumes from its newest checkpoint.
    """
    plain = shlex.join(create_command(job, options))
    if not options.autocheckpoint:
        return plain
    said = 'echo "not possible with autocheckpoint, so without" >&2'
    return f"{shlex.join(create_command(job, options, autocheckpoint=True))} || {{ {said}; {plain}; }}"


def _secret_check(options: Options) -> list[str]:
    """Returns lines that check the file of secrets before requesting TPUs, because the script may run later."""
    if not options.secret_env:
        return []
    file = shlex.quote(options.secret_file)
    lines = [f'[ -z "$(find -L {file} -perm /077)" ] || {{ echo others can read the file of secrets >&2; exit 1; }}']
    return [
        *lines,
        *(f"grep -q '^{name}=' {file} || {{ echo no {name} in it >&2; exit 1; }}" for name in options.secret_env),
    ]


def _setup(job: Job, options: Options) -> list[str]:
    """Returns shell commands that prepare a worker. The first one fails on a worker on which training runs."""
    unpack = f"{REFUSE_RUNNING}; tar -xzf {job.name}.tar.gz && rm {job.name}.tar.gz"
    if options.image:
        return [unpack, f"sudo docker pull {shlex.quote(options.image)}"]
    install = (
        f"cd {DIRECTORY} && python3 -m pip install --user --quiet {UV} "
        f"&& python3 -m uv venv --allow-existing --python {PYTHON} venv "
        f"&& python3 -m uv pip install --quiet --python venv/bin/python --require-hashes -r {LOCK} -r {BUILD_LOCK} "
        f"&& python3 -m uv pip install --quiet --python venv/bin/python --no-deps --no-build-isolation -e ."
    )
    return [unpack, install]


def _train_command(job: Job, options: Options) -> list[str]:
    pairs = [f"{name}={value}" for name, value in training_environment(options.env).items()]
    train = ["-m", "ecdit.train", *job.train_flags, job.checked_flag()]
    if not options.image:
        return ["env", *pairs, "venv/bin/python", *train]
    given = [argument for pair in pairs for argument in ("--env", pair)]
    secrets = ["--env-file", SECRETS] if options.secret_env else []
    # Like Google's containers for TPU VMs, it gets the host's devices and network. The VM has no other tenant.
    docker = ["docker", "run", "--rm", "--privileged", "--network=host", *given, *secrets, options.image]
    return [*docker, "python", *train]


def _files(job: Job) -> list[str]:
    """Returns the files of the checkout that a worker needs, including the user's own.

    Raises:
      LaunchError: tar would not read a name literally.
    """
    for path in job.files:
        check_characters("file", path)
        if "\\" in path or path.startswith("@"):
            raise LaunchError(
                f"{path}: must have no backslash, and no @ at its beginning: tar would look for another file"
            )
    return [*CODE, *(path for path in job.files if path.split("/")[0] not in CODE)]


def _zone_flags(project: str, zone: str) -> list[str]:
    return [*([f"--project={project}"] if project else []), *([f"--zone={zone}"] if zone else [])]


class TpuVm:
    """The backend, which reads `Options` from the flags."""

    name = "tpu-vm"
    file_ending = "sh"
    has_large_hosts = True
    runs_here = False

    def define_location_flags(self) -> None:
        """Defines the flags that name the project and the zone."""
        flags.DEFINE_string("project", "", "tpu-vm: Google Cloud project; empty: as gcloud is configured.")
        flags.DEFINE_string("zone", "", "tpu-vm: zone, such as us-east5-a; empty: as gcloud is configured.")

    def define_launch_flags(self) -> None:
        """Defines the flags of the TPUs' capacity, the VMs' image, secrets and autocheckpoint."""
        flags.DEFINE_enum("capacity", "on-demand", ["on-demand", "spot", "reserved"], "tpu-vm: kind of capacity.")
        flags.DEFINE_string("runtime-version", "", "tpu-vm: image of the VMs; empty: the usual one.")
        flags.DEFINE_string("secret-file", "", "tpu-vm: file of mode 0600 with lines NAME=VALUE for --secret-env.")
        flags.DEFINE_bool("autocheckpoint", True, "tpu-vm: SIGTERM before maintenance, if gcloud alpha is allowed.")

    def check(self, job: Job) -> None:
        """Raises LaunchError for slices or variables that a queued resource cannot have."""
        check(job)
        check_folders(job, _options())
        script(job, _options())

    def text(self, job: Job) -> str:
        """Returns the script."""
        return script(job, _options())

    def summary(self, job: Job) -> str:
        """Returns the name of the queued resource, the kind of TPUs and the restarts."""
        options = _options()
        return f"queued resource {job.name}, {options.capacity}; {describe_restarts(options.max_restarts)}"

    def needs(self, job: Job) -> list[str]:
        """Returns a line for every place where workers need folders: at absolute paths, or in the image."""
        return needs(job, _options())

    def start(self, job: Job) -> int:
        """Runs the script. Returns its exit code."""
        return run(["bash", "-c", self.text(job)])  # not as bash's input, which ssh would read

    def status(self, name: str, slices: int) -> int:
        """Shows the state of the queued resource, and the last line of every worker."""
        return run_all(status_commands(name, slices, FLAGS["project"].value, FLAGS["zone"].value))

    def stop(self, name: str, slices: int) -> int:
        """Lets every worker save and end, and releases the TPUs."""
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
        secret_env=tuple(FLAGS["secret-env"].value),
        secret_file=FLAGS["secret-file"].value,
        unpinned_image=FLAGS["unpinned-image"].value,
        autocheckpoint=FLAGS["autocheckpoint"].value,
    )
