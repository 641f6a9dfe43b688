"""The whole experiment as one frozen dataclass, and what must agree between its parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jax.sharding import Mesh

from ecdit.conditioning.text_to_image import SystemConfig
from ecdit.conditioning.text_tower import TextConfig
from ecdit.config import build, require
from ecdit.data.loader import DataConfig
from ecdit.diffusion.flow import FlowConfig
from ecdit.evaluation.sampling import SamplingConfig, check_sampling
from ecdit.models.config import DiTConfig, group_size
from ecdit.partitioning import MeshConfig, batch_shards
from ecdit.runtime import RuntimeConfig
from ecdit.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train."""

    num_steps: int
    batch_size: int  # images of a step, over all devices and microbatches
    accumulation: int  # microbatches of a step
    ema_decay: float  # of step n: min(ema_decay, (1 + n) / (10 + n))
    max_bad_steps: int  # non-finite steps in a row after which the run stops
    log_every: int  # steps between printed lines and TensorBoard's points; metrics.jsonl has every step
    pictures_every: int  # steps between pictures of samples; 0 for those at the end alone
    profile_start: int  # the first step to trace, from 1
    profile_steps: int  # steps to trace; 0 for none
    wandb_project: str  # of Weights & Biases; "" for none

    def __post_init__(self):
        for key in ("num_steps", "batch_size", "accumulation", "max_bad_steps", "log_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        for key in ("pictures_every", "profile_steps"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
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
class CheckpointConfig:
    """When to save, and what to start from."""

    every: int  # steps; the last step is always saved
    keep: int  # newest checkpoints to keep
    init_from: str  # another run's workdir, whose EMA weights to start from at step 0; "" for a fresh start

    def __post_init__(self):
        require(self.every >= 1, "every", self.every, "must be 1 or more")
        require(self.keep >= 1, "keep", self.keep, "must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of: one config file."""

    seed: int
    model: DiTConfig
    text: TextConfig
    codec: Literal["identity", "latents"]
    data: DataConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    sampling: SamplingConfig
    runtime: RuntimeConfig

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2**32 - 1")
        require(
            self.text.vocab_size >= self.data.vocab_size,
            "text.vocab_size",
            self.text.vocab_size,
            f"must be at least data.vocab_size, {self.data.vocab_size}",
        )
        require(
            self.data.image_size == self.system.image_size,
            "data.image_size",
            self.data.image_size,
            f"the model and its codec take pictures of {self.system.image_size} pixels",
        )
        pictures = self.system.has_pictures
        require(
            self.data.latent_channels == (0 if pictures else self.model.latent_channels),
            "data.latent_channels",
            self.data.latent_channels,
            f"the codec {self.codec} needs "
            + ("pictures: 0" if pictures else f"latents of model.latent_channels, {self.model.latent_channels}"),
        )
        require(
            pictures or self.train.pictures_every == 0,
            "train.pictures_every",
            self.train.pictures_every,
            f"must be 0: the codec {self.codec} draws no pictures",
        )

    @property
    def system(self) -> SystemConfig:
        """What sampling and training need to build the model."""
        return SystemConfig(self.model, self.text, self.codec, self.data.caption_length)


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """A config file's values as an Experiment; see `config.build` for what it refuses."""
    return build(Experiment, values)


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Raises ConfigError when the batch, a microbatch or a group does not divide over the mesh."""
    train, model, shards = experiment.train, experiment.model, batch_shards(mesh)
    parts = shards * train.accumulation
    require(
        train.batch_size % parts == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of {parts}: {shards} parts of the mesh x {train.accumulation} microbatches",
    )
    rows, size = train.batch_size // parts, group_size(model.group, model.num_kept)
    require(
        rows * model.num_kept % size == 0,
        "model.group",
        model.group,
        f"must divide a device's tokens per microbatch, {rows} images x {model.num_kept} tokens",
    )
    check_sampling(experiment.sampling, model, mesh)
