"""Finds the newest valid checkpoint, and moves newer damaged ones aside."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from ecdit.checkpoints.arrays import check_sums
from ecdit.checkpoints.checksums import checksums, finish_checksums, start_checksums
from ecdit.checkpoints.read_errors import CheckpointError, DamagedError, UnreadableError
from ecdit.checkpoints.restore import (
    Meta,
    checkpoint_directory,
    read_meta,
    restore_unverified,
    state_arrays,
    step_directory,
)
from ecdit.files import is_remote
from ecdit.multihost import anywhere, on_first, wait_for_all
from ecdit.storage import COMMITTED, children, move_checkpoint
from ecdit.training.state import TrainState

T = TypeVar("T")
DAMAGED = "damaged"


class Recovered(NamedTuple):
    """The state from which a run goes on."""

    state: TrainState
    step: int
    check: Callable[[], None]  # finishes a check in the background; call it after a step and before a save
    notes: list[str]  # lines to print about damaged checkpoints


def half_written(workdir: Path) -> list[str]:
    """Returns the names of what killed saves have left; opening the manager removes it."""
    directory = checkpoint_directory(workdir)
    paths = children(directory)
    if is_remote(directory):  # a save in a bucket writes in place, and adds a mark when it is complete
        return sorted(path.name for path in paths if path.name.isdigit() and not (path / COMMITTED).exists())
    return sorted(path.name for path in paths if path.name.endswith("-tmp"))


def aside_directory(directory: Path) -> Path:
    """Returns where damaged checkpoints go: in a bucket beside it, because Orbax deletes unknown entries inside it."""
    return directory.with_name(f"{directory.name}_{DAMAGED}") if is_remote(directory) else directory / DAMAGED


def newest_valid(
    manager: ocp.CheckpointManager,
    abstract: TrainState,
    verify: Literal["always", "background", "never"],
    admit: Callable[[Meta, int], None],
    permit: Callable[[], None] = lambda: None,
) -> Recovered | None:
    """Returns the newest checkpoint that can be read and passes `verify`, or None if there are no checkpoints.

    Collective: a checkpoint that one process cannot read is damaged for all.

    Args:
      manager: of the run.
      abstract: shapes, dtypes and shardings of the state.
      verify: compares checksums "always" (before it returns), in the "background" (see `Recovered.check`), or "never".
      admit: is called with a checkpoint's meta and step, and raises if the run cannot go on from it.
      permit: is called by the first process before it moves a checkpoint, and raises if it must not.

    Raises:
      UnreadableError: a process cannot read one now. Nothing is moved.
      CheckpointError: a checkpoint is of another model, or `admit` refuses it; or there are some, and none is valid.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        found = _restored(manager, step, abstract, verify, admit, permit, damaged)
        if found is not None:
            state, check = found
            notes = [f"{why}; it is now {_set_aside(manager, bad, permit)}" for bad, why in damaged.items()]
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
    permit: Callable[[], None],
    damaged: dict[int, str],
) -> tuple[TrainState, Callable[[], None]] | None:
    """Returns a checkpoint's state and what is left to check; or None, with the reason in `damaged`."""
    meta = _attempt(lambda: read_meta(manager, step), step, damaged)
    if meta is None:
        return None
    admit(meta, step)
    state = _attempt(lambda: restore_unverified(manager, step, meta, abstract), step, damaged)
    if state is None or verify == "never":
        return state and (state, lambda: None)
    arrays, directory = state_arrays(state), step_directory(manager, step)
    if verify == "background":
        return state, _background_check(manager, step, meta, arrays, permit)
    valid = _attempt(lambda: check_sums(directory, meta.arrays, checksums(arrays)) or True, step, damaged)
    return (state, lambda: None) if valid else None


def _attempt(action: Callable[[], T], step: int, damaged: dict[int, str]) -> T | None:
    """Returns what `action` returns; or None, with the reason in `damaged`, if any process finds damage. Collective.

    Raises:
      UnreadableError: a process could not read it, for a reason that is no damage.
    """
    result, damage, fault = None, None, None
    try:
        result = action()
    except DamagedError as error:
        damage = error
    except UnreadableError as error:
        fault = error
    if found := anywhere(fault):
        text = str(found) if fault else f"the checkpoint of step {step} cannot be read: {found} read it"
        raise UnreadableError(text) from found  # the cause shows whether it is an outage
    found = anywhere(damage)
    if found is None:
        return result
    damaged[step] = str(found) if damage else f"step {step} is damaged: {found} read it"
    return None


def _background_check(
    manager: ocp.CheckpointManager, step: int, meta: Meta, arrays: dict[str, jax.Array], permit: Callable[[], None]
) -> Callable[[], None]:
    """Starts summing `arrays`, which may then be donated, and returns a function that compares the sums, once.

    The function raises DamagedError and moves the checkpoint aside. It keeps it in place if it is the only one;
    otherwise the next start would begin at step 0.
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
            where = _set_aside(manager, step, permit)
            raise DamagedError(f"{error}. It is now {where}; the same command goes on from an older one.") from None

    return check


def _set_aside(manager: ocp.CheckpointManager, step: int, permit: Callable[[], None]) -> Path:
    """Moves a checkpoint to where no run looks for it, and returns that place. Collective."""
    directory, count = step_directory(manager, step), 1
    place = aside_directory(directory.parent) / str(step)
    while place.exists():
        count += 1
        place = place.with_name(f"{step}-{count}")

    def move() -> None:
        permit()
        move_checkpoint(directory, place)

    wait_for_all("a free place for a damaged checkpoint")
    on_first(move)
    wait_for_all("damaged checkpoint set aside")
    manager.reload()
    return place
