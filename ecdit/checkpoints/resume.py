"""Goes on from the newest checkpoint that is valid, and sets newer ones aside that are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from ecdit.checkpoints.arrays import CheckpointError, DamagedError, check_sums
from ecdit.checkpoints.checksums import checksums, finish_checksums, start_checksums
from ecdit.checkpoints.restore import (
    Meta,
    checkpoint_directory,
    read_meta,
    restore_unverified,
    state_arrays,
    step_directory,
)
from ecdit.files import is_remote
from ecdit.multihost import anywhere, wait_for_all
from ecdit.storage import COMMITTED, children, move_checkpoint
from ecdit.training.state import TrainState

T = TypeVar("T")
DAMAGED = "damaged"


class Recovered(NamedTuple):
    """A run's state, as it goes on from it."""

    state: TrainState
    step: int
    check: Callable[[], None]  # to be called when steps are computed, before a save: ends the check in the background
    notes: list[str]  # lines about what is not as it should be


def half_written(workdir: Path) -> list[str]:
    """What killed saves have left, by name; opening the manager removes it."""
    directory = checkpoint_directory(workdir)
    paths = children(directory)
    if is_remote(directory):  # there a save writes where the checkpoint stays, and marks it when it is whole
        return sorted(path.name for path in paths if path.name.isdigit() and not (path / COMMITTED).exists())
    return sorted(path.name for path in paths if path.name.endswith("-tmp"))


def aside_directory(directory: Path) -> Path:
    """Where damaged checkpoints of `directory` go: in a bucket beside it, for there Orbax removes what it knows not."""
    return directory.with_name(f"{directory.name}_{DAMAGED}") if is_remote(directory) else directory / DAMAGED


def newest_valid(
    manager: ocp.CheckpointManager,
    abstract: TrainState,
    verify: Literal["always", "background", "never"],
    admit: Callable[[Meta, int], None],
) -> Recovered | None:
    """The newest checkpoint that can be read, and is what was saved as far as `verify` looks; None where there is none.

    All processes call it, and a checkpoint that one cannot read is damaged for all.

    Args:
      manager: of the run.
      abstract: shapes, dtypes and shardings.
      verify: "always" before it returns, in the "background" by `Recovered.check`, or "never".
      admit: raises if the run cannot go on from a checkpoint of this meta and step.

    Raises:
      CheckpointError: one that is of another model, or that `admit` refuses; there are some and none is valid.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        found = _restored(manager, step, abstract, verify, admit, damaged)
        if found is not None:
            state, check = found
            notes = [f"{why}; it is now {_set_aside(manager, bad)}" for bad, why in damaged.items()]
            return Recovered(state, step, check, notes)
    if damaged:
        reasons = "\n  ".join(damaged.values())
        raise CheckpointError(f"no checkpoint in {manager.directory} is valid:\n  {reasons}\nUse another --workdir.")
    return None


def _restored(
    manager: ocp.CheckpointManager,
    step: int,
    abstract: TrainState,
    verify: Literal["always", "background", "never"],
    admit: Callable[[Meta, int], None],
    damaged: dict[int, str],
) -> tuple[TrainState, Callable[[], None]] | None:
    """The state of one checkpoint and what is left to check; None, and why in `damaged`, if it is damaged."""
    meta = _attempt(lambda: read_meta(manager, step), step, damaged)
    if meta is None:
        return None
    admit(meta, step)
    state = _attempt(lambda: restore_unverified(manager, step, meta, abstract), step, damaged)
    if state is None or verify == "never":
        return state and (state, lambda: None)
    arrays, directory = state_arrays(state), step_directory(manager, step)
    if verify == "background":
        return state, _background_check(manager, step, meta, arrays)
    valid = _attempt(lambda: check_sums(directory, meta.arrays, checksums(arrays)) or True, step, damaged)
    return (state, lambda: None) if valid else None


def _attempt(action: Callable[[], T], step: int, damaged: dict[int, str]) -> T | None:
    """What `action` returns; None, and why in `damaged`, if it finds damage on any process."""
    result, problem = None, None
    try:
        result = action()
    except DamagedError as error:
        problem = str(error)
    problem = anywhere(problem)
    if problem is None:
        return result
    damaged[step] = problem if "/" in problem else f"step {step} is damaged: {problem} read it"
    return None


def _background_check(
    manager: ocp.CheckpointManager, step: int, meta: Meta, arrays: dict[str, jax.Array]
) -> Callable[[], None]:
    """Starts summing `arrays`, which the first step may then take, and returns what compares the sums, once.

    It raises DamagedError, the checkpoint set aside unless it is the only one: else the next start began at step 0.
    """
    names, running = list(arrays), [start_checksums(arrays)]

    def check() -> None:
        if not running:
            return
        try:
            check_sums(step_directory(manager, step), meta.arrays, finish_checksums(names, running.pop()))
        except DamagedError as error:
            if len(manager.all_steps()) == 1:
                raise DamagedError(f"{error}. It is the only one: use another --workdir.") from None
            where = _set_aside(manager, step)
            raise DamagedError(f"{error}. It is now {where}; the same command goes on from an older one.") from None

    return check


def _set_aside(manager: ocp.CheckpointManager, step: int) -> Path:
    """Moves a checkpoint to where no run finds it, and says where that is."""
    directory, count = step_directory(manager, step), 1
    place = aside_directory(directory.parent) / str(step)
    while place.exists():
        count += 1
        place = place.with_name(f"{step}-{count}")
    wait_for_all("a free place for a damaged checkpoint")
    if jax.process_index() == 0:
        move_checkpoint(directory, place)
    wait_for_all("damaged checkpoint set aside")
    manager.reload()
    return place
