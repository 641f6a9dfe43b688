"""The training loop: sets up, resumes, steps, saves."""

import contextlib
import importlib.metadata
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ecdit.conditioning.text_to_image import System, make_system
from ecdit.config import to_dict
from ecdit.data.loader import make_loader
from ecdit.data.records import Manifest, captions, prepare
from ecdit.evaluation.pictures import save_grid
from ecdit.interop.weights import flat_names
from ecdit.partitioning import batch_sharding, make_mesh
from ecdit.training import checkpoint
from ecdit.training.experiment import Experiment, check_mesh
from ecdit.training.optimizer import make_optimizer
from ecdit.training.reporting import Reporter
from ecdit.training.restored import CONFIG_FILE, Run, sample_run
from ecdit.training.state import TrainState, abstract_state, init_state, state_shardings
from ecdit.training.step import Batch, make_train_step

PREEMPTED = 42  # exit code: saved after SIGTERM, start me again


def train(experiment: Experiment, workdir: Path) -> int:
    """Trains `experiment` in `workdir`, from its newest checkpoint if it has one.

    Returns the exit code: 0 when all steps are done, PREEMPTED after a save on SIGTERM.

    Raises:
      UserError: (its subclasses) what does not fit, before the first step; a failed save; a diverged run.
    """
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    system = make_system(experiment.system)
    system.shardings(mesh)  # refuses what cannot be laid out, before anything is written
    manifest = _prepared_data(experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh), checkpoint.open_manager(workdir, experiment.checkpoint) as manager:
        state, next_row = _first_state(experiment, system, mesh, manager, manifest)
        _write_config(experiment, workdir)
        batches = device_batches(experiment, mesh, next_row)
        state, preempted = _run(experiment, system, mesh, manager, manifest, state, batches, workdir)
        if preempted:
            _say(f"stopped by a signal; saved step {int(state.step)}, the same command goes on from it")
            return PREEMPTED
        grid = _sample_grid(experiment, system, mesh, state, workdir)
    _say(f"done: step {int(state.step)}, checkpoint and metrics in {workdir}, samples in {grid}")
    return 0


def _run(
    experiment: Experiment,
    system: System,
    mesh: Mesh,
    manager: ocp.CheckpointManager,
    manifest: Manifest,
    state: TrainState,
    batches: Iterator[Batch],
    workdir: Path,
) -> tuple[TrainState, bool]:
    """Steps until the last step or a preemption; the state it returns is saved."""
    config, start = experiment.train, int(state.step)
    train_step = make_train_step(experiment, system, mesh)
    pending: tuple[int, Any] | None = None
    stop = False
    with (
        contextlib.closing(Reporter(workdir, start, config, list(flat_names(state.params)))) as reporter,
        contextlib.closing(PreemptionFlag(manager)) as preempted,
    ):
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = train_step(state, next(batches))
            if pending is not None:  # step n - 1 is read once step n is dispatched: the device never waits for us
                reporter.report(*pending)
            pending = (step, metrics)
            stop = preempted.reached(step)
            if step % experiment.checkpoint.every == 0 or step == config.num_steps or stop:
                reporter.report(*pending)  # first, so that a run that resumes from here has this line
                pending = None
                checkpoint.save(manager, state, step, _meta(experiment, manifest, step))
            checkpoint.check_saves(manager)
            if stop:
                break
        checkpoint.finish_saves(manager)
    return state, stop and int(state.step) < config.num_steps


class PreemptionFlag:
    """Whether the run was asked to stop by SIGTERM, agreed between all processes."""

    def __init__(self, manager: ocp.CheckpointManager):
        self.manager, self.signalled = manager, False
        # With several processes Orbax agrees on a step; with one it does not even notice the signal.
        self.previous = signal.signal(signal.SIGTERM, self._on_signal) if jax.process_count() == 1 else None

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True

    def reached(self, step: int) -> bool:
        """True from the step on at which all processes stop; every process asks at every step."""
        return self.signalled if jax.process_count() == 1 else self.manager.reached_preemption(step)

    def close(self) -> None:
        """Gives the signal back to whom it belonged."""
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)


def device_batches(experiment: Experiment, mesh: Mesh, start_row: int) -> Iterator[Batch]:
    """Batches from global row `start_row` on, each row on the devices that hold it; a process reads only its rows."""
    sharding, size = batch_sharding(mesh), experiment.train.batch_size
    slices = sharding.addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[index] for index in slices]))

    def put(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(size)[index[0]]
            return local[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)

    for batch in make_loader(experiment.data, experiment.seed, size, start_row, rows):
        yield {name: put(array) for name, array in batch.items()}


def _prepared_data(experiment: Experiment) -> Manifest:
    """Prepares the data on the first process if it is missing; the others wait."""
    if jax.process_count() == 1:
        return prepare(experiment.data)
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        prepare(experiment.data)
    multihost_utils.sync_global_devices("data prepared")
    return prepare(experiment.data)


def _first_state(
    experiment: Experiment, system: System, mesh: Mesh, manager: ocp.CheckpointManager, manifest: Manifest
) -> tuple[TrainState, int]:
    """The newest checkpoint's state and data position, or a new state: drawn, or with another run's weights."""
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)
    step = manager.latest_step()
    if step is not None:
        saved = checkpoint.read_meta(manager, step)
        checkpoint.check_resume(saved, experiment, manifest.fingerprint)
        state = checkpoint.restore(manager, step, abstract_state(system, optimizer, shardings))
        _say(f"resumed from step {step} of {manager.directory}")
        return state, saved.next_row
    weights = None
    if experiment.checkpoint.init_from:
        weights, _ = checkpoint.restore_ema(Path(experiment.checkpoint.init_from), system, mesh)
        _say(f"started from the EMA weights of {experiment.checkpoint.init_from}")
    return init_state(system, optimizer, shardings, experiment.seed, weights), 0


def _meta(experiment: Experiment, manifest: Manifest, step: int) -> checkpoint.Meta:
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    }
    next_row = step * experiment.train.batch_size
    return checkpoint.Meta(checkpoint.FORMAT, to_dict(experiment), next_row, manifest.fingerprint, versions)


def _write_config(experiment: Experiment, workdir: Path) -> None:
    if jax.process_index() == 0:
        (workdir / CONFIG_FILE).write_text(json.dumps(to_dict(experiment), indent=2) + "\n")


def _sample_grid(experiment: Experiment, system: System, mesh: Mesh, state: TrainState, workdir: Path) -> Path:
    """Samples training captions, evenly spaced over the data, with the EMA weights."""
    everything = captions(experiment.data)
    count = min(experiment.sampling.num_grid, len(everything))
    prompts = [everything[i] for i in np.linspace(0, len(everything) - 1, count).astype(int)]
    run = Run(experiment, system, mesh, state.ema, int(state.step))
    pictures = sample_run(run, prompts, [0] * count)
    path = workdir / "samples" / f"step_{run.step:08d}.png"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(pictures, prompts, path)
    return path


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
