"""Tracks the phase of a training process: the watchdog limits it, and the ledger books its time."""

from ecdit.runs.ledger import Ledger
from ecdit.training.config import Phase, TrainConfig
from ecdit.training.watchdog import Watchdog


class Activity:
    """The phase that a process is in, from its start on."""

    def __init__(self, config: TrainConfig):
        """Begins with the phase "start"."""
        self.watchdog, self.ledger = Watchdog(config.watchdog_limits()), Ledger()
        self.enter("start", "starting: joining the other processes")

    def enter(self, phase: Phase, what: str) -> None:
        """Begins a phase, which ends the one before; `what` says what the process does in it."""
        self.watchdog.enter(phase, what)
        self.ledger.enter(phase)

    def close(self) -> None:
        """Ends the watchdog and the ledger."""
        self.watchdog.close()
        self.ledger.close()
