"""The workload that a training run is given: states, steps, batches and images of each phase."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ecdit.checkpoints.compatibility import check_same_model
from ecdit.checkpoints.restore import open_reader, read_meta, restore_ema
from ecdit.config import changeable, to_dict
from ecdit.data.caption_lengths import packing_line
from ecdit.data.config import DataConfig
from ecdit.data.loader import make_loader
from ecdit.data.prepared import Prepared, check_latents, check_same_tokenizer, check_text, prepare
from ecdit.data.tokens import hash_files, tokenizer_files
from ecdit.experiment import Experiment, ResolvedPhase
from ecdit.multihost import on_first
from ecdit.partitioning import batch_sharding, batch_shards
from ecdit.runs.evaluator import Evaluated, Evaluator
from ecdit.runs.inputs import check_placeholder
from ecdit.runs.sample_grids import SampleWriter
from ecdit.runtime import compiler_options
from ecdit.sampling.prompts import prompt_lines
from ecdit.storage import as_path
from ecdit.system import Params, make_system, user_files
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, abstract_state, init_state, state_shardings
from ecdit.training.step import Batch, Metrics, make_gradients, make_train_step


class ImageWriter(Protocol):
    """Draws and writes the images of a step."""

    def write(self, params: Params, step: int, permit: Callable[[], None]) -> Mapping[str, Path]:
        """Writes them, and returns the files by name; all processes call it.

        Drawing takes minutes, so it calls `permit` before it writes, which raises if it must not (see `runs.lock`).
        """
        ...


class StepEvaluator(Protocol):
    """Evaluates the weights of a step."""

    def is_recorded(self, step: int) -> bool:
        """Returns whether an earlier start has done so; all processes call it."""
        ...

    def evaluate(self, params: Params, step: int, permit: Callable[[], None]) -> Evaluated:
        """Evaluates and records it; all processes call it. It calls `permit` as `ImageWriter.write` does."""
        ...


@dataclasses.dataclass(frozen=True)
class Workload:
    """The state, steps, batches and images of a run. Functions of a phase make what differs between phases."""

    abstract: TrainState  # shapes, dtypes and shardings
    first_state: Callable[[], tuple[TrainState, str]]  # of a run without a checkpoint, and where its weights are from
    load: Callable[[], Params]  # the parameters of public weights, which no state or checkpoint brings
    prepare_data: Callable[[], Sequence[str]]  # the fingerprint of each phase's data
    tokenizer: Callable[[], Mapping[str, bytes]]  # the files by which captions are encoded, once the data is prepared
    train_step: Callable[[ResolvedPhase], Callable[[TrainState, Batch], tuple[TrainState, Metrics]]]
    gradients: Callable[[ResolvedPhase], Callable[[TrainState, Batch], Params]]  # of a step alone, for replays
    batches: Callable[[ResolvedPhase, int], Iterator[Batch]]  # from a global row of the data on
    images: Callable[[ResolvedPhase, Path], ImageWriter | None]  # for a workdir; None where there are none to draw
    flops_per_image: Callable[[ResolvedPhase], float]  # of a training step
    # For a workdir; None where the config asks for none.
    evaluator: Callable[[ResolvedPhase, Path], StepEvaluator | None] = lambda phase, workdir: None


def make_workload(experiment: Experiment, mesh: Mesh, init_differences: bool = False) -> Workload:
    """Returns the workload of an experiment on a mesh; allocates nothing.

    With `init_differences` it may start from the weights of a run of another model, text encoder or vocabulary.

    Raises:
      ShardingError: a parameter cannot be laid out on the mesh.
    """
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)

    def first_state() -> tuple[TrainState, str]:
        weights, source = None, experiment.checkpoint.init_from
        if source:
            place = as_path(source, "config.checkpoint.init_from")
            weights, step = restore_ema(place, system, mesh)
            differs = _differences(experiment, place, step, init_differences)
            source += f", though it differs: {differs}" if differs else ""
        return init_state(system, optimizer, shardings, experiment.seed, weights), source

    def train_step(phase: ResolvedPhase) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        one, options = phase.experiment, compiler_options(phase.experiment.runtime, mesh)
        return make_train_step(one.step_config, make_system(one.system), mesh, options)

    def gradients(phase: ResolvedPhase) -> Callable[[TrainState, Batch], Params]:
        one, options = phase.experiment, compiler_options(phase.experiment.runtime, mesh)
        return make_gradients(one.step_config, make_system(one.system), mesh, options)

    def images(phase: ResolvedPhase, workdir: Path) -> SampleWriter | None:
        one = phase.experiment
        if not one.system.has_images:
            return None
        return SampleWriter(one.data, one.sampling, make_system(one.system), mesh, workdir)

    # Once for all phases: the processes compare the file when they start, and it may change while the run goes on.
    read_prompts = functools.cache(prompt_lines)

    def evaluator(phase: ResolvedPhase, workdir: Path) -> Evaluator | None:
        return Evaluator(phase.experiment, mesh, workdir, read_prompts) if phase.experiment.evaluation.every else None

    return Workload(
        abstract=abstract_state(system, optimizer, shardings),
        first_state=first_state,
        load=lambda: system.load(mesh),
        prepare_data=lambda: _prepare_data(experiment, batch_shards(mesh)),
        tokenizer=functools.cache(lambda: tokenizer_files(experiment.data)),
        train_step=train_step,
        gradients=gradients,
        batches=lambda phase, row: device_batches(phase.experiment, mesh, row),
        images=images,
        evaluator=evaluator,
        flops_per_image=lambda phase: make_system(phase.experiment.system).training_flops(),
    )


def _differences(experiment: Experiment, source: Path, step: int, allow: bool) -> str:
    """Compares with the run that weights are from: see `check_same_model`."""
    with open_reader(source) as manager:
        saved = read_meta(manager, step)
    now = to_dict(experiment) | {"files": user_files(experiment.denoiser), "weights": experiment.fingerprints()}
    # A phase may change some of the model too, so weights keep their meaning; and what was trained may be frozen.
    may_differ = changeable(experiment, "resume") | changeable(experiment, "phase") | {"text.frozen"}
    return check_same_model(saved, now, may_differ, hash_files(tokenizer_files(experiment.data)), allow)


def device_batches(experiment: Experiment, mesh: Mesh, start_row: int) -> Iterator[Batch]:
    """Yields batches from global row `start_row` on, each row on the devices that hold it.

    A process reads only its own rows.
    """
    sharding, size = batch_sharding(mesh), experiment.train.batch_size
    slices = sharding.addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[index] for index in slices]))

    def put(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:  # a tuple of slices
            wanted = np.arange(size)[index[0]]
            return local[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)

    for batch in make_loader(experiment.data, experiment.seed, size, start_row, rows):
        yield {name: put(array) for name, array in batch.items()}


def _prepare_data(experiment: Experiment, shards: int) -> list[str]:
    """Prepares the data of each phase and returns its fingerprints; refuses columns of other weights than the run's.

    The first process prints how often packed captions do not fit, on a mesh that splits a batch into `shards` parts.
    """
    experiment.system.share_fingerprints()
    phases = [phase.experiment for phase in experiment.resolved_phases()]
    prepared = prepare_together([phase.data for phase in phases])
    for phase, one in zip(phases, prepared, strict=True):
        if phase.system.reads_latents and phase.system.public_autoencoder:
            check_latents(one, phase.latents_column().made_by)
        if phase.text.encode == "prepared":
            check_text(one, phase.text_column().made_by)
        elif phase.text.packed_length and jax.process_index() == 0:
            parts = shards * phase.train.accumulation
            if line := packing_line(one, phase.text.packed_length, phase.train.batch_size // parts, parts):
                print(line, flush=True)
    return [one.fingerprint for one in prepared]


def prepare_together(configs: Sequence[DataConfig]) -> list[Prepared]:
    """Prepares each data set on the first process if it is missing, while the others wait; returns them opened.

    Raises:
      DataError: one cannot be prepared, or two have different vocabularies.
      ConfigError: a part of a mixture is a placeholder: see `check_placeholder`.
    """
    if jax.process_count() > 1:
        on_first(lambda: _prepare_all(configs))
    return _prepare_all(configs)


def _prepare_all(configs: Sequence[DataConfig]) -> list[Prepared]:
    prepared: list[Prepared] = []
    for n, config in enumerate(configs):
        prepared.append(prepared[configs.index(config)] if config in configs[:n] else prepare(config, _workers()))
        parts = [component.task for component in prepared[-1].composition.components]
        check_placeholder(config, parts, jax.process_count())
    check_same_tokenizer(prepared)
    return prepared


def _workers() -> int:
    return len(os.sched_getaffinity(0))
