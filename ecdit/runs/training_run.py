"""A training run in a workdir: sets up, resumes, steps through its phases, saves, reports and draws."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.async_save import AsyncSaver
from ecdit.checkpoints.compatibility import changed_code, check_position, check_resume
from ecdit.checkpoints.restore import Meta
from ecdit.checkpoints.resume import half_written, newest_valid
from ecdit.config import changeable, to_dict
from ecdit.data.tokens import hash_files
from ecdit.errors import UserError
from ecdit.exit_codes import INTERRUPTED, PREEMPTED
from ecdit.experiment import Experiment, ResolvedPhase, check_mesh, check_tokenizers, check_trainable
from ecdit.interop.weights import flat_names
from ecdit.multihost import anywhere, host_differences, on_first, say, together
from ecdit.partitioning import make_mesh
from ecdit.reporting.profiling import Profile
from ecdit.reporting.reporter import Reporter, first_line, forecast, images_due
from ecdit.reporting.speed import Stopwatch, stopwatch
from ecdit.reporting.writers import check_writers, open_writers
from ecdit.runs.activity import Activity
from ecdit.runs.evaluator import drop_later, host_facts
from ecdit.runs.host_times import HostTimes
from ecdit.runs.inputs import check_placeholder, inputs_line
from ecdit.runs.kept_tokenizer import keep_tokenizer
from ecdit.runs.lock import Lock, locked
from ecdit.runs.lost_checkpoints import check_not_lost, set_metrics_aside, set_records_aside
from ecdit.runs.provenance import (
    code_state,
    config_hash,
    facts_of_a_host,
    library_versions,
    record_save,
    record_start,
)
from ecdit.runs.replay import check_deterministic, replayed
from ecdit.runs.workload import ImageWriter, StepEvaluator, Workload, make_workload
from ecdit.storage import check_workdir, make_directory
from ecdit.training.loop import Hooks, StopRequests, run_steps
from ecdit.training.state import TrainState, sampling_params
from ecdit.training.step import Metrics

FORECAST_AFTER = 10  # steps of a start after which it prints how long the others will take


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The user's consent to unusual starts, by the flags `--start_over` and `--accept_...` of `ecdit.train`."""

    start_over: bool = False  # start at step 0 if checkpoints have vanished, and move the old records aside
    data_order: bool = False  # resume although another version of a library may order the data differently
    init_differences: bool = False  # start from weights of a run with another model, text encoder or vocabulary


def train(
    experiment: Experiment,
    workdir: Path,
    origin: dict[str, Any] | None = None,
    accepted: Accepted | None = None,
    activity: Activity | None = None,
) -> int:
    """Trains `experiment` in `workdir`, from its newest valid checkpoint if it has one.

    Args:
      experiment: what to train.
      workdir: is made if it is missing.
      origin: of the experiment, for overrides.json: see `command_line.config_origin`.
      accepted: what is refused otherwise.
      activity: of this process, where it was begun before.

    Returns the exit code: 0 when all steps are done; after a save PREEMPTED on SIGTERM, INTERRUPTED on Ctrl-C.

    Raises:
      UserError: (its subclasses) what does not fit, before the first step; a failed save or write; a diverged run.
    """
    say(inputs_line(experiment))
    check_writers(experiment.train.wandb_project)
    check_workdir(workdir)
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    for phase in experiment.resolved_phases():
        check_placeholder(phase.experiment.data, [phase.experiment.data.task], jax.process_count())
    check_trainable(experiment)
    check_tokenizers(experiment)
    flags = experiment.runtime.xla_flags
    check_deterministic(experiment.train.replay_every, mesh.devices.flat[0].platform, flags)
    say(first_line(experiment.train, experiment.model.dtype, mesh))
    accepted = accepted or Accepted()
    # Raises if the run does not fit the mesh, before anything is written.
    workload = make_workload(experiment, mesh, accepted.init_differences)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        activity = activity or stack.enter_context(contextlib.closing(Activity(experiment.train)))
        return run_workload(workload, experiment, workdir, origin or {}, accepted, activity)


