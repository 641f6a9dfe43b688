"""Ends a process that hangs: prints the step, the phase and all stacks, and exits with HUNG."""

import faulthandler
import os
import sys
import threading
import time

from ecdit.exit_codes import HUNG

PATIENCE = 10  # factor on the limit of slow phases, which compile or wait for a save


class Watchdog:
    """A thread that knows the run's current phase and how long it may take."""

    def __init__(self, seconds: float):
        """Allows each phase `seconds`; 0 for no watchdog."""
        self.seconds = seconds
        self.phase, self.limit = "", float("inf")  # the phase, and the time at which it has taken too long
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self.thread.start()

    def enter(self, phase: str, slow: bool = False) -> None:
        """Begins `phase`, which ends the one before."""
        seconds = self.seconds * (PATIENCE if slow else 1)
        self.phase, self.limit = f"{phase} for {seconds:g} s", time.monotonic() + seconds

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        if self.seconds:
            self.thread.join()

    def _watch(self) -> None:
        while not self.closed.wait(self.seconds / 20):
            if time.monotonic() > self.limit:
                self._end()

    def _end(self) -> None:
        sys.stdout.flush()
        print(f"hung: {self.phase} (config.train.watchdog_seconds = {self.seconds:g})", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(HUNG)  # an orderly exit would hang too
