"""What checkpoints cost the emoji run: 50 steps with a save, checksums included, against 50 without.

    python -m tests.benchmarks.checkpoints [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

A call is a step of the loop (see `step`). `saving` begins its turn with a save, runs the steps beside it, and ends when
it has ended too; `not_saving` only runs the steps. `checksums` are those of the whole state alone, once in a turn, as
seconds of a step. Percent are of `not_saving`, medians over rounds.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ecdit.config import to_dict
from ecdit.training.checkpoint import FORMAT, Meta, state_arrays
from ecdit.training.checksums import checksums
from ecdit.training.experiment import Experiment, make_experiment
from ecdit.training.saving import Saver
from tests.benchmarks import timing
from tests.benchmarks.step import SETTLE_SECONDS, Parts
from tests.runs import emoji_config, tiny_values

EVERY = 50  # steps


def turns_of(parts: Parts, saver: Saver, calls: int) -> dict[str, Callable[[], float]]:
    """Turns of `calls` steps with a save and without one, and of the checksums."""
    steps = itertools.count(1)
    meta = Meta(FORMAT, to_dict(parts.experiment), 0, "", {}, {})

    def seconds(save: bool) -> float:
        start = time.perf_counter()
        if save:
            step = next(steps)
            saver.save(parts.looping, step, meta)
        parts.run_loop(calls)
        if save:
            saver.finish(step)
        elapsed = (time.perf_counter() - start) / calls
        time.sleep(SETTLE_SECONDS)
        return elapsed

    def summing() -> float:
        start = time.perf_counter()
        checksums(state_arrays(parts.still))
        return (time.perf_counter() - start) / calls

    parts.run_loop(2)
    saver.save(parts.looping, next(steps), meta)  # compiles
    return {"saving": lambda: seconds(True), "not_saving": lambda: seconds(False), "checksums": summing}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    values = tiny_values() if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    experiment: Experiment = make_experiment(values)
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):  # its printed steps
        parts = Parts(experiment, Path(workdir))
        saver = Saver(Path(workdir), experiment.checkpoint, print)
        with jax.set_mesh(parts.mesh), contextlib.closing(parts.reporter), contextlib.closing(saver):
            seconds = timing.reported_turns(turns_of(parts, saver, arguments.calls), arguments.rounds)
    rounds = [dict(zip(seconds, each, strict=True)) for each in zip(*seconds.values(), strict=True)]
    percent = {
        "checkpoints": statistics.median(100 * (t["saving"] / t["not_saving"] - 1) for t in rounds),
        "checksums": statistics.median(100 * t["checksums"] / t["not_saving"] for t in rounds),
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.still)) / 1e6
    sizes = f"a state of {size:.1f} MB saved once in {arguments.calls} steps, batches of {experiment.train.batch_size}"
    found = timing.case(sizes, seconds, "not_saving", percent=percent)
    return {"environment": environment, "cases": {"checkpoints": found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    arguments = timing.parse(parser, rounds=3, calls=EVERY)
    with timing.emoji_data(arguments.data) as data:
        timing.run_all("checkpoints", arguments, measure, f"--data={data}")


if __name__ == "__main__":
    main()
