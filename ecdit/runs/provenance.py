"""Records in a workdir how it was made: the resolved config, and the overrides of each start."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax

import ecdit
from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.runs.trained_run import CONFIG_FILE, OVERRIDES_FILE

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that determine what a step computes."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def record_start(config: dict[str, Any], workdir: Path, step: int, origin: dict[str, Any]) -> None:
    """Writes config.json, and adds a start to the list in overrides.json. Only the first process writes.

    Args:
      config: the resolved experiment, as `config.to_dict` gives it.
      workdir: of the run.
      step: steps done at this start.
      origin: the config file and what the command line changed in it, as `command_line.config_origin` gives it.

    Raises:
      UserError: one of them cannot be written, or overrides.json is damaged.
    """
    if jax.process_index() > 0:
        return
    path = workdir / OVERRIDES_FILE
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
        starts.append({"step": step, **origin, "versions": {"ecdit": ecdit.__version__} | library_versions()})
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from None
    for file, values in ((workdir / CONFIG_FILE, config), (path, starts)):
        replace_text(file, json.dumps(values, indent=2) + "\n")
