"""The whole experiment as one frozen dataclass, its phases, and what must agree between its parts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from ecdit.checkpoints.config import CheckpointConfig
from ecdit.components import DenoiserConfig
from ecdit.config import RESUME, ConfigError, build, changeable, require, to_dict
from ecdit.data.config import DataConfig
from ecdit.data.registry import module_sha256
from ecdit.diffusion.flow import FlowConfig
from ecdit.encoders.autoencoder import VaeConfig
from ecdit.encoders.text_tower import TextConfig
from ecdit.evaluation.config import EvaluationConfig
from ecdit.files import is_remote
from ecdit.partitioning import MeshConfig, batch_shards
from ecdit.pretrained.clip_text import ClipTextConfig
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.text_encoders import read_encoders
from ecdit.runtime import RuntimeConfig
from ecdit.sampling.sampler import SamplingConfig, check_sampling
from ecdit.system import SystemConfig, denoiser_class, make_system, user_files
from ecdit.training.config import StepConfig, TrainConfig
from ecdit.training.optimizer import OptimizerConfig, check_factors

if TYPE_CHECKING:
    from ecdit.data.latents import LatentsColumn
    from ecdit.data.text_states import TextColumn


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the run that differs from the part before it."""

    after: int  # steps done when it begins
    changes: Mapping[str, Any]  # new values by key, of fields that are marked PHASE: {"model.mask_ratio": 0.0}

    def __post_init__(self):
        require(self.after >= 1, "after", self.after, "must be 1 or more: before it there is a phase already")


