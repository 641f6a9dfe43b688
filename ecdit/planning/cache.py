"""Plans that were made before, by what they follow from: config, topology, and the versions of compiler and code."""

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import ecdit
from ecdit.config import replace_text, to_dict
from ecdit.planning.compiler import Target, What
from ecdit.training.experiment import Experiment

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def read(experiment: Experiment, target: Target, what: What) -> dict[str, Any] | None:
    """The cached plan's values; None where there is none, or no cache."""
    path = _path(experiment, target, what)
    if path is None or not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None  # made anew, and written over


def write(experiment: Experiment, target: Target, what: What, values: dict[str, Any]) -> None:
    """Keeps a plan's values, where the config has a cache.

    Raises:
      UserError: it cannot be written.
    """
    path = _path(experiment, target, what)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(values, indent=2) + "\n")


def _path(experiment: Experiment, target: Target, what: What) -> Path | None:
    """In the directory of the compilation cache."""
    directory = experiment.runtime.compilation_cache
    if not directory:
        return None
    versions = {name: _version(name) for name in _LIBRARIES}
    follows_from = [to_dict(experiment), target.name, what, versions, _code()]
    digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:32]
    return Path(os.path.expanduser(directory)) / "plans" / f"{digest}.json"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _code() -> str:
    """Of all of ecdit: a version number says nothing of a checkout that somebody works on."""
    digest = hashlib.sha256()
    for path in sorted(Path(ecdit.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
