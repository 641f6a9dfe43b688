"""A training run in a workdir: sets up, resumes, steps through its phases, saves, reports and draws."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.async_save import AsyncSaver
from ecdit.checkpoints.compatibility import check_resume
from ecdit.checkpoints.restore import Meta
from ecdit.checkpoints.resume import half_written, newest_valid
from ecdit.config import changeable, to_dict
from ecdit.exit_codes import PREEMPTED
from ecdit.experiment import Experiment, ResolvedPhase, check_mesh
from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.reporting.profiling import Profile
from ecdit.reporting.reporter import Reporter, first_line, forecast, pictures_due
from ecdit.reporting.speed import Stopwatch, stopwatch
from ecdit.reporting.writers import check_writers, open_writers
from ecdit.runs.provenance import library_versions, record_start
from ecdit.runs.workload import ImageWriter, Workload, make_workload
from ecdit.storage import check_workdir, make_directory
from ecdit.system import user_files
from ecdit.training.loop import Hooks, PreemptionFlag, run_steps
from ecdit.training.state import TrainState, sampling_params
from ecdit.training.step import Metrics
from ecdit.training.watchdog import Watchdog

FORECAST_AFTER = 10  # steps of a start, after which it says how long the others will take


def train(experiment: Experiment, workdir: Path, origin: dict[str, Any] | None = None) -> int:
    """Trains `experiment` in `workdir`, from its newest valid checkpoint if it has one.

    Args:
      experiment: what to train.
      workdir: is made if it is missing.
      origin: of the experiment, for overrides.json: see `command_line.config_origin`.

    Returns the exit code: 0 when all steps are done, PREEMPTED after a save on SIGTERM.

    Raises:
      UserError: (its subclasses) what does not fit, before the first step; a failed save or write; a diverged run.
    """
    check_writers(experiment.train.wandb_project)
    check_workdir(workdir)
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    say(first_line(experiment.train, experiment.model.dtype, mesh))
    workload = make_workload(experiment, mesh)  # refuses what cannot be laid out, before anything is written
    with jax.set_mesh(mesh):
        return run_workload(workload, experiment, workdir, origin or {})


def run_workload(workload: Workload, experiment: Experiment, workdir: Path, origin: dict[str, Any]) -> int:
    """Trains a workload by the schedule of `experiment`, with its mesh set. See `train`."""
    fingerprints, config = workload.prepare_data(), to_dict(experiment)
    make_directory(workdir)
    with contextlib.ExitStack() as stack:
        for left in half_written(workdir):
            say(f"a save was cut short: {left} is removed")
        saver = stack.enter_context(contextlib.closing(AsyncSaver(workdir, experiment.checkpoint, say)))
        assert saver.manager is not None  # it has not saved yet
        state, check_restored = _resumed_or_first(workload, experiment, saver.manager, fingerprints)
        start = int(state.step)
        record_start(config, workdir, start, origin)
        writers = open_writers(experiment.train.wandb_project, config, workdir, start)
        reporter = Reporter(workdir, start, experiment.train, list(flat_names(state.params)), writers)
        stack.enter_context(contextlib.closing(reporter))
        preempted = stack.enter_context(contextlib.closing(PreemptionFlag()))
        watchdog = stack.enter_context(contextlib.closing(Watchdog(experiment.train.watchdog_seconds)))
        run = _Run(workload, experiment, workdir, saver, reporter, watchdog, preempted, check_restored)
        phases = experiment.resolved_phases()
        images = None
        for phase, fingerprint in zip(phases, fingerprints, strict=True):
            if int(state.step) >= phase.last and phase is not phases[-1]:
                continue
            if phase.after:
                say(f"phase from step {phase.after + 1} to {phase.last}")
            images = workload.images(phase, workdir)
            state, stopped = run.steps_of(phase, fingerprint, images, state)
            if stopped and int(state.step) < experiment.train.num_steps:
                say(f"stopped by a signal; saved step {int(state.step)}, the same command goes on from it")
                return PREEMPTED
        drawn = ""
        if images is not None:
            watchdog.enter("drawing the last pictures", slow=True)
            drawn = f", samples in {run.draw(images, int(state.step), state)['samples']}"
    say(f"done: step {int(state.step)}, checkpoint and metrics in {workdir}{drawn}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all phases of a run share."""

    workload: Workload
    experiment: Experiment  # of the whole run, with its phases
    workdir: Path
    saver: AsyncSaver
    reporter: Reporter
    watchdog: Watchdog
    preempted: PreemptionFlag
    check_restored: Callable[[], None]  # see resume.Recovered

    def steps_of(
        self, phase: ResolvedPhase, fingerprint: str, images: ImageWriter | None, state: TrainState
    ) -> tuple[TrainState, bool]:
        """Steps to the end of a phase, or to a stop; saves the state that the run ends with."""
        first = int(state.step) + 1
        if first == phase.after + 1:  # a new phase's losses are not like those before it
            state = dataclasses.replace(state, usual_loss=state.usual_loss + np.inf)
        watch = stopwatch(phase.experiment.train.batch_size, self.workload.flops_per_image(phase))
        self.reporter.begin(watch)
        batches = self.workload.batches(phase, self.experiment.next_row(int(state.step)))
        train_step = self.workload.train_step(phase)
        with contextlib.closing(Profile(self.experiment.train, self.workdir, int(state.step))) as profile:
            hooks = self._hooks(profile, watch, fingerprint, images, first)
            return run_steps(train_step, state, batches, phase.last, hooks)

    def _hooks(
        self, profile: Profile, watch: Stopwatch, fingerprint: str, images: ImageWriter | None, first: int
    ) -> Hooks:
        config, every = self.experiment.train, self.experiment.checkpoint.every

        def before_step(step: int, state: TrainState) -> None:
            profile.before(step, state)
            if step == first:
                say(f"compiling, then step {step}")

        def report(step: int, metrics: Metrics, data_seconds: float) -> None:
            self.reporter.report(step, metrics, data_seconds)
            self.check_restored()
            timed = step == self.reporter.start_step + FORECAST_AFTER and step < config.num_steps
            if timed and (speed := watch.recent()):
                say(forecast(config, step, speed, images is not None))

        def draw(step: int, state: TrainState) -> None:
            assert images is not None  # or `draws` would be False
            self.draw(images, step, state)

        def save(step: int, state: TrainState) -> None:
            self.reporter.save()
            self.saver.save(state, step, _meta(self.experiment, fingerprint, step))

        return Hooks(
            watch=lambda what, slow: self.watchdog.enter(what, slow=slow),
            before_step=before_step,
            report=report,
            draws=lambda step: images is not None and pictures_due(config, step),
            draw=draw,
            saves=lambda step: step % every == 0 or step == config.num_steps,
            save=save,
            after_step=self.saver.check,
            finish=self.saver.finish,
            stop_requested=self.preempted.reached,
        )

    def draw(self, images: ImageWriter, step: int, state: TrainState) -> dict[str, Path]:
        """Draws with the EMA weights, and returns the files by name."""
        say(f"drawing the pictures of step {step}")
        files = dict(images.write(sampling_params(state), step))
        self.reporter.pictures(step, files)
        return files


