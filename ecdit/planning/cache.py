"""Caches plans on disk by a hash of their config, topology, compiler with its flags, and code."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.experiment import Experiment, ResolvedPhase
from ecdit.files import is_remote, replace_text
from ecdit.planning.compiler import DoesNotFit, Target, What
from ecdit.planning.plan import Plan, make_plan
from ecdit.pretrained.text_encoders import read_encoders
from ecdit.runs.checked import code_digest
from ecdit.system import user_files

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # environment variables that change the compiled program


def plan_phases(experiment: Experiment, target: Target, what: What = "train") -> list[tuple[ResolvedPhase, Plan]]:
    """Returns each phase of a run with its plan, because a short phase may need the most memory.

    Raises:
      DoesNotFit: a phase needs more memory than the chips have; the message names the phase.
      UserError: as in `plan.make_plan`.
    """
    plans = []
    for phase in experiment.resolved_phases():
        try:
            plans.append((phase, _cached(phase.experiment, target, what)))
        except DoesNotFit as error:
            where = f"the phase from step {phase.after + 1} to {phase.last}: " if experiment.phases else ""
            raise DoesNotFit(f"{where}{error}") from error
    return plans


def longest(plans: Sequence[tuple[ResolvedPhase, Plan]]) -> Plan:
    """Returns the plan of the phase with the most steps, which stands for the run's time."""
    return max(plans, key=lambda pair: pair[0].last - pair[0].after)[1]


def largest(plans: Sequence[tuple[ResolvedPhase, Plan]]) -> Plan:
    """Returns the plan of the phase that needs the most memory, which decides whether the run fits."""
    return max((plan for _, plan in plans), key=lambda plan: plan.hbm_bytes_per_device)


def cached_plan(experiment: Experiment, target: Target, what: What = "train") -> Plan:
    """Returns the plan of a run's longest phase, after planning all phases. Raises the errors of `plan_phases`."""
    return longest(plan_phases(experiment, target, what))


def _cached(experiment: Experiment, target: Target, what: What) -> Plan:
    """Returns the plan of an experiment without phases, from disk if it is there.

    Plans are stored in the directory of the compilation cache. Without a directory, or with one in a bucket, every call
    makes the plan.
    """
    path = _path(experiment, target, what)
    if path is not None and path.exists():
        with contextlib.suppress(OSError, json.JSONDecodeError, TypeError):  # a damaged file is replaced
            return Plan(**json.loads(path.read_text()))
    plan = make_plan(experiment, target, what)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
        except (OSError, UserError) as error:  # the plan took minutes, so return it anyway
            print(f"warning: the plan is not cached: {error}", flush=True)
    return plan


def _path(experiment: Experiment, target: Target, what: What) -> Path | None:
    """Returns the file of a plan, or None if plans are not cached."""
    directory = experiment.runtime.compilation_cache
    if not directory or is_remote(directory):
        return None
    compiler = {name: _version(name) for name in _LIBRARIES} | {name: os.environ.get(name, "") for name in _FLAGS}
    follows_from = [to_dict(experiment), user_files(experiment.denoiser), target.name, what, compiler, code_digest()]
    # Of public weights the sizes, and not the values.
    follows_from += [str(experiment.system.public_autoencoder), *map(str, read_encoders(experiment.text))]
    digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:32]
    return Path(os.path.expanduser(directory)) / "plans" / f"{digest}.json"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
