"""Compares how long the hosts of a run take for a step, and names one for which the others keep waiting.

All hosts step together, so each takes equally long; but a host that others wait for waits itself the least. What it
spends outside of steps (on batches, saves) is visible so; a chip that is slow inside the step slows all alike, and is
not.
"""

import dataclasses
import json
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import orbax.checkpoint as ocp

from ecdit.training.config import TrainConfig

WARN_AFTER = 3  # reports in a row that find the same host slow
_PREFIX = "ecdit_host_times"


@dataclasses.dataclass(frozen=True)
class HostTime:
    """Holds the mean seconds that a process spent per step, by phase."""

    process: int
    host: str
    step: float  # time in the step, including waits for other hosts
    data: float
    save: float

    @property
    def whole(self) -> float:
        """Returns the seconds of a whole step."""
        return self.step + self.data + self.save


def own_seconds(times: Sequence[HostTime]) -> list[float]:
    """Returns what a step takes each host without waiting for others, as far as that can be told."""
    shortest = min(time.step for time in times)
    return [time.whole - (time.step - shortest) for time in times]


def slowest(times: Sequence[HostTime]) -> tuple[HostTime, float]:
    """Returns the host that takes longest, and how many times as long as the median of the others."""
    own = own_seconds(times)
    place = own.index(max(own))
    others = [seconds for n, seconds in enumerate(own) if n != place]
    return times[place], own[place] / max(statistics.median(others), 1e-9)


def report_line(times: Sequence[HostTime]) -> str:
    """Returns the line that says how far the hosts are apart."""
    own = own_seconds(times)
    worst, _ = slowest(times)
    return (
        f"hosts: {min(own):.3f} to {max(own):.3f} s a step by themselves; slowest is process {worst.process} on "
        f"{worst.host}: data wait {worst.data:.3f} s, saves {worst.save:.3f} s"
    )


class HostTimes:
    """Gathers the times of all processes every `train.log_every` steps, without making any wait."""

    def __init__(self, config: TrainConfig, seconds: Callable[[], Mapping[str, float]], say: Callable[[str], None]):
        """Takes `seconds`, this process's times so far by phase, and `say`, which prints on the first process."""
        self.config, self.seconds, self.say = config, seconds, say
        self.client = ocp.multihost.get_jax_distributed_client() if jax.process_count() > 1 else None
        self.before: Mapping[str, float] | None = None
        self.slow, self.times_slow = -1, 0

    def after_step(self, step: int) -> None:
        """Compares the hosts every `train.log_every` steps. Call it after every step, on all processes."""
        if self.client is None or step % self.config.log_every:
            return
        now = dict(self.seconds())
        if self.before is not None:
            parts = ("step", "data", "save")
            spent = {p: (now.get(p, 0.0) - self.before.get(p, 0.0)) / self.config.log_every for p in parts}
            time = HostTime(jax.process_index(), socket.gethostname(), **spent)
            self.client.key_value_set(f"{_PREFIX}/{step}/{time.process}", json.dumps(dataclasses.asdict(time)))
            if jax.process_index() == 0:
                # The others may be some steps behind, so this reads the previous report.
                self._read(step - self.config.log_every)
        self.before = now

    def _read(self, step: int) -> None:
        assert self.client is not None  # it is called only with several processes
        found = self.client.key_value_dir_get(f"{_PREFIX}/{step}/")
        if len(found) < jax.process_count():
            return
        self.client.key_value_delete(f"{_PREFIX}/{step}/")
        self.note(sorted((HostTime(**json.loads(text)) for _, text in found), key=lambda time: time.process))

    def note(self, times: Sequence[HostTime]) -> None:
        """Says how far the hosts are apart, and warns of one that stays slow."""
        self.say(report_line(times))
        worst, factor = slowest(times)
        if factor < self.config.slow_host_factor:
            self.slow, self.times_slow = -1, 0
            return
        self.times_slow = self.times_slow + 1 if self.slow == worst.process else 1
        self.slow = worst.process
        if self.times_slow % WARN_AFTER == 0:
            self.say(
                f"warning: process {worst.process} on {worst.host} keeps the other hosts waiting: its steps take "
                f"{factor:.2f} times as long as theirs (warned from {self.config.slow_host_factor:g} on, "
                "config.train.slow_host_factor)"
            )
