"""A save that fails on one process fails on all, at once."""

import sys

import jax
import orbax.checkpoint as ocp

from ecdit.errors import OutageError
from ecdit.storage import is_temporary

OUTAGE = "outage"  # a process that failed tells the others so if it met an outage


class SaveBarrier:
    """A barrier for Orbax's saving threads that makes a save that fails on one process fail on all.

    In Orbax itself, a process that cannot write skips the barriers `async_write_complete` and `async_commit_complete`,
    where the other processes then wait for twenty minutes. The barrier `set_value_start` comes before and after them.
    When it comes after, this class enters the barriers that were skipped and tells the other processes of the failure.
    """

    STAGES = ("async_write_complete", "async_commit_complete")

    def __init__(self, name: str):
        """Makes the barrier; `name` must be unique among the barriers of the run."""
        self.client = ocp.multihost.get_jax_distributed_client()
        self.name, self.saves, self.met, self.saving, self.told = name, 0, 0, False, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have reached `key`.

        Raises:
          OutageError: another process could not write its part of the checkpoint in an outage.
          OSError: it could not for another reason.
        """
        if any(stage in key for stage in self.STAGES):
            self._meet(timeout_ms)
            failed = self.client.key_value_dir_get(f"{self.name}/failed/{self.saves}/")
            if failed:
                self.told = True
                process, kind = failed[0][1].split()
                raise (OutageError if kind == OUTAGE else OSError)(f"process {process} could not write its part")
            return
        if "set_value_start" in key:
            self._begin_or_end(timeout_ms)
        self.client.wait_at_barrier(f"{self.name}/{key}", timeout_ms)

    def _begin_or_end(self, timeout_ms: int) -> None:
        self.saving = not self.saving
        if self.saving:
            self.saves, self.met, self.told = self.saves + 1, 0, False
        elif self.met < len(self.STAGES) and not self.told:
            process = jax.process_index()
            error = sys.exception()  # Orbax ends a save in a `finally`
            kind = OUTAGE if error is not None and is_temporary(error) else "other"
            self.client.key_value_set(f"{self.name}/failed/{self.saves}/{process}", f"{process} {kind}")
            self._meet(timeout_ms)

    def _meet(self, timeout_ms: int) -> None:
        self.client.wait_at_barrier(f"{self.name}/{self.saves}/{self.met}", timeout_ms)
        self.met += 1
