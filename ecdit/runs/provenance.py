"""Records how a run was made: its workdir has the config and all starts, its checkpoints have code and versions."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import ecdit
from ecdit.config import flatten
from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.runs.trained_run import CONFIG_FILE, OVERRIDES_FILE
from ecdit.storage import reading

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
COMPILERS = ("libtpu",)  # of backends, if installed: they determine what the same program computes
_PACKAGE = Path(ecdit.__file__).parent
_GIT_SECONDS = 10.0
_SHORT = 40  # longest config value, in characters, that hosts compare as text instead of as a hash


def library_versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that determine what a step computes."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    for name in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), "ecdit": ecdit.__version__} | versions


@functools.cache
def code_state() -> dict[str, str]:
    """Returns which code runs: commit and dirty ("" where it is in no git checkout), and a hash of its sources."""
    commit = dirty = ""
    # A package installed inside another project's checkout does not belong to that project's commit.
    if _git("ls-files", "--error-unmatch", "__init__.py"):
        commit = _git("rev-parse", "HEAD")
        dirty = "yes" if _git("status", "--porcelain", "--", ".") else "no"
    return {"commit": commit, "dirty": dirty, "sources": source_hash(_PACKAGE)}


def source_hash(package: Path) -> str:
    """Returns a sha256 of the names and contents of all Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def config_hash(config: dict[str, Any]) -> str:
    """Returns a sha256 of a config as `config.to_dict` gives it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def facts_of_a_host(config: dict[str, Any], fingerprints: Sequence[str], vocabulary: str) -> dict[str, str]:
    """Returns what must be equal on all hosts of a run: data, config, code and versions, each as a short text.

    Args:
      config: the run's, as `config.to_dict` gives it, with the hashes of the user's files.
      fingerprints: of the data of each phase.
      vocabulary: hash of the data's vocabulary.
    """
    facts = {f"data of phase {n}": fingerprint[:12] for n, fingerprint in enumerate(fingerprints, 1)}
    facts |= {"vocabulary": vocabulary[:12], "ecdit's sources": code_state()["sources"][:12]}
    facts |= {f"version of {name}": version for name, version in library_versions().items()}
    values = {key: json.dumps(value, sort_keys=True) for key, value in flatten(config).items()}
    return facts | {
        f"config.{key}": text if len(text) <= _SHORT else config_hash({key: text})[:12] for key, text in values.items()
    }


def recorded_starts(workdir: Path) -> list[dict[str, Any]]:
    """Returns the list in overrides.json, empty if there is none yet.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / OVERRIDES_FILE
    try:
        with reading(path):
            starts = json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:  # from JSON or UTF-8
        raise UserError(f"{path} is damaged ({error}): move it away") from None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UserError(f"{path} is damaged (it is no list of starts): move it away")
    return starts


def recorded_files(workdir: Path) -> dict[str, str]:
    """Returns the sha256 by path of the user's files that the run read at its last start; older versions noted none.

    Raises:
      UserError: overrides.json is damaged.
    """
    *_, last = recorded_starts(workdir) or [{}]
    files = last.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise UserError(f"{workdir / OVERRIDES_FILE} is damaged (files are no hashes): move it away")
    return files


def record_start(config: dict[str, Any], workdir: Path, step: int, origin: dict[str, Any]) -> None:
    """Writes config.json, and adds a start to the list in overrides.json. Only the first process writes.

    Args:
      config: the resolved experiment, as `config.to_dict` gives it.
      workdir: of the run.
      step: steps done at this start.
      origin: the config file and what the command line changed in it, as `command_line.config_origin` gives it, and
        `files`, the sha256 by path of the user's files.

    Raises:
      UserError: one of them cannot be written, or overrides.json is damaged.
    """
    if jax.process_index() > 0:
        return
    start = {"step": step, "saved": step, **origin, "versions": library_versions(), "code": code_state()}
    starts = [*recorded_starts(workdir), start]
    replace_text(workdir / CONFIG_FILE, _json(config))
    replace_text(workdir / OVERRIDES_FILE, _json(starts))


def record_save(workdir: Path, step: int) -> None:
    """Notes in the last start of overrides.json that `step` was saved. Only the first process writes.

    Raises:
      UserError: it cannot be written, or is damaged.
    """
    if jax.process_index() > 0:
        return
    *earlier, last = recorded_starts(workdir) or [{}]  # the file may have been deleted
    replace_text(workdir / OVERRIDES_FILE, _json([*earlier, last | {"saved": step}]))


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"


def _git(*arguments: str) -> str:
    """Returns what git prints about the package's directory, "" if it fails or is not installed."""
    try:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
