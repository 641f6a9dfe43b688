"""How long and in what portions a run trains, and what decides one step."""

import dataclasses
from dataclasses import field

from ecdit.config import PHASE, RESUME, RESUME_OR_PHASE, require
from ecdit.diffusion.flow import FlowConfig
from ecdit.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train."""

    num_steps: int = field(metadata=RESUME)
    batch_size: int = field(metadata=PHASE)  # images a step, over all devices and microbatches
    accumulation: int = field(metadata=RESUME_OR_PHASE)  # microbatches a step
    ema_decay: float = field(metadata=PHASE)  # of step n: min(ema_decay, (1 + n) / (10 + n))
    max_bad_steps: int = field(metadata=RESUME)  # skipped steps in a row after which the run stops
    spike_factor: float  # a step whose loss is above so many times its running mean is skipped; 0: only if not finite
    # without progress after which a process ends with exit code 43; 0 for no watchdog
    watchdog_seconds: float = field(metadata=RESUME)
    # steps between printed lines and TensorBoard's points; metrics.jsonl has every step
    log_every: int = field(metadata=RESUME)
    images_every: int = field(metadata=RESUME)  # steps between images of samples; 0 for those at the end alone
    profile_start: int = field(metadata=RESUME)  # the first step to trace, from 1
    profile_steps: int = field(metadata=RESUME)  # steps to trace; 0 for none
    wandb_project: str = field(metadata=RESUME)  # of Weights & Biases; "" for none

    def __post_init__(self):
        for key in ("num_steps", "batch_size", "accumulation", "max_bad_steps", "log_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        for key in ("images_every", "profile_steps", "watchdog_seconds"):
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


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a training step follows from, beside the model."""

    seed: int  # of the run
    train: TrainConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
