"""The training loop: sets up, resumes, steps, saves."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ecdit.checkpoints import restore as checkpoint
from ecdit.checkpoints.async_save import Saver
from ecdit.checkpoints.resume import half_written, newest_sound
from ecdit.config import to_dict
from ecdit.data.loader import make_loader
from ecdit.data.records import Manifest, check_vocabularies, prepare
from ecdit.experiment import Experiment, Part, check_mesh
from ecdit.interop.weights import flat_names
from ecdit.partitioning import batch_sharding, make_mesh
from ecdit.reporting.profiling import Profile
from ecdit.reporting.reporter import Reporter, first_line, forecast, pictures_due
from ecdit.reporting.speed import TimedBatches, stopwatch
from ecdit.reporting.writers import check_writers, open_writers
from ecdit.runs.provenance import library_versions, record_start
from ecdit.runs.sample_grids import SampleWriter
from ecdit.storage import as_path, check_workdir, make_directory
from ecdit.system import System, make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, abstract_state, init_state, sampling_params, state_shardings
from ecdit.training.step import Batch, Metrics, make_train_step
from ecdit.training.watchdog import Watchdog

FORECAST_AFTER = 10  # steps of a start, after which it is said how long the others will take
PREEMPTED = 42  # exit code: saved after SIGTERM, start me again


def train(experiment: Experiment, workdir: Path, origin: dict[str, Any] | None = None) -> int:
    """Trains `experiment` in `workdir`, from its newest checkpoint if it has one.

    Args:
      experiment: what to train.
      workdir: made if it is missing.
      origin: of the experiment, for overrides.json: see `command_line.config_origin`.

    Returns the exit code: 0 when all steps are done, PREEMPTED after a save on SIGTERM.

    Raises:
      UserError: (its subclasses) what does not fit, before the first step; a failed save or write; a diverged run.
    """
    check_writers(experiment)
    check_workdir(workdir)
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    _say(first_line(experiment, mesh))
    parts = experiment.parts()
    systems = [make_system(part.experiment.system) for part in parts]  # of the same parameters
    systems[0].shardings(mesh)  # refuses what cannot be laid out, before anything is written
    manifests = _prepared_data(parts)
    make_directory(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        for left in half_written(workdir):
            _say(f"a save was cut short: {left} is removed")
        saver = stack.enter_context(contextlib.closing(Saver(workdir, experiment.checkpoint, _say)))
        state, check_restored = _first_state(experiment, systems[0], mesh, saver.manager, manifests)
        start = int(state.step)
        record_start(experiment, workdir, start, origin or {})
        writers, leaf_names = open_writers(experiment, workdir, start), list(flat_names(state.params))
        reporter = Reporter(workdir, start, experiment.train, leaf_names, writers)
        stack.enter_context(contextlib.closing(reporter))
        preempted = stack.enter_context(contextlib.closing(PreemptionFlag()))
        watchdog = stack.enter_context(contextlib.closing(Watchdog(experiment.train.watchdog_seconds)))
        for part, system, manifest in zip(parts, systems, manifests, strict=True):
            if int(state.step) >= part.last and part is not parts[-1]:
                continue
            if part.after:
                _say(f"phase from step {part.after + 1} to {part.last}")
            samples = SampleWriter(part.experiment, system, mesh, workdir) if system.config.has_pictures else None
            watched = (check_restored, watchdog, preempted)
            run = Running(experiment, part, system, manifest, mesh, saver, samples, reporter, *watched, workdir)
            state, stopped = _steps(run, state)
            if stopped:
                _say(f"stopped by a signal; saved step {int(state.step)}, the same command goes on from it")
                return PREEMPTED
        drawn = ""
        if samples is not None:
            watchdog.enter("drawing the last pictures", slow=True)
            _say(f"drawing the pictures of step {int(state.step)}")
            files = samples.write(sampling_params(state), int(state.step))
            reporter.pictures(int(state.step), files)
            drawn = f", samples in {files['samples']}"
    _say(f"done: step {int(state.step)}, checkpoint and metrics in {workdir}{drawn}")
    return 0


@dataclasses.dataclass(frozen=True)
class Running:
    """What the steps of a part of the run need beside its state."""

    experiment: Experiment  # of the whole run, with its phases
    part: Part
    system: System  # of the part
    manifest: Manifest  # of the part's data
    mesh: Mesh
    saver: Saver
    samples: SampleWriter | None  # None where the codec has no pictures
    reporter: Reporter
    check_restored: Callable[[], None]  # see recovery.Recovered
    watchdog: Watchdog
    preempted: "PreemptionFlag"
    workdir: Path


def _steps(run: Running, state: TrainState) -> tuple[TrainState, bool]:
    """Steps until the part's last step or a preemption (True); the state with which the run ends is saved."""
    if int(state.step) == run.part.after:  # a new phase's losses are not like those before it
        state = dataclasses.replace(state, usual_loss=state.usual_loss + np.inf)
    config, every, reporter, samples = run.experiment.train, run.experiment.checkpoint.every, run.reporter, run.samples
    watchdog, first_step = run.watchdog, int(state.step) + 1
    first_row = run.experiment.next_row(int(state.step))
    batches = TimedBatches(device_batches(run.part.experiment, run.mesh, first_row))
    train_step = make_train_step(run.part.experiment, run.system, run.mesh)
    reporter.begin(watch := stopwatch(run.part.experiment))

    def report(step: int, metrics: Metrics, data_seconds: float) -> None:
        reporter.report(step, metrics, data_seconds)
        run.check_restored()
        timed = step == reporter.start_step + FORECAST_AFTER and step < config.num_steps
        if timed and (speed := watch.recent()):
            _say(forecast(config, step, speed, run.samples is not None))

    pending: tuple[int, Metrics, float] | None = None
    stop = False
    with contextlib.closing(Profile(config, run.workdir, int(state.step))) as profile:
        for step in range(int(state.step) + 1, run.part.last + 1):
            compiling = step <= first_step + 1
            profile.before(step, state)
            if step == first_step:
                _say(f"compiling, then step {step}")
            watchdog.enter(f"waiting for the data of step {step}", slow=compiling)
            batch = batches.next()
            watchdog.enter(f"in step {step}", slow=compiling)
            state, metrics = train_step(state, batch)
            if pending is not None:  # step n - 1 is read once step n is dispatched: the device never waits for us
                report(*pending)
            pending = (step, metrics, batches.seconds)
            stop = run.preempted.reached(step)
            draw = pictures_due(config, step) and samples is not None and not stop
            save = step % every == 0 or step == config.num_steps or stop
            if draw or save or step == run.part.last:
                report(*pending)  # first, so that a run that resumes from here has this line
                pending = None
            if draw:  # before the save, for the same reason; and before the next step takes the state's memory
                watchdog.enter(f"drawing the pictures of step {step}", slow=True)
                _say(f"drawing the pictures of step {step}")
                reporter.pictures(step, samples.write(sampling_params(state), step))
            if save:
                watchdog.enter(f"saving step {step}", slow=True)
                reporter.save()
                run.saver.save(state, step, _meta(run.experiment, run.manifest, step))
            run.saver.check()
            if stop:
                break
        watchdog.enter(f"waiting for the save of step {int(state.step)}", slow=True)
        run.saver.finish(int(state.step))
    return state, stop and int(state.step) < config.num_steps


