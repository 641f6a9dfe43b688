"""How long and in what portions a run trains, and what decides one step."""

import dataclasses
from dataclasses import field
from typing import Literal

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.diffusion.flow import FlowConfig
from ecdit.training.optimizer import OptimizerConfig

# What a process of a run can be doing; for the meaning of most see WatchdogConfig. data: waiting for a batch.
Phase = Literal["start", "prepare", "restore", "compile", "data", "step", "save", "draw"]
PATIENCE = 10  # times train.watchdog_seconds, for phases without a limit of their own


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a process ends that is still in a phase; 0 for ten times train.watchdog_seconds."""

    start: float  # until all processes have joined and devices are there
    prepare: float  # preparing data
    restore: float  # reading a checkpoint, or drawing parameters
    compile: float  # the first steps of a start or phase
    save: float  # waiting for a save
    draw: float  # drawing images

    def __post_init__(self):
        for key, value in dataclasses.asdict(self).items():
            require(value >= 0, key, value, "must be 0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train."""

    num_steps: int = field(metadata=RESUME)
    batch_size: int = field(metadata=PHASE)  # images a step, over all devices and microbatches
    accumulation: int = field(metadata=RESUME_OR_PHASE)  # microbatches a step
    ema_decay: float = field(metadata=PHASE)  # of step n: min(ema_decay, (1 + n) / (10 + n))
    max_bad_steps: int = field(metadata=RESUME)  # skipped steps in a row after which the run stops
    spike_factor: float  # a step whose loss is above so many times its running mean is skipped; 0: only if not finite
    # in a step, or waiting for its batch, after which a process ends with exit code 43; 0 for no watchdog
    watchdog_seconds: float = field(metadata=RESUME)
    watchdog: WatchdogConfig = field(metadata=RESUME)  # of the other phases
    # a warning names the host whose steps stay so many times as long as those of the others
    slow_host_factor: float = field(metadata=RESUME)
    # steps between two replays: the gradients of a batch computed twice and compared; 0 for none (see runs.replay)
    replay_every: int = field(metadata=RESUME)
    # steps between printed lines and TensorBoard's points; metrics.jsonl has every step
    log_every: int = field(metadata=RESUME)
    images_every: int = field(metadata=RESUME)  # steps between images of samples; 0 for those at the end alone
    profile_start: int = field(metadata=RESUME)  # the first step to trace, from 1
    profile_steps: int = field(metadata=RESUME)  # steps to trace; 0 for none
    wandb_project: str = field(metadata=RESUME)  # of Weights & Biases; "" for none

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
    """What a training step follows from, beside the model."""

    seed: int  # of the run
    train: TrainConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
