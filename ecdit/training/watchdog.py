"""Ends a process that hangs: prints what it did, for how long, and all stacks, and exits with HUNG."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping

from ecdit.exit_codes import HUNG
from ecdit.training.config import Phase


class Watchdog:
    """A thread that knows what the process does now and how long that may take."""

    def __init__(self, limits: Mapping[Phase, float]):
        """Allows each phase so many seconds: see `TrainConfig.watchdog_limits`. Without any there is no watchdog."""
        self.limits = limits
        self.now: tuple[Phase, str, float] | None = None  # activity, its description, and the time of its limit
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limits:
            self.thread.start()

    def enter(self, phase: Phase, what: str) -> None:
        """Begins a phase, which ends the one before; `what` says what the process does in it."""
        if self.limits:
            self.now = phase, what, time.monotonic() + self.limits[phase]

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        if self.limits:
            self.thread.join()

    def _watch(self) -> None:
        while not self.closed.wait(min(self.limits.values()) / 20):
            if self.now is not None and time.monotonic() > self.now[2]:
                self._end(*self.now[:2])

    def _end(self, phase: Phase, what: str) -> None:
        sys.stdout.flush()
        key = "watchdog_seconds" if phase in ("step", "data") else f"watchdog.{phase}"
        seconds = self.limits[phase]
        print(f"hung: {what} for {seconds:g} s (config.train.{key} = {seconds:g})", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(HUNG)  # an orderly exit would also hang