class ResolvedPhase(NamedTuple):
    """Steps of a run that are trained alike, and all that they follow from."""

    after: int  # steps done when it begins
    last: int  # step, from 1
    first_row: int  # global row of the data that its first step reads first
    experiment: "Experiment"  # what it trains, without phases


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of: one config file."""

    seed: int
    denoiser: str  # "ec_dit", the paper's, or FILE.py:Class, a user's own: see `components.Denoiser`
    model: DenoiserConfig  # the denoiser's own config
    text: TextConfig
    # identity: latents are pixels; latents: the data holds them, and nothing decodes them; vae: a public AutoencoderKL
    autoencoder: Literal["identity", "latents", "vae"]
    vae: VaeConfig  # of autoencoder "vae"
    data: DataConfig
    flow: FlowConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    phases: tuple[Phase, ...]  # after the first, which is what all other groups say
    checkpoint: CheckpointConfig = field(metadata=RESUME)
    mesh: MeshConfig = field(metadata=RESUME)
    sampling: SamplingConfig = field(metadata=RESUME)
    evaluation: EvaluationConfig = field(metadata=RESUME)  # while it trains
    runtime: RuntimeConfig = field(metadata=RESUME)

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2**32 - 1")
        self._check_tokenizers()
        require(
            self.data.image_size == self.system.image_size,
            "data.image_size",
            self.data.image_size,
            f"the model and its autoencoder take images of {self.system.image_size} pixels",
        )
        require(
            not is_remote(self.data.directory),
            "data.directory",
            self.data.directory,
            "must be a directory: mount the bucket, by launch.tpu's --data or by gcsfuse",
        )
        latents, channels = self.system.reads_latents, self.model.latent_channels
        require(
            self.data.latent_channels == (channels if latents else 0),
            "data.latent_channels",
            self.data.latent_channels,
            f"the autoencoder {self.autoencoder} needs "
            + (f"latents of model.latent_channels, {channels}" if latents else "images: 0"),
        )
        named = self.autoencoder != "vae" or not latents or self.data.latents != ""
        require(
            named, "data.latents", self.data.latents, "must name the column that ecdit.prepare --what=latents fills"
        )
        images = self.system.has_images
        require(
            images or self.train.images_every == 0,
            "train.images_every",
            self.train.images_every,
            f"must be 0: the autoencoder {self.autoencoder} decodes no images",
        )
        for key, none in (("prompts", ""), ("score", "none")):
            value = getattr(self.evaluation, key)
            allowed = f"must be {none!r}: the autoencoder {self.autoencoder} decodes no images"
            require(images or value == none, f"evaluation.{key}", value, allowed)
        if self.phases:
            self.resolved_phases()

    def _check_tokenizers(self) -> None:
        """Raises ConfigError unless the data's tokenizers are of the kind that the text encoder takes.

        Whether a folder's tokenizer has the embedding's tokens is checked when it is read: see `check_tokenizers`.
        """
        text, data = self.text, self.data
        if not text.public:
            allowed = f"must be at least data.vocab_size, {data.vocab_size}"
            require(text.vocab_size >= data.vocab_size, "text.vocab_size", text.vocab_size, allowed)
        named = (text.encode == "prepared") == (data.text_states != "")
        allowed = 'must name the column that ecdit.prepare --what=text fills, if text.encode is "prepared", else ""'
        require(named, "data.text_states", data.text_states, allowed)
        found, wanted = len(data.tokenizer_folders), len(text.folders)
        key = "data.second_tokenizer" if found and wanted else "data.tokenizer"
        value = data.second_tokenizer if found and wanted else data.tokenizer
        allowed = 'must be a .model file or "": text.weights is "random"'
        if wanted:
            allowed = f"must name the folder of a tokenizer for each of {' and '.join(map(str, text.folders))}"
        require(found == wanted, key, value, allowed)

    @classmethod
    def field_types(cls, values: Mapping[str, Any]) -> dict[str, type]:
        """Returns the type of `model`, which depends on the denoiser: see `config.build`."""
        return {"model": denoiser_class(values["denoiser"]).Config} if isinstance(values.get("denoiser"), str) else {}

    @property
    def system(self) -> SystemConfig:
        """Returns the configs that sampling and training need to build the model."""
        return SystemConfig(self.denoiser, self.model, self.text, self.autoencoder, self.vae, self.data.caption_length)

    def fingerprints(self) -> dict[str, str]:
        """Returns the sha256 of the public weights, by the part of the model that has them: see `SystemConfig`."""
        return self.system.fingerprints()

    def user_files(self) -> dict[str, str]:
        """Returns the sha256, by path, of the user's files that the run depends on: of its denoiser and its data."""
        data = {self.data.module: module_sha256(self.data)} if self.data.module else {}
        return user_files(self.denoiser) | data

    def latents_column(self) -> "LatentsColumn":
        """Returns what makes the latents that runs with vae.encode "prepared" read.

        Raises:
          ConfigError: this config's runs read none, or not those of a public autoencoder.
        """
        from ecdit.data.latents import LatentsColumn  # imports Pillow, which a step does not need

        name, encode = self.autoencoder, self.vae.encode
        require(name == "vae", "autoencoder", name, 'must be "vae" for --what=latents')
        require(encode == "prepared", "vae.encode", encode, 'must be "prepared" for --what=latents')
        return LatentsColumn(self.data.latents, Path(self.vae.weights), self.vae.dtype, self.data.image_size)

    def text_column(self) -> "TextColumn":
        """Returns what makes the states that runs with text.encode "prepared" read, once there is a tokenizer.

        Raises:
          ConfigError: this config's runs encode their captions.
        """
        from ecdit.data.text_states import TextColumn
        from ecdit.data.tokens import tokenizer_path  # imports Grain, which a step does not need

        data, encode = self.data, self.text.encode
        require(encode == "prepared", "text.encode", encode, 'must be "prepared" for --what=text')
        place, stored = tokenizer_path(data), self.text.stored
        return TextColumn(data.text_states, self.text, place, data.caption_length, stored)

    @property
    def step_config(self) -> StepConfig:
        """Returns the configs that a training step needs besides the model."""
        return StepConfig(self.seed, self.train, self.flow, self.optimizer)

    def resolved_phases(self) -> tuple[ResolvedPhase, ...]:
        """Returns the run's steps, phase by phase; one phase where the config lists none.

        Raises:
          ConfigError: phases out of order, or one whose values do not fit.
        """
        values: dict[str, Any] = to_dict(self) | {"phases": ()}
        ends = [*(phase.after for phase in self.phases), self.train.num_steps]
        resolved = [ResolvedPhase(0, ends[0], 0, dataclasses.replace(self, phases=()))]
        allowed_keys = changeable(self, "phase")
        for i, phase in enumerate(self.phases):
            key = f"phases[{i}]"
            allowed = f"must be above {resolved[-1].after} and below {self.train.num_steps}, train.num_steps"
            require(resolved[-1].after < phase.after < self.train.num_steps, f"{key}.after", phase.after, allowed)
            for name, value in phase.changes.items():
                wanted = f"a phase can change {', '.join(sorted(allowed_keys))}"
                require(name in allowed_keys, f"{key}.changes.{name}", value, wanted)
                group, _, field = name.partition(".")
                values[group] = values[group] | {field: value}
            try:
                experiment = build(Experiment, values)
            except ConfigError as error:
                raise error.under(key) from None
            before = resolved[-1]
            first_row = before.first_row + (phase.after - before.after) * before.experiment.train.batch_size
            resolved.append(ResolvedPhase(phase.after, ends[i + 1], first_row, experiment))
        return tuple(resolved)

    def phase_of(self, step: int) -> ResolvedPhase:
        """Returns the phase that step `step` (from 1) belongs to; of step 0 the first."""
        return next(phase for phase in reversed(self.resolved_phases()) if phase.after < max(step, 1))

    def next_row(self, step: int) -> int:
        """Returns the global row of the data that the step after `step` reads first."""
        phase = self.phase_of(step)
        return phase.first_row + (step - phase.after) * phase.experiment.train.batch_size


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """Returns a config file's values as an Experiment; see `config.build` for what it refuses."""
    return build(Experiment, values)


