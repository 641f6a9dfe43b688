"""Checks if this machine can train: looks at what a run needs, and leaves nothing behind.

Each check has a time limit, as devices and buckets that cannot be reached may never answer.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax

from ecdit.checkpoints.restore import checkpoint_directory, state_parts
from ecdit.checkpoints.resume import half_written
from ecdit.data.generated import GENERATED
from ecdit.data.manifest import task_directory
from ecdit.data.prepared import describe, open_prepared
from ecdit.errors import UserError
from ecdit.experiment import Experiment, check_mesh
from ecdit.files import is_remote
from ecdit.partitioning import MeshConfig, abstract_mesh, devices_text
from ecdit.storage import as_path, check_workdir, children, reading, write_time
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, state_shardings

# Oldest and newest versions with which tests have run; docs/versions.md says which tests.
TESTED = {
    "python": ("3.11", "3.13"),
    "jax": ("0.10.2", "0.12.0.1"),
    "flax": ("0.12.8", "0.12.12"),
    "optax": ("0.2.8", "0.2.8"),
    "orbax-checkpoint": ("0.12.8", "0.12.8"),
    "grain": ("0.2.18", "0.2.18"),
}
CHECK_SECONDS = 60.0
MAX_SKEW_SECONDS = 60.0
_THREAD = "ecdit-check"

Verdict = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check. With `fail` a run cannot work; with `warn` it may not."""

    verdict: Verdict
    text: str  # says what to do, unless the verdict is ok
    subject: str

    def line(self) -> str:
        """Returns the finding as one line for people."""
        return f"{self.verdict:<4}  {self.subject}: {' '.join(self.text.split())}"


Found = tuple[Verdict, str]


def diagnose(experiment: Experiment | None, workdir: Path | None, seconds: float = CHECK_SECONDS) -> Iterator[Finding]:
    """Checks this machine for a run, one subject after the other.

    Args:
      experiment: the run's; None to check what does not depend on it.
      workdir: the run's, likewise.
      seconds: that a check may take; one that takes longer has failed, and its thread is left behind.
    """
    checks: dict[str, Callable[[], Found]] = {
        "devices": lambda: devices(experiment),
        "versions": versions,
        "data": lambda: data(experiment),
        "weights": lambda: weights(experiment, workdir),
        "disk": lambda: disk(experiment, workdir),
        "bucket": lambda: bucket(workdir),
        "clock": lambda: clock(workdir),
    }
    for subject, check in checks.items():
        yield Finding(*_within(seconds, check), subject)


def is_left_behind() -> bool:
    """Returns True if a check still runs after its time. Then end the process without waiting for its threads."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def devices(experiment: Experiment | None) -> Found:
    """Names the devices that JAX finds, and checks that the config's mesh and batch divide over them."""
    found = jax.devices()
    text = devices_text(found)
    wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # jax adds options at run time
    if found[0].platform == "cpu" and importlib.util.find_spec("libtpu") and not wanted:
        return (
            "warn",
            f"{text}, though libtpu is installed: without a TPU set JAX_PLATFORMS=cpu, with one see who holds it",
        )
    if experiment is None:
        return "ok", text
    if experiment.runtime.distributed:
        return "ok", f"{text} on this host; the mesh is over those of all hosts (runtime.distributed) and not checked"
    check_mesh(experiment, abstract_mesh(experiment.mesh, len(found)))
    return "ok", f"{text}, over which mesh and batch divide"


def versions() -> Found:
    """Compares the versions of Python, and of the libraries that decide what a step computes, with the tested ones."""
    found = {"python": platform.python_version()}
    for name in set(TESTED) - {"python"}:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "fail", f"{name} is not installed: pip install -e ."
    return compare_versions(found)


def compare_versions(found: Mapping[str, str]) -> Found:
    """Compares versions by name with the tested ones, and warns of those that are older or newer."""
    odd = []
    for name, (oldest, newest) in TESTED.items():
        parts = oldest.count(".") + 1 if name == "python" else None  # any 3.13 counts as tested
        if _numbers(found[name])[:parts] < _numbers(oldest):
            odd.append(f"{name} {found[name]} is older than {oldest}")
        elif _numbers(found[name])[:parts] > _numbers(newest):
            odd.append(f"{name} {found[name]} is newer than {newest}")
    if odd:
        return (
            "warn",
            f"{', '.join(odd)}, and the tests have not run with it (docs/versions.md): try a short run first",
        )
    return "ok", ", ".join(f"{name} {found[name]}" for name in TESTED)


def data(experiment: Experiment | None) -> Found:
    """Checks that the data of every phase is prepared and whole, or can be prepared here."""
    if experiment is None:
        return "ok", "not checked: it needs --config"
    configs = [phase.experiment.data for phase in experiment.resolved_phases()]
    told = []
    for config in (one for n, one in enumerate(configs) if one not in configs[:n]):
        directory = task_directory(config)
        if directory.exists():
            told.append(f"{directory}: {describe(open_prepared(config))}")
            continue
        needed = () if config.task in GENERATED and not config.module else ("seqio", "tensorflow")
        missing = [name for name in needed if not importlib.util.find_spec(name)]
        if missing:
            what = f"{directory} is not prepared, and preparing it needs {' and '.join(missing)}"
            extras = "pip install -e '.[data]' ('.[emoji]' for the emoji)"
            return "fail", f"{what}: {extras}, or set data.directory to where it is prepared"
        told.append(f"{directory} is not prepared yet, which the run does first")
    return "ok", "; ".join(told)


