"""The configs of training: the length of a run, its batches and intervals, and everything that decides one step."""

import dataclasses
from dataclasses import field
from typing import Literal

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.diffusion.flow import FlowConfig
from ecdit.training.optimizer import OptimizerConfig

# Activities of a run's process. WatchdogConfig describes most of them; data is waiting for a batch.
Phase = Literal["start", "prepare", "restore", "compile", "data", "step", "save", "draw"]
PATIENCE = 10  # factor on train.watchdog_seconds for activities without their own limit


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a process ends that is still in a phase; 0 for ten times train.watchdog_seconds."""

    start: float  # joining all processes and finding devices
    prepare: float  # preparing data
    restore: float  # reading a checkpoint, or drawing parameters
    compile: float  # the first steps of a start or a phase
    save: float  # waiting for a save
    draw: float  # drawing images

    def __post_init__(self):
        for key, value in dataclasses.asdict(self).items():
            require(value >= 0, key, value, "must be 0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Sets the length of a run, its batches and its intervals."""

    num_steps: int = field(metadata=RESUME)
    batch_size: int = field(metadata=PHASE)  # images per step, over all devices and microbatches
    accumulation: int = field(metadata=RESUME_OR_PHASE)  # microbatches per step
    ema_decay: float = field(metadata=PHASE)  # decay at step n is min(ema_decay, (1 + n) / (10 + n))
    max_bad_steps: int = field(metadata=RESUME)  # skipped steps in a row after which the run stops
    spike_factor: float  # skips steps whose loss exceeds its running mean by this factor; 0: only non-finite ones
    # longest time in a step or waiting for its batch, after which a process ends with exit code 43; 0 for no watchdog
    watchdog_seconds: float = field(metadata=RESUME)
    watchdog: WatchdogConfig = field(metadata=RESUME)  # limits of other activities
    # a warning names a host whose steps stay this many times as long as those of the others
    slow_host_factor: float = field(metadata=RESUME)
    # steps between replays, which compute a batch's gradients twice and compare them; 0 for none (see runs.replay)
    replay_every: int = field(metadata=RESUME)
    # steps between printed lines and between points in TensorBoard; metrics.jsonl has every step
    log_every: int = field(metadata=RESUME)
    images_every: int = field(metadata=RESUME)  # steps between sample grids; 0 draws one only at the end
    profile_start: int = field(metadata=RESUME)  # the first step to trace, from 1
    profile_steps: int = field(metadata=RESUME)  # steps to trace; 0 for none
    wandb_project: str = field(metadata=RESUME)  # project in Weights & Biases; "" for none

    def __post_init__(self):
        for key in ("num_steps", "batch_size", "accumulation", "max_bad_steps", "log_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        require(self.slow_host_factor > 1, "slow_host_factor", self.slow_host_factor, "must be above 1")
        require(self.num_steps < 2**31, "num_steps", self.num_steps, "must be below 2**31: steps are counted in int32")
        for key in ("images_every", "profile_steps", "watchdog_seconds", "replay_every"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        factor = self.spike_factor
        require(factor == 0 or factor > 1, "spike_factor", factor, "must be above 1, or 0 to skip no finite step")
        first = 1 if self.profile_steps else 0
        require(self.profile_start >= first, "profile_start", self.profile_start, f"must be {first} or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be in [0, 1)")
        require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"must divide the batch size, {self.batch_size}",
        )

    def watchdog_limits(self) -> dict[Phase, float]:
        """Returns the seconds that each phase may take; none where there is no watchdog."""
        seconds = self.watchdog_seconds
        if not seconds:
            return {}
        others: dict[Phase, float] = {
            "start": self.watchdog.start,
            "prepare": self.watchdog.prepare,
            "restore": self.watchdog.restore,
            "compile": self.watchdog.compile,
            "save": self.watchdog.save,
            "draw": self.watchdog.draw,
        }
        limits: dict[Phase, float] = {"step": seconds, "data": seconds}
        limits.update({phase: limit or PATIENCE * seconds for phase, limit in others.items()})
        return limits


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The configs that decide the result of a training step, besides the model."""

    seed: int  # the run's seed
    train: TrainConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