def run_workload(
    workload: Workload,
    experiment: Experiment,
    workdir: Path,
    origin: dict[str, Any],
    accepted: Accepted,
    activity: Activity,
) -> int:
    """Trains a workload by the schedule of `experiment`, with its mesh set. See `train`."""
    activity.enter("prepare", "preparing the data")
    fingerprints, config = workload.prepare_data(), to_dict(experiment)
    activity.enter("start", "comparing the processes and locking the workdir")
    full = config_of_run(experiment)  # once: the user's files may change while the run goes on
    tokenizer = workload.tokenizer()
    facts = facts_of_a_host(full, fingerprints, hash_files(tokenizer)) | host_facts(experiment.evaluation)
    if differences := host_differences(facts):
        raise UserError("the hosts would not train the same:\n  " + "\n  ".join(differences))
    make_directory(workdir)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(workdir, say))
        activity.enter("restore", "restoring or drawing the state")
        for left in together(lambda: half_written(workdir)):
            say(f"a save was cut short: {left} is removed")
        saved = functools.partial(_note_save, workdir, lock)
        saver = AsyncSaver(workdir, experiment.checkpoint, say, saved, lock.check_write)
        stack.enter_context(contextlib.closing(saver))
        assert saver.manager is not None  # it has not saved yet
        found = _resumed(workload, experiment, full, saver.manager, fingerprints, accepted, lock)
        state, check_restored = found or (_first_state(workload, experiment, workdir, accepted), lambda: None)
        state = dataclasses.replace(state, loaded=workload.load())
        start = int(state.step)

        def open_records() -> Reporter:
            lock.check_write()  # restoring may have taken longer than a lease
            activity.ledger.open(workdir, start)
            record_start(config, workdir, start, {**origin, "files": full["files"]})
            if jax.process_index() == 0:
                keep_tokenizer(tokenizer, workdir)
                drop_later(workdir, start)
            writers = open_writers(experiment.train.wandb_project, config, workdir, start)
            names = list(flat_names(state.params))
            return Reporter(workdir, start, experiment.train, names, writers, lock.check_write)

        reporter = stack.enter_context(contextlib.closing(together(open_records)))
        stops = stack.enter_context(contextlib.closing(StopRequests()))
        times = HostTimes(experiment.train, lambda: activity.ledger.record.seconds, say)
        run = _Run(workload, experiment, full, workdir, saver, reporter, activity, stops, check_restored, lock, times)
        phases = experiment.resolved_phases()
        images = None
        for phase, fingerprint in zip(phases, fingerprints, strict=True):
            if int(state.step) > phase.last and phase is not phases[-1]:
                continue
            evaluator = together(functools.partial(workload.evaluator, phase, workdir))
            run.evaluate_missed(phase, evaluator, state)
            if int(state.step) == phase.last and phase is not phases[-1]:
                continue
            if phase.after:
                say(f"phase from step {phase.after + 1} to {phase.last}")
            images = together(functools.partial(workload.images, phase, workdir))
            state, stopped = run.steps_of(phase, fingerprint, images, evaluator, state)
            if stopped and int(state.step) < experiment.train.num_steps:
                # All get one exit code.
                interrupted = anywhere(UserError("interrupted") if stops.interrupted else None) is not None
                by = "Ctrl-C" if interrupted else "a signal"
                say(f"stopped by {by}; saved step {int(state.step)}, the same command goes on from it")
                return INTERRUPTED if interrupted else PREEMPTED
            if stopped:  # in the last step, which leaves no next start to evaluate it
                run.evaluate_missed(phase, evaluator, state)
        run.check_restored()  # where no step follows a restored checkpoint, nothing else would
        drawn = ""
        if images is not None:
            activity.enter("draw", "drawing the last images")
            drawn = f", samples in {run.draw(images, int(state.step), state)['samples']}"
    say(f"done: step {int(state.step)}, checkpoint and metrics in {workdir}{drawn}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """The objects that all phases of a run share."""

    workload: Workload
    experiment: Experiment  # the whole run, with its phases
    config: Mapping[str, Any]  # the same as a dict, with hashes of the user's files (see `config_of_run`)
    workdir: Path
    saver: AsyncSaver
    reporter: Reporter
    activity: Activity
    stops: StopRequests
    check_restored: Callable[[], None]  # from resume.Recovered
    lock: Lock
    host_times: HostTimes

    def steps_of(
        self,
        phase: ResolvedPhase,
        fingerprint: str,
        images: ImageWriter | None,
        evaluator: StepEvaluator | None,
        state: TrainState,
    ) -> tuple[TrainState, bool]:
        """Trains to the end of a phase, or to a stop; saves the state that the run ends with."""
        first = int(state.step) + 1
        if first == phase.after + 1:  # a new phase's losses may differ from those before it
            state = dataclasses.replace(state, usual_loss=state.usual_loss + np.inf)
        watch = stopwatch(phase.experiment.train.batch_size, self.workload.flops_per_image(phase))
        self.reporter.begin(watch)
        batches = self.workload.batches(phase, self.experiment.next_row(int(state.step)))
        train_step, gradients = self.workload.train_step(phase), self.workload.gradients(phase)
        compiling = functools.partial(self.activity.enter, "compile", "compiling and replaying a step")
        train_step = replayed(train_step, gradients, self.experiment.train.replay_every, int(state.step), compiling)
        profile = Profile(self.experiment.train, self.workdir, int(state.step), self.saver.settle)
        with contextlib.closing(profile):
            hooks = self._hooks(profile, watch, fingerprint, images, evaluator, first)
            return run_steps(train_step, state, batches, phase.last, hooks)

    def _hooks(
        self,
        profile: Profile,
        watch: Stopwatch,
        fingerprint: str,
        images: ImageWriter | None,
        evaluator: StepEvaluator | None,
        first: int,
    ) -> Hooks:
        config, every = self.experiment.train, self.experiment.checkpoint.every

        def draws(step: int) -> bool:
            return images is not None and images_due(config, step)

        def evaluates(step: int) -> bool:
            return evaluator is not None and self.experiment.evaluation.is_due(step)

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
            if images is not None and draws(step):
                self.draw(images, step, state)
            if evaluator is not None and evaluates(step):
                self.evaluate(evaluator, step, state)

        def save(step: int, state: TrainState) -> None:
            self.lock.check()
            self.reporter.save()
            self.activity.ledger.mark(step)
            vocabulary = hash_files(self.workload.tokenizer())
            self.saver.save(state, step, _meta(self.experiment, self.config, fingerprint, vocabulary, step))

        def after_step(step: int) -> None:
            self.lock.check()
            self.saver.check()
            self.host_times.after_step(step)

        return Hooks(
            enter=self.activity.enter,
            before_step=before_step,
            report=report,
            draws=lambda step: draws(step) or evaluates(step),
            draw=draw,
            saves=lambda step: step % every == 0 or step == config.num_steps,
            save=save,
            after_step=after_step,
            finish=self.saver.finish,
            stop_requested=self.stops.reached,
        )

    def draw(self, images: ImageWriter, step: int, state: TrainState) -> dict[str, Path]:
        """Draws with the EMA weights, and returns the files by name."""
        self.lock.check_write()
        say(f"drawing the images of step {step}")
        files = dict(images.write(sampling_params(state), step, self.lock.check_write))
        self.reporter.images(step, files)
        return files

    def evaluate_missed(self, phase: ResolvedPhase, evaluator: StepEvaluator | None, state: TrainState) -> None:
        """Evaluates the step that `state` is of, if the run was stopped there: it saved that step unevaluated."""
        done = int(state.step)
        if evaluator is None or not self.experiment.evaluation.is_due(done) or not phase.after < done <= phase.last:
            return
        if not evaluator.is_recorded(done):
            self.reporter.begin(stopwatch(phase.experiment.train.batch_size, self.workload.flops_per_image(phase)))
            self.activity.enter("draw", f"evaluating step {done}")
            self.evaluate(evaluator, done, state)

    def evaluate(self, evaluator: StepEvaluator, step: int, state: TrainState) -> None:
        """Evaluates the EMA weights, and reports the result."""
        self.check_restored()
        self.lock.check_write()
        say(f"evaluating step {step}")
        found = evaluator.evaluate(sampling_params(state), step, self.lock.check_write)
        self.reporter.evaluation(step, found.scalars, found.files)


def _resumed(
    workload: Workload,
    experiment: Experiment,
    config: Mapping[str, Any],
    manager: ocp.CheckpointManager,
    fingerprints: Sequence[str],
    accepted: Accepted,
    lock: Lock,
) -> tuple[TrainState, Callable[[], None]] | None:
    """Returns the newest valid checkpoint's state and what is left to check of it, or None if there are none."""
    versions = library_versions()

    def admit(saved: Meta, step: int) -> None:
        trained_on = fingerprints[experiment.resolved_phases().index(experiment.phase_of(step))]
        resume, in_phases = changeable(experiment, "resume"), changeable(experiment, "phase")
        check_resume(saved, config, resume, trained_on, step, in_phases)
        check_position(saved, experiment.next_row(step), versions, accepted.data_order)
        if note := changed_code(saved, versions, code_state()):
            say(note)

    found = newest_valid(manager, workload.abstract, experiment.checkpoint.verify, admit, lock.check_write)
    if found is None:
        return None
    for note in found.notes:
        say(note)
    say(f"resumed from step {found.step} of {manager.directory}")
    return found.state, found.check


def _first_state(workload: Workload, experiment: Experiment, workdir: Path, accepted: Accepted) -> TrainState:
    """Returns the state of a run without checkpoints; refuses if it has lost them."""

    def check() -> None:
        if not accepted.start_over:
            check_not_lost(workdir, experiment.checkpoint.every)
            if place := set_metrics_aside(workdir):
                say(f"no step was saved, so the run begins at step 0; metrics of its earlier steps are in {place}")
        elif place := set_records_aside(workdir):
            say(f"started over: the records of the old run are in {place}")

    on_first(check)
    state, source = workload.first_state()
    if source:
        say(f"started from the EMA weights of {source}")
    return state


def _note_save(workdir: Path, lock: Lock, step: int) -> None:
    """Records that a step was saved; a failure is told, and the checkpoint is there."""
    try:
        lock.check_write()
        record_save(workdir, step)
    except (UserError, OSError) as error:
        say(str(error))


def config_of_run(experiment: Experiment) -> dict[str, Any]:
    """Returns all that a run's config says, with the hashes of the user's files and public weights that it names."""
    return to_dict(experiment) | {"files": experiment.user_files(), "weights": experiment.fingerprints()}


def _meta(experiment: Experiment, config: Mapping[str, Any], fingerprint: str, vocabulary: str, step: int) -> Meta:
    return Meta(
        format=FORMAT,
        config=dict(config),
        next_row=experiment.next_row(step),
        dataset=fingerprint,
        versions=library_versions(),
        arrays={},
        vocabulary=vocabulary,
        code=code_state(),
        config_hash=config_hash(dict(config)),
    )
