"""A save that fails on one process fails on all, at once."""

import jax
import orbax.checkpoint as ocp


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