def check_trainable(experiment: Experiment) -> None:
    """Raises ConfigError if a run would spend its steps on the states of a text encoder that was never trained."""
    text = experiment.text
    trained = text.public or not text.frozen or experiment.checkpoint.init_from
    require(
        bool(trained) or text.frozen_random_ok,
        "text.weights",
        text.weights,
        "a frozen text encoder must have been trained: name a folder of public weights (docs/weights.md), or a run in "
        "checkpoint.init_from; for a trial on random states set text.frozen_random_ok",
    )


def check_tokenizers(experiment: Experiment) -> None:
    """Raises WeightsError unless every public text encoder has an embedding of its tokenizer's tokens."""
    from ecdit.data.tokenizer import PiecesFile, part_tokenizer
    from ecdit.pretrained.tokenizers import ClipTokenizer

    encoders = read_encoders(experiment.text)
    for folder, encoder in zip(experiment.data.tokenizer_folders, encoders, strict=True):
        tokenizer = part_tokenizer(Path(folder))
        assert not isinstance(tokenizer, PiecesFile)  # as it is a folder
        tokenizer.check_fits(encoder.config.vocab_size)
        # T5's ids are rows of CLIP's larger embedding too.
        if isinstance(tokenizer, ClipTokenizer) != isinstance(encoder.config, ClipTextConfig):
            kind = "CLIP" if isinstance(tokenizer, ClipTokenizer) else "T5"
            raise WeightsError(f"{folder}: its tokenizer is {kind}'s, and {encoder.folder} is another encoder")


def check_mesh(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError when batch, microbatches, groups or heads of any phase do not fit the mesh.

    It raises one, too, if a learning-rate factor belongs to no trained part.
    """
    for phase in experiment.resolved_phases():
        _check_phase(phase.experiment, mesh)


def _check_phase(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    train, shards = experiment.train, batch_shards(mesh)
    parts, system = shards * train.accumulation, make_system(experiment.system)
    components = system.parts
    require(
        train.batch_size % parts == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of {parts}: {shards} parts of the mesh x {train.accumulation} microbatches",
    )
    components.denoiser.check_layout(mesh, train.batch_size // parts, "train")
    components.text.check_layout(mesh)
    check_sampling(experiment.sampling, components.denoiser, mesh)
    if experiment.optimizer.learning_rate_factors:
        check_factors(experiment.optimizer, system.split(system.drawn(system.shapes()))[0])