def weights(experiment: Experiment | None, workdir: Path | None) -> Found:
    """Names the weights that a run would start from: its newest checkpoint's, another run's, or drawn ones."""
    if workdir is not None and (steps := _finished_steps(workdir)):
        return "ok", f"the run goes on from step {max(steps)} of {workdir}"
    if experiment is None:
        return "ok", "not checked: a run without checkpoints needs --config"
    if source := experiment.checkpoint.init_from:
        if steps := _finished_steps(as_path(source, "config.checkpoint.init_from")):
            return "ok", f"the run starts from the EMA weights of step {max(steps)} of {source}"
        return (
            "fail",
            f"config.checkpoint.init_from = {source!r} has no finished checkpoint: name a workdir that has one",
        )
    if experiment.text.public:
        return "ok", f"the run draws them but the text encoder's, of {' and '.join(map(str, experiment.text.folders))}"
    if experiment.text.frozen:
        found, what = ("warn", "allows it") if experiment.text.frozen_random_ok else ("fail", "does not allow it")
        return (
            found,
            f"the text tower is frozen as it is drawn, and text.frozen_random_ok {what}: name a folder in text.weights "
            "or a run with a trained one in checkpoint.init_from",
        )
    return "ok", "the run draws them"


def disk(experiment: Experiment | None, workdir: Path | None) -> Found:
    """Checks that the disks can be written, and have room for the checkpoints that are kept and the next one."""
    places = [Path() if workdir is None else workdir]
    if experiment is not None:
        prepared = (task_directory(phase.experiment.data) for phase in experiment.resolved_phases())
        places += [directory for directory in prepared if not directory.exists()]
    told, kept_in = [], places[0]
    for place in dict.fromkeys(_existing(place) for place in places if not is_remote(place)):
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"to be deleted")
        free = shutil.disk_usage(place).free
        told.append(f"{free / 1e9:.1f} GB free in {place.absolute()}")
        if experiment is None or is_remote(kept_in) or place != _existing(kept_in):
            continue
        needed = state_bytes(experiment) * (experiment.checkpoint.keep + 1)
        if free < needed:
            what = f"{experiment.checkpoint.keep} checkpoints and the next one take {needed / 1e9:.1f} GB"
            return "fail", f"{told[-1]}, but {what}: make room, or lower config.checkpoint.keep"
        told[-1] += f", {needed / 1e9:.1f} GB needed for checkpoints"
    return "ok", "; ".join(told) or "none is written"


def bucket(workdir: Path | None) -> Found:
    """Checks that this process may list, read, write and delete in the workdir's bucket."""
    if workdir is None or not is_remote(workdir):
        return "ok", "none: the workdir is on a disk" if workdir else "not checked: it needs --workdir=gs://..."
    try:
        check_workdir(workdir)
    except UserError as error:
        return "fail", f"{error}. Give this account the role roles/storage.objectUser of the bucket"
    return "ok", f"{workdir} can be listed, read, written and deleted from"


def clock(workdir: Path | None) -> Found:
    """Compares this machine's clock with that of the bucket, or of the disk, which may be another machine's."""
    now = time.time()
    shown = f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    if workdir is not None and is_remote(workdir):
        ahead = now - write_time(workdir)
    else:
        place = _existing(Path() if workdir is None else workdir)
        with tempfile.NamedTemporaryFile(dir=place) as probe:
            ahead = now - max(os.stat(probe.name).st_mtime, place.stat().st_mtime, Path(__file__).stat().st_mtime)
    if abs(ahead) > MAX_SKEW_SECONDS:
        order = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} what is written"
        return "fail", f"{shown} is {order}: set it by NTP; services refuse what is signed at another time"
    return "ok", shown


def state_bytes(experiment: Experiment) -> int:
    """Returns the bytes of the state in a checkpoint of the run."""
    one = abstract_mesh(MeshConfig(1, 1, 1, 1, 1), 1)
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    state = abstract_state(system, optimizer, state_shardings(system, optimizer, one))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_parts(state)))


def _within(seconds: float, check: Callable[[], Found]) -> Found:
    """Returns the result of a check, which is `fail` if it raises, or has not ended after `seconds`."""
    results: list[Found] = []

    def run() -> None:
        try:
            results.append(check())
        except Exception as error:  # any error is reported, and the other checks continue
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            results.append(("fail", text))

    thread = threading.Thread(target=run, name=_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    late = f"no answer in {seconds:g} s: another process may hold it, or the network may not lead there"
    return results[0] if results else ("fail", late)


def _finished_steps(workdir: Path) -> list[int]:
    with reading(workdir):
        cut_short = set(half_written(workdir))
        names = {path.name for path in children(checkpoint_directory(workdir))} - cut_short
    return [int(name) for name in names if name.isdigit()]


def _existing(path: Path) -> Path:
    """Returns the directory itself, or the nearest one above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
