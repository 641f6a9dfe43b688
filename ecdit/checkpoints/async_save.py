"""Saves checkpoints while training goes on, and lets it go on when a save fails."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ecdit.checkpoints.arrays import array_records, meta_json
from ecdit.checkpoints.config import CheckpointConfig
from ecdit.checkpoints.read_errors import CheckpointError, first_line
from ecdit.checkpoints.restore import Meta, checkpoint_directory, open_manager, state_arrays, state_parts
from ecdit.checkpoints.save_barrier import SaveBarrier
from ecdit.config import to_dict
from ecdit.errors import OutageError, UserError
from ecdit.files import is_remote, sync, sync_tree
from ecdit.multihost import anywhere
from ecdit.storage import is_temporary
from ecdit.training.state import TrainState


class AsyncSaver:
    """Saves a run's checkpoints, one at a time. All processes must make the same calls, except `check`.

    After a failed save the next one begins with a new manager, because the old one believes that the failed step is its
    latest.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        say: Callable[[str], None],
        saved: Callable[[int], None] = lambda step: None,
        permit: Callable[[], None] = lambda: None,
    ):
        """Opens the manager, which removes the remains of killed saves.

        Args:
          workdir: of the run.
          config: of its checkpoints.
          say: prints a line.
          saved: is called with the step of each save that has ended well.
          permit: is called before a save begins and before it is committed in a bucket; if it raises, the save fails.
        """
        # A failed save is reported once, here; asyncio would report it again for each array.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.workdir, self.config, self.say, self.saved, self.permit = workdir, config, say, saved, permit
        self.directory = checkpoint_directory(workdir)
        self.managers = 0
        self.manager: ocp.CheckpointManager | None = self._open()  # None between a failed save and the next one
        self.running: int | None = None  # step whose save has not ended yet
        self.failed_in_row, self.failed_step = 0, -1
        self.failure: CheckpointError | None = None  # of the last failed save

    def save(self, state: TrainState, step: int, meta: Meta) -> None:
        """Starts saving `state`, and returns when its arrays are copied off the devices. Fills in `meta.arrays`.

        Raises:
          CheckpointError: too many saves have failed; or this one failed on one of several processes.
        """
        meta = dataclasses.replace(meta, arrays=array_records(state_arrays(state)))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state_parts(state)), meta=ocp.args.JsonSave(meta_json(to_dict(meta)))
        )
        self._wait()
        if refused := anywhere(_problem(self.permit)):
            self._failed(step, refused)
            return
        problem = self._directory_problem()
        if problem is not None:
            self._failed(step, problem)
            return
        try:
            if self.manager is None:
                self.manager = self._open()
            self.manager.save(step, args=items, force=True)
        except Exception as error:
            if jax.process_count() > 1:
                raise CheckpointError(f"saving to {self.directory}/{step} failed: {first_line(error)}") from error
            self._failed(step, error)
            return
        self.running = step

    def check(self) -> None:
        """Reports a save that has failed since the last call. Call it every step. Raises as `save`."""
        if self.running is not None and self.manager is not None and not self.manager.is_saving_in_progress():
            self._wait()

    def settle(self) -> None:
        """Waits for the running save, if there is one. Raises as `save`."""
        self._wait()

    def finish(self, step: int) -> None:
        """Waits for the running save.

        Raises:
          CheckpointError: too many saves have failed, or the save of `step` has.
        """
        self._wait()
        if self.failed_step == step and self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Waits for the running save and closes the manager. Raises as `finish`."""
        self._wait()
        if self.failed_in_row:  # already reported; a bucket's manager would raise it again
            self._drop_manager()
        if self.manager is not None:
            self.manager.close()

    def _open(self) -> ocp.CheckpointManager:
        self.managers += 1
        options: dict[str, Any] = {"post_finalization_callback": self.permit}
        if jax.process_count() > 1:
            options["barrier_sync_fn"] = SaveBarrier(f"saves_{self.managers}")
        if not is_remote(self.directory):
            options["post_finalization_callback"] = self._sync
        return open_manager(self.workdir, self.config, async_options=ocp.AsyncOptions(**options))

    def _sync(self) -> None:
        """Returns when the files of a save are on the disk; Orbax then gives the checkpoint its name."""
        for path in self.directory.glob("*-tmp"):
            sync_tree(path)

    def _wait(self) -> None:
        if self.running is None or self.manager is None:
            return
        step, self.running = self.running, None
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            if not is_remote(self.directory):
                sync(self.directory)  # the checkpoint's name
        except Exception as error:
            self._failed(step, error)
        else:
            self.failed_in_row = 0
            self.saved(step)

    def _directory_problem(self) -> Exception | None:
        """Returns why nothing can be saved now, or None; makes the directory if it has vanished. Collective.

        A bucket has no directories, and reports its own errors when it is written to.
        """
        if is_remote(self.directory):
            return None
        if anywhere(None if self.directory.is_dir() else OSError("has vanished")):
            self._drop_manager()  # it lists checkpoints that no longer exist
        problem = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = error
            else:
                problem = None if os.access(self.directory, os.W_OK) else OSError("Permission denied")
        return anywhere(problem)

    def _failed(self, step: int, error: Exception) -> None:
        self.failed_in_row, self.failed_step = self.failed_in_row + 1, step
        reason = first_line(error)
        self.failure = CheckpointError(
            f"saving to {self.directory}/{step} failed: {reason}. Earlier checkpoints are untouched."
        )
        # It keeps whether the error is an outage and not the error itself, whose traceback holds the state's arrays.
        self.failure.__cause__ = OutageError(reason) if is_temporary(error) else None
        if self.failed_in_row > self.config.max_failed_saves:
            time.sleep(2)  # Orbax stops at the first array, while writes of the others still fail and print
            raise self.failure
        self._drop_manager()
        self.say(
            f"{self.failure} Training goes on: failed save {self.failed_in_row}, {self.config.max_failed_saves} may"
        )

    def _drop_manager(self) -> None:
        if self.manager is not None:
            with contextlib.suppress(Exception):  # raises the failed save again
                self.manager.close()
            self.manager = None


def _problem(do: Callable[[], None]) -> Exception | None:
    """Returns why something cannot be done, or None once it is."""
    try:
        do()
    except (UserError, OSError) as error:
        return error
    return None