class PreemptionFlag:
    """Whether the run was asked to stop by SIGTERM, agreed between all processes."""

    def __init__(self) -> None:
        self.signalled = False
        # With several processes Orbax agrees on a step; with one it does not even notice the signal.
        self.previous = signal.signal(signal.SIGTERM, self._on_signal) if jax.process_count() == 1 else None

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True

    def reached(self, step: int) -> bool:
        """True from the step on at which all processes stop; every process asks at every step."""
        return self.signalled if jax.process_count() == 1 else ocp.multihost.reached_preemption(step)

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


def _prepared_data(parts: Sequence[Part]) -> list[Manifest]:
    """Prepares each part's data on the first process if it is missing; the others wait.

    Raises:
      DataError: it cannot be prepared, or two parts have different vocabularies.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if jax.process_index() == 0:
            _prepare_all(parts)
        multihost_utils.sync_global_devices("data prepared")
    return _prepare_all(parts)


def _prepare_all(parts: Sequence[Part]) -> list[Manifest]:
    configs = [part.experiment.data for part in parts]
    manifests = {config: prepare(config) for config in configs}
    check_vocabularies(configs)
    return [manifests[config] for config in configs]


def _first_state(
    experiment: Experiment, system: System, mesh: Mesh, manager: ocp.CheckpointManager, manifests: Sequence[Manifest]
) -> tuple[TrainState, Callable[[], None]]:
    """The newest sound checkpoint's state and what is left to check of it, or a new one: drawn, or another run's."""
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)

    def admit(saved: checkpoint.Meta, step: int) -> None:
        trained_on = manifests[experiment.parts().index(experiment.part_of(step))]
        checkpoint.check_resume(saved, experiment, trained_on.fingerprint, step)

    abstract = abstract_state(system, optimizer, shardings)
    found = newest_sound(manager, abstract, experiment.checkpoint.verify, admit)
    if found is not None:
        for note in found.notes:
            _say(note)
        _say(f"resumed from step {found.step} of {manager.directory}")
        return found.state, found.check
    weights = None
    if source := experiment.checkpoint.init_from:
        weights, _ = checkpoint.restore_ema(as_path(source, "config.checkpoint.init_from"), system, mesh)
        _say(f"started from the EMA weights of {source}")
    return init_state(system, optimizer, shardings, experiment.seed, weights), lambda: None


def _meta(experiment: Experiment, manifest: Manifest, step: int) -> checkpoint.Meta:
    config, row = to_dict(experiment), experiment.next_row(step)
    return checkpoint.Meta(checkpoint.FORMAT, config, row, manifest.fingerprint, library_versions(), {})


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
