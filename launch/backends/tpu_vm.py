"""Implements the backend `tpu-vm`: runs a job on TPU VMs without GKE, by queued resources.

One bash script, which a dry run writes, does everything: it requests TPUs, waits for them, copies the code (or names a
container), and starts a systemd unit on all workers, which restarts training, also after a reboot (`launch.worker`).
The user's values are sent to the workers encoded. A script that was interrupted continues when it is run again. On TPU
VMs jax.distributed finds the workers of all slices by itself.
"""

import dataclasses
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch.commands import run, run_all
from launch.errors import LaunchError
from launch.job import (
    CODE,
    ROOT,
    Job,
    describe_files,
    describe_folders,
    describe_restarts,
    own_files,
    training_environment,
)
from launch.queued_resources import (
    ALPHA,
    GCLOUD,
    copy_command,
    describe_command,
    nodes,
    ssh_command,
    status_commands,
    stop,
    zone_flags,
)
from launch.values import check_characters, check_image, check_option, check_secret_names
from launch.worker import (
    DIRECTORY,
    REFUSE_RUNNING,
    SECRETS,
    UNIT,
    UNIT_TEXT,
    restart_loop,
    start_command,
)

FLAGS: Any = flags.FLAGS  # Any, because absl types every value as optional
RUNTIMES = {  # the VMs' images by `Slice.chip` (cloud.google.com/tpu/docs/runtimes); TPU7x has no queued resources
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5e": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}
LOCK = "launch/requirements.lock"  # packages of workers and of launch/Dockerfile, with hashes
BUILD_LOCK = "launch/build.lock"  # of the package's build, which would otherwise fetch the newest setuptools
UV = "uv==0.13.9"
PYTHON = "3.11"  # the images have an older version
MAX_FAILURES = 10  # of describing a queued resource, in a row, after which the script stops waiting for it
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
    """Returns lines that say where the workers must have the folders and files that they read."""

    def place(key: str, path: str) -> str:
        if options.image:
            return "in the image, though launch/Dockerfile copies none"
        return "on every worker, where nothing is mounted or copied to" if Path(path).is_absolute() else ""

    return describe_folders(job.folders, place) + (describe_files(job) if options.image else [])


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
        *(*count, *capacity, *account, *zone_flags(options.project, options.zone), "--quiet"),
    ]


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
        *_wait(job.name, describe),
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


def _wait(name: str, describe: str) -> list[str]:
    """Returns lines that wait until the queued resource is active, and end the script if it never will be."""
    return [
        "failures=0",
        "while true; do",
        f"  if state=$({describe}); then failures=0; else state=unknown; failures=$(( failures + 1 )); fi",
        '  case "$state" in',
        "    ACTIVE) break ;;",
        f'    {END_STATES}) echo "{name} is $state: stop it first" >&2; exit 1 ;;',
        "  esac",
        f"  if (( failures == {MAX_FAILURES} )); then",
        f'    echo "{name}: gcloud could not describe it {MAX_FAILURES} times in a row, see its errors above: log in '
        'again, or if it was deleted, launch it again" >&2',
        "    exit 1",
        "  fi",
        f'  echo "{name} is $state"; sleep 30',
        "done",
    ]


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
        return [unpack, f"{_registry_login(options.image)}sudo docker pull {shlex.quote(options.image)}"]
    install = (
        f"cd {DIRECTORY} && python3 -m pip install --user --quiet {UV} "
        f"&& python3 -m uv venv --allow-existing --python {PYTHON} venv "
        f"&& python3 -m uv pip install --quiet --python venv/bin/python --require-hashes -r {LOCK} -r {BUILD_LOCK} "
        f"&& python3 -m uv pip install --quiet --python venv/bin/python --no-deps --no-build-isolation -e ."
    )
    return [unpack, install]


def _registry_login(image: str) -> str:
    """Returns the shell command, before others, with which root's docker uses the VM's account at Google's registries.

    Other registries get no such credentials: an image from there must be public.
    """
    host = image.partition("/")[0]
    if not re.fullmatch(r"[a-z0-9-]+-docker\.pkg\.dev|([a-z]+\.)?gcr\.io", host):
        return ""
    return f"sudo gcloud auth configure-docker {host} --quiet && "


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
    return [*CODE, *own_files(job)]


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
        """Returns a line for every place where workers need folders or files: at absolute paths, or in the image."""
        return needs(job, _options())

    def start(self, job: Job) -> int:
        """Runs the script. Returns its exit code."""
        return run(["bash", "-c", self.text(job)])  # not as bash's input, which ssh would read

    def status(self, name: str, slices: int) -> int:
        """Shows the state of the queued resource, and the last line of every worker."""
        return run_all(status_commands(name, slices, FLAGS["project"].value, FLAGS["zone"].value))

    def stop(self, name: str, slices: int) -> int:
        """Lets every worker save and end, and releases the TPUs."""
        return stop(name, slices, FLAGS["project"].value, FLAGS["zone"].value)


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
