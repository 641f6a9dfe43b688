"""Lists a run's checkpoints, and verifies them array by array on a CPU."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ecdit.checkpoints.arrays import (
    described,
    flat_arrays,
    read_records,
    restore_array,
    stored_arrays,
    stored_tree,
)
from ecdit.checkpoints.checksums import checksums
from ecdit.checkpoints.read_errors import CheckpointError, DamagedError
from ecdit.checkpoints.restore import checkpoint_directory, step_directory
from ecdit.checkpoints.resume import aside_directory
from ecdit.partitioning import replicated
from ecdit.storage import children, size_and_time


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of verifying a checkpoint."""

    directory: Path
    arrays: int
    damage: dict[str, str]  # descriptions by the array's name, or "meta"

    def line(self) -> str:
        """Returns the result in one line."""
        if self.damage:
            return f"{self.directory.name}: DAMAGED: {', '.join(self.damage)}"
        return f"{self.directory.name}: valid, {self.arrays} arrays"


def verify(manager: ocp.CheckpointManager, step: int | None = None) -> Iterator[Finding]:
    """Reads every array of every checkpoint (or of that of `step`), one at a time, and compares checksums.

    Raises:
      CheckpointError: there is no checkpoint of `step`.
    """
    steps = sorted(manager.all_steps())
    if step is not None and step not in steps:
        raise CheckpointError(f"{manager.directory}: no checkpoint of step {step}; there are {steps}")
    for each in steps if step is None else [step]:
        yield _verified(step_directory(manager, each))


def listed(workdir: Path, manager: ocp.CheckpointManager) -> Iterator[str]:
    """Yields a line for each checkpoint: step, time, size and state; those that were moved aside come last."""
    aside = aside_directory(checkpoint_directory(workdir))
    directories = [step_directory(manager, step) for step in sorted(manager.all_steps())]
    directories += sorted(children(aside))
    for directory in directories:
        size, changed = size_and_time(directory)
        note = "set aside: it was found damaged" if directory.parent == aside else _known(directory)
        yield f"{directory.name:>10}  {changed:%Y-%m-%d %H:%M:%S}  {size / 1e6:10.1f} MB  {note}"


def _known(directory: Path) -> str:
    try:
        records, stored = read_records(directory), stored_arrays(directory)
    except CheckpointError as error:
        return f"DAMAGED: {error}"
    if {name: text for name, (text, _) in records.items()} != stored:
        return "DAMAGED: it does not have the arrays that were saved"
    return "has checksums"


def _verified(directory: Path) -> Finding:
    try:
        records, tree = read_records(directory), stored_tree(directory)
    except DamagedError as error:
        return Finding(directory, 0, {"meta": str(error)})
    cpu = replicated(Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("all",)))
    stored, damage = flat_arrays(tree, serialized=True), {}
    for name, (text, checksum) in records.items():
        try:
            if name not in stored or described(stored[name]) != text:
                damage[name] = f"it is not there as {text}"
            elif checksum != checksums({name: restore_array(directory, tree, name, cpu)})[name]:
                damage[name] = "its checksum differs"
        except DamagedError as error:
            damage[name] = str(error)
    return Finding(directory, len(records), damage)
