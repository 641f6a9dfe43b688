"""Keeps plans on disk, by a hash of everything they depend on: config, topology, versions of compiler and code."""

import contextlib
import dataclasses
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

from ecdit.config import to_dict
from ecdit.experiment import Experiment
from ecdit.files import is_remote, replace_text
from ecdit.planning.compiler import Target, What
from ecdit.planning.plan import Plan, make_plan
from ecdit.runs.checked import code_digest
from ecdit.system import user_files

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def cached_plan(experiment: Experiment, target: Target, what: What = "train") -> Plan:
    """Returns the plan of a run's longest phase, and makes it only if it is not on disk. Raises as `plan.make_plan`.

    Plans are kept in the directory of the compilation cache. If the config names none, or one in a bucket, every call
    makes the plan.
    """
    longest = max(experiment.resolved_phases(), key=lambda phase: phase.last - phase.after).experiment
    path = _path(longest, target, what)
    if path is not None and path.exists():
        with contextlib.suppress(OSError, json.JSONDecodeError, TypeError):  # a damaged file is replaced
            return Plan(**json.loads(path.read_text()))
    plan = make_plan(longest, target, what)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
    return plan


def _path(experiment: Experiment, target: Target, what: What) -> Path | None:
    """Returns the file of a plan, or None if plans are not kept."""
    directory = experiment.runtime.compilation_cache
    if not directory or is_remote(directory):
        return None
    versions = {name: _version(name) for name in _LIBRARIES}
    follows_from = [to_dict(experiment), user_files(experiment.denoiser), target.name, what, versions, code_digest()]
    digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:32]
    return Path(os.path.expanduser(directory)) / "plans" / f"{digest}.json"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
