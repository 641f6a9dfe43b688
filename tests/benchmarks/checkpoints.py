"""Measures the cost of a checkpoint every 50 steps in the emoji run, including checksums.

    python -m tests.benchmarks.checkpoints [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

A call is a step of the loop (see `step`). `saving` begins its turn with a save, runs the steps beside it, and ends when
it has ended too; `not_saving` only runs the steps. A turn is ten steps and not 50: what the save adds is the same, and
stands out from the cores' drift. `checksums` are those of the whole state alone, once in a turn, as seconds of a step.
Percent are of 50 steps of `not_saving`, medians over rounds.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ecdit.checkpoints.arrays import FORMAT
from ecdit.checkpoints.async_save import AsyncSaver
from ecdit.checkpoints.checksums import checksums
from ecdit.checkpoints.restore import Meta, state_arrays
from ecdit.config import to_dict
from ecdit.experiment import Experiment, make_experiment
from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.reporting.reporter import Reporter
from ecdit.reporting.speed import stopwatch
from ecdit.runs.workload import device_batches
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import make_train_step
from tests.benchmarks import timing
from tests.benchmarks.step import SETTLE_SECONDS
from tests.runs import emoji_config, tiny_values

EVERY = 50  # steps from save to save


class Loop:
    """The training loop without checkpoints, in portions."""

    def __init__(self, experiment: Experiment, workdir: Path):
        self.experiment, self.mesh, self.step = experiment, make_mesh(experiment.mesh), 0
        system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
        with jax.set_mesh(self.mesh):
            self.state = init_state(system, optimizer, state_shardings(system, optimizer, self.mesh), experiment.seed)
            self.train_step = make_train_step(experiment.step_config, system, self.mesh)
        self.batches = timing.TimedBatches(device_batches(experiment, self.mesh, 0))
        self.reporter = Reporter(workdir, 0, experiment.train, list(flat_names(self.state.params)))
        self.reporter.begin(stopwatch(experiment.train.batch_size, make_system(experiment.system).training_flops()))

    def run(self, calls: int) -> None:
        """So many steps, the last one's results read too."""
        pending = None
        for _ in range(calls):
            self.state, metrics = self.train_step(self.state, self.batches.next())
            if pending is not None:
                self.reporter.report(*pending)
            self.step += 1
            pending = (self.step, metrics, self.batches.seconds)
        self.reporter.report(*pending)
        jax.block_until_ready(self.state)


def turns_of(loop: Loop, saver: AsyncSaver, calls: int) -> dict[str, Callable[[], float]]:
    """Turns of `calls` steps with a save and without one, and of the checksums."""
    saves = itertools.count(1)
    meta = Meta(FORMAT, to_dict(loop.experiment), 0, "", {}, {}, "", {}, "")

    def seconds(save: bool) -> float:
        start = time.perf_counter()
        if save:
            step = next(saves)
            saver.save(loop.state, step, meta)
        loop.run(calls)
        if save:
            saver.finish(step)
        elapsed = (time.perf_counter() - start) / calls
        time.sleep(SETTLE_SECONDS)
        return elapsed

    def summing() -> float:
        start = time.perf_counter()
        checksums(state_arrays(loop.state))
        return (time.perf_counter() - start) / calls

    loop.run(2)
    saver.save(loop.state, next(saves), meta)  # compiles
    return {"saving": lambda: seconds(True), "not_saving": lambda: seconds(False), "checksums": summing}


def percentages(rounds: Sequence[Mapping[str, float]], calls: int) -> dict[str, float]:
    """What a save and its checksums, in turns of `calls` calls of so many seconds, add to EVERY of them."""
    share = 100 * calls / EVERY
    return {
        "checkpoints": statistics.median(share * (t["saving"] / t["not_saving"] - 1) for t in rounds),
        "checksums": statistics.median(share * t["checksums"] / t["not_saving"] for t in rounds),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    values = tiny_values() if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    experiment: Experiment = make_experiment(values)
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):  # its printed steps
        loop = Loop(experiment, Path(workdir))
        saver = AsyncSaver(Path(workdir), experiment.checkpoint, print)
        with jax.set_mesh(loop.mesh), contextlib.closing(loop.reporter), contextlib.closing(saver):
            seconds = timing.reported_turns(turns_of(loop, saver, arguments.calls), arguments.rounds)
    rounds = [dict(zip(seconds, each, strict=True)) for each in zip(*seconds.values(), strict=True)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state)) / 1e6
    sizes = f"a state of {size:.1f} MB, percent of {EVERY} steps with batches of {experiment.train.batch_size}"
    percent = percentages(rounds, arguments.calls)
    found = timing.case(sizes, seconds, "not_saving", percent=percent)
    return {"environment": environment, "cases": {"checkpoints": found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    arguments = timing.parse(parser, rounds=10, calls=10)
    with timing.emoji_data(arguments.data) as data:
        timing.run_all("checkpoints", arguments, measure, f"--data={data}")


if __name__ == "__main__":
    main()
