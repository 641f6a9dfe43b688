"""Measures what a run's bookkeeping costs in the emoji run: the watchdog, the ledger, the lock, host times, signals.

    python -m tests.benchmarks.bookkeeping [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

It starts the real run, `ecdit.runs.training_run.train`, and takes over its loop over steps. A call is a step. `booked`
runs the loop with the run's own hooks; `bare` with hooks that report the metrics and do nothing else. Both share the
state, the batches and the compiled step. Saves and images are not among these costs: neither candidate makes any.

A step of a second drifts by more than the hooks cost. So the same hooks, but for the report, also take turns around a
step that does nothing, EMPTY times in a turn. The run's threads, which watch and write beside the steps, are measured
by their CPU time. Percent are of a bare step, medians over rounds.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from ecdit.experiment import make_experiment
from ecdit.runs import training_run
from ecdit.training.loop import Hooks, run_steps
from ecdit.training.state import TrainState
from tests.benchmarks import timing
from tests.runs import emoji_config, tiny_values

THREADS = ("watchdog", "ledger", "stop-requests")  # of the run's bookkeeping, by name
NEVER = 10**9  # steps: the run is ended before
EMPTY = 1000  # steps that do nothing, in a turn


class Measured(Exception):
    """Ends the run when the loop has been measured; it holds what was measured."""

    def __init__(self, seconds: timing.Seconds, empty: timing.Seconds, threads: float):
        super().__init__()
        self.seconds = seconds  # of a step
        self.empty = empty  # of a step that does nothing
        self.threads = threads  # CPU seconds of the run's threads in a second


def bare(hooks: Hooks) -> Hooks:
    """Returns hooks that report and do nothing else."""
    return dataclasses.replace(hooks, enter=nothing, before_step=nothing, after_step=nothing, stop_requested=never)


def nothing(*_: Any) -> None:
    """Does nothing."""


def never(_: int) -> bool:
    """Returns False."""
    return False


def threads_seconds() -> float:
    """Returns the CPU seconds that the threads of THREADS have taken so far (Linux)."""
    own = [thread for thread in threading.enumerate() if thread.name in THREADS]
    assert {thread.name for thread in own} == set(THREADS), "the run's threads have other names"
    paths = [Path(f"/proc/self/task/{thread.native_id}/schedstat") for thread in own]
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


def measured_loop(rounds: int, calls: int) -> Callable[..., tuple[TrainState, bool]]:
    """Returns a function in place of `run_steps`: it measures and raises Measured."""

    def loop(train_step: Any, state: TrainState, batches: Iterator[Any], last_step: int, hooks: Hooks) -> Any:
        unsaved = dataclasses.replace(hooks, saves=never, draws=never, finish=nothing)
        candidates = {"booked": unsaved, "bare": bare(unsaved)}

        def turn(name: str) -> float:
            nonlocal state
            start = time.perf_counter()
            state, _ = run_steps(train_step, state, batches, int(state.step) + calls, candidates[name])
            jax.block_until_ready(state)
            return (time.perf_counter() - start) / calls

        for name in candidates:  # compiles
            turn(name)
        before, begin = threads_seconds(), time.perf_counter()
        seconds = timing.reported_turns({name: lambda name=name: turn(name) for name in candidates}, rounds)
        share = (threads_seconds() - before) / (time.perf_counter() - begin)

        def empty_turn(name: str) -> float:
            silent = dataclasses.replace(candidates[name], report=nothing)
            start = time.perf_counter()
            run_steps(lambda state, _: (state, {}), state, itertools.repeat({}), int(state.step) + EMPTY, silent)
            return (time.perf_counter() - start) / EMPTY

        empty = timing.reported_turns({name: lambda name=name: empty_turn(name) for name in candidates}, rounds)
        raise Measured(seconds, empty, share)

    return loop


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in one process."""
    environment = timing.use_emoji_runtime()
    values = tiny_values() if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    values.train.images_every = 0
    values.train.num_steps = NEVER
    experiment = make_experiment(values)
    loop = measured_loop(arguments.rounds, arguments.calls)
    with (
        tempfile.TemporaryDirectory() as workdir,
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(training_run, "run_steps", loop),
    ):
        try:
            training_run.train(experiment, Path(workdir))
        except Measured as found:
            seconds, empty, threads = found.seconds, found.empty, found.threads
    sizes = f"batch {experiment.train.batch_size}, {'tiny' if arguments.tiny else 'emoji'} model"
    case = timing.case(sizes, seconds, "bare", percent=percentages(seconds, empty, threads), empty_seconds=empty)
    return {"environment": environment, "cases": {"step": case}}


def percentages(seconds: timing.Seconds, empty: timing.Seconds, threads: float) -> dict[str, float]:
    """Returns percent of a bare step: what the hooks add to a step, to one that does nothing, and what threads take."""
    step = statistics.median(seconds["bare"])
    added = [booked - bare for booked, bare in zip(empty["booked"], empty["bare"], strict=True)]
    return {
        "the hooks, from whole steps": 100 * (timing.paired_ratio(seconds["booked"], seconds["bare"]) - 1),
        "the hooks alone": 100 * statistics.median(added) / step,
        "threads beside the steps": 100 * threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how long it takes")
    arguments = timing.parse(parser, rounds=20, calls=10)
    with timing.emoji_data(arguments.data) as data:
        timing.run_all("bookkeeping", arguments, measure, f"--data={data}")


if __name__ == "__main__":
    main()
