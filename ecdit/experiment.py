"""The whole experiment as one frozen dataclass, its phases, and what must agree between its parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from ecdit.checkpoints.config import CheckpointConfig
from ecdit.config import ConfigError, build, require, to_dict
from ecdit.data.tasks import DataConfig
from ecdit.diffusion.flow import FlowConfig
from ecdit.encoders.text_tower import TextConfig
from ecdit.models.config import DiTConfig, group_size
from ecdit.partitioning import MeshConfig, batch_shards
from ecdit.runtime import RuntimeConfig
from ecdit.sampling.sampler import SamplingConfig, check_sampling
from ecdit.system import SystemConfig
from ecdit.training.config import TrainConfig
from ecdit.training.optimizer import OptimizerConfig

# What a phase may change: the parameters keep their shapes, and the data their captions.
PHASE_KEYS = (
    "model.latent_size",
    "model.mask_ratio",
    "model.capacity_factor",
    "model.group",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.directory",
    "data.source",
    "data.image_size",
    "train.batch_size",
    "train.accumulation",
    "train.ema_decay",
    "optimizer.learning_rate",
    "flow.time_mean",
    "flow.time_std",
    "flow.dropped_token_weight",
    "sampling.original_size",
    "sampling.batch_size",
    "sampling.group",
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the run that differs from the part before it."""

    after: int  # steps done when it begins
    changes: Mapping[str, Any]  # new values by key, each one of PHASE_KEYS: {"model.mask_ratio": 0.0}

    def __post_init__(self):
        require(self.after >= 1, "after", self.after, "must be 1 or more: before it there is a phase already")
        for key, value in self.changes.items():
            require(key in PHASE_KEYS, f"changes.{key}", value, f"a phase can change {', '.join(PHASE_KEYS)}")


class Part(NamedTuple):
    """Steps of a run that are trained alike."""

    after: int  # steps done when it begins
    last: int  # step, from 1
    first_row: int  # global row of the data that its first step reads first
    experiment: "Experiment"  # what it trains, without phases


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
    phases: tuple[Phase, ...]  # after the first, which is what all other groups say
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
        if self.phases:
            self.parts()

    @property
    def system(self) -> SystemConfig:
        """What sampling and training need to build the model."""
        return SystemConfig(self.model, self.text, self.codec, self.data.caption_length)

    def parts(self) -> tuple[Part, ...]:
        """The run's steps, phase by phase; one part where there are no phases.

        Raises:
          ConfigError: phases out of order, or one whose values do not fit.
        """
        values: dict[str, Any] = to_dict(self) | {"phases": ()}
        ends = [*(phase.after for phase in self.phases), self.train.num_steps]
        parts = [Part(0, ends[0], 0, dataclasses.replace(self, phases=()))]
        for i, phase in enumerate(self.phases):
            key = f"phases[{i}]"
            allowed = f"must be above {parts[-1].after} and below {self.train.num_steps}, train.num_steps"
            require(parts[-1].after < phase.after < self.train.num_steps, f"{key}.after", phase.after, allowed)
            for name, value in phase.changes.items():
                group, _, field = name.partition(".")
                values[group] = values[group] | {field: value}
            try:
                experiment = build(Experiment, values)
            except ConfigError as error:
                raise error.under(key) from None
            first_row = parts[-1].first_row + (phase.after - parts[-1].after) * parts[-1].experiment.train.batch_size
            parts.append(Part(phase.after, ends[i + 1], first_row, experiment))
        return tuple(parts)

    def part_of(self, step: int) -> Part:
        """The part that step `step` (from 1) belongs to; of step 0 the first."""
        return next(part for part in reversed(self.parts()) if part.after < max(step, 1))

    def next_row(self, step: int) -> int:
        """The global row of the data that the step after `step` reads first."""
        part = self.part_of(step)
        return part.first_row + (step - part.after) * part.experiment.train.batch_size


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """A config file's values as an Experiment; see `config.build` for what it refuses."""
    return build(Experiment, values)


def check_mesh(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError when batch, microbatches, groups or heads of any phase do not divide over the mesh."""
    for part in experiment.parts():
        _check_part(part.experiment, mesh)


def _check_part(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
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
    tensor = mesh.shape["tensor"]
    heads = {"model.heads": model.heads, "model.kv_heads": model.kv_heads, "text.heads": experiment.text.heads}
    for key, count in heads.items():
        require(count % tensor == 0, key, count, f"must be a multiple of mesh.tensor, {tensor}")
    check_sampling(experiment.sampling, model, mesh)
