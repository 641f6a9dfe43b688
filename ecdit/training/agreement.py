"""What several processes find out together: that something failed on one of them is a failure on all."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def anywhere(problem: str | None) -> str | None:
    """`problem`, or that another process has one; all call it, and all get None or none does."""
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.int32(problem is not None)).reshape(-1)
    return problem or (f"process {int(np.argmax(found))} cannot" if found.any() else None)


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class SaveBarrier:
    """Orbax's barrier for the threads that save, with which a save that fails on one process fails on all.

    Of itself, Orbax has a process that cannot write skip the two barriers at which the others then wait for twenty
    minutes: `async_write_complete` and `async_commit_complete`. `set_value_start` comes before and after them. This one
    makes up for what was skipped when it comes after, and tells the others of the failure.
    """

    STAGES = ("async_write_complete", "async_commit_complete")

    def __init__(self, name: str):
        """`name` is one that no other barrier of the run has."""
        self.client = ocp.multihost.get_jax_distributed_client()
        self.name, self.saves, self.met, self.saving, self.told = name, 0, 0, False, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes to come to `key`.

        Raises:
          OSError: another process could not write its part of the checkpoint.
        """
        if any(stage in key for stage in self.STAGES):
            self._meet(timeout_ms)
            failed = self.client.key_value_dir_get(f"{self.name}/failed/{self.saves}/")
            if failed:
                self.told = True
                raise OSError(f"process {failed[0][1]} could not write its part")
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
            self.client.key_value_set(f"{self.name}/failed/{self.saves}/{process}", str(process))
            self._meet(timeout_ms)

    def _meet(self, timeout_ms: int) -> None:
        self.client.wait_at_barrier(f"{self.name}/{self.saves}/{self.met}", timeout_ms)
        self.met += 1
