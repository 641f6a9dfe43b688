"""Traces some steps (`train.profile_start`, `train.profile_steps`) for XProf, which TensorBoard can show."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ecdit.files import is_remote, writing
from ecdit.storage import upload
from ecdit.training.config import TrainConfig

PROFILE = "profile"


class Profile:
    """Traces the steps of the config's window, except the first step of this start, which compiles.

    Only the first process traces, and only its own devices: the others do the same work.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start_step: int, settle: Callable[[], None] = lambda: None):
        """Sets the window. `settle` waits for a running save, during which beginning or ending a trace has crashed."""
        self.settle = settle
        self.directory = self.local = workdir / PROFILE
        self.running = False
        wanted = config.profile_steps if jax.process_index() == 0 else 0
        first = max(config.profile_start, start_step + 2)
        self.window = range(first, config.profile_start + wanted)

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before the first step of the window, and stops it after the last.

        `state` is the state from which `step` begins.
        """
        if (step in self.window) != self.running:
            jax.block_until_ready(state)  # so that each step is traced completely or not at all
            self.close()
            if step in self.window:
                self.settle()
                if is_remote(self.directory):  # the profiler itself writes only to disks
                    self.local = Path(tempfile.mkdtemp())
                jax.profiler.start_trace(self.local)
                self.running = True

    def close(self) -> None:
        """Stops the trace and writes it."""
        if self.running:
            self.running = False
            self.settle()
            jax.profiler.stop_trace()
            if self.local != self.directory:
                with writing(self.directory):
                    upload(self.local, self.directory)
                shutil.rmtree(self.local)