def say(line: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _resumed_or_first(
    workload: Workload, experiment: Experiment, manager: ocp.CheckpointManager, fingerprints: Sequence[str]
) -> tuple[TrainState, Callable[[], None]]:
    """The newest valid checkpoint's state and what is left to check of it, or a new state."""
    config = config_of_run(experiment)

    def admit(saved: Meta, step: int) -> None:
        trained_on = fingerprints[experiment.resolved_phases().index(experiment.phase_of(step))]
        check_resume(saved, config, changeable(experiment, "resume"), trained_on, step)

    found = newest_valid(manager, workload.abstract, experiment.checkpoint.verify, admit)
    if found is not None:
        for note in found.notes:
            say(note)
        say(f"resumed from step {found.step} of {manager.directory}")
        return found.state, found.check
    state, source = workload.first_state()
    if source:
        say(f"started from the EMA weights of {source}")
    return state, lambda: None


def config_of_run(experiment: Experiment) -> dict[str, Any]:
    """Returns all that a run's config says, with the hashes of the user's files that it names."""
    return to_dict(experiment) | {"files": user_files(experiment.denoiser)}


def _meta(experiment: Experiment, fingerprint: str, step: int) -> Meta:
    return Meta(FORMAT, config_of_run(experiment), experiment.next_row(step), fingerprint, library_versions(), {})
