"""Measures the parts of an emoji training step.

    python -m tests.benchmarks.step [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

`loop` is the loop of `ecdit.train`: the next batch from the loader, the step, the last step's report; without
checkpoints. Its parts are timed alone, as the same functions, jitted: `forward` the loss, `gradients` loss and
gradients, `update` all that follows (norm, clipping, optimizer, EMA, guard against bad steps), `ema` its moving average
alone, `report` the metrics of a finished step. `next_batch` is a batch from the loader with nothing else running;
`wait_in_loop` is how long `loop` waited for it, with the device computing. A call is a step.

Percent are of `loop`: data is `wait_in_loop`, backward is gradients - forward, optimizer is update - ema. Alone, a part
is dispatched and waited for by itself, so `sum_of_parts` is not 100. What is outside forward and backward is given
twice: (loop - gradients) / loop, and as the other parts' share of the sum (`outside_by_parts`).
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ecdit.diffusion.flow import example_keys
from ecdit.experiment import Experiment, make_experiment
from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.reporting.reporter import Reporter
from ecdit.reporting.speed import stopwatch
from ecdit.reporting.writers import open_writers
from ecdit.runs.workload import device_batches
from ecdit.system import make_system
from ecdit.training import step as training_step
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, init_state, run_key, state_shardings
from tests.benchmarks import timing
from tests.runs import emoji_config, tiny_values

SETTLE_SECONDS = 0.3  # the loader's threads fill its buffer after a turn: not in the next candidate's


class Parts:
    """The step's functions, whole and apart, each with a state of its own: some donate it."""

    def __init__(self, experiment: Experiment, workdir: Path):
        self.experiment = experiment
        self.mesh, self.system = make_mesh(experiment.mesh), make_system(experiment.system)
        self.optimizer = make_optimizer(experiment.optimizer)
        self.shardings = state_shardings(self.system, self.optimizer, self.mesh)
        with jax.set_mesh(self.mesh):
            self.train_step = training_step.make_train_step(experiment.step_config, self.system, self.mesh)
            self.forward = jax.jit(self._loss)
            self.gradients = jax.jit(self._gradients)
            self.update = jax.jit(self._update, donate_argnums=0)
            self.ema = jax.jit(self._ema, donate_argnums=0)
            self.looping, self.stepping, self.updating, self.still = (self._new_state() for _ in range(4))
            self.averaged = self._new_state().ema
            self.batches = timing.TimedBatches(device_batches(experiment, self.mesh, 0))
            self.batch = self.batches.next()
            self.loss, self.aux, self.grads = self.gradients(self.still, self.batch)
            self.stepping, self.metrics = self.train_step(self.stepping, self.batch)
        leaf_names, writers = list(flat_names(self.still.params)), open_writers("", {}, workdir, 0)
        self.reporter = Reporter(workdir, 0, experiment.train, leaf_names, writers)
        self.reporter.begin(stopwatch(experiment.train.batch_size, make_system(experiment.system).training_flops()))
        self.step = 0
        self.waits: list[float] = []  # seconds in which `loop` waited for each batch

    def _new_state(self) -> TrainState:
        return init_state(self.system, self.optimizer, self.shardings, self.experiment.seed)

    def _loss(self, state: TrainState, batch: training_step.Batch) -> Any:
        rows = jnp.arange(self.experiment.train.batch_size, dtype=jnp.int32)
        key = run_key(self.experiment.seed, "examples")
        keys = jax.vmap(example_keys, in_axes=(None, None, 0))(key, state.step, rows)
        return training_step._loss(state.params, state.frozen, self.experiment.flow, self.system, batch, keys)

    def _gradients(self, state: TrainState, batch: training_step.Batch) -> Any:
        return training_step._accumulated_gradients(self.experiment.step_config, self.system, state, batch)

    def _update(self, state: TrainState, loss: Any, aux: Any, grads: Any) -> Any:
        return training_step._gated_update(self.experiment.train, self.optimizer, state, loss, dict(aux), grads)

    def _ema(self, ema: Any, params: Any) -> Any:
        decay = self.experiment.train.ema_decay
        return jax.tree.map(lambda ema, param: decay * ema + (1 - decay) * param, ema, params)

    def run_loop(self, calls: int) -> None:
        """`calls` steps as in `training.loop`."""
        pending = None
        for _ in range(calls):
            self.looping, metrics = self.train_step(self.looping, self.batches.next())
            self.waits.append(self.batches.seconds)
            if pending is not None:
                self.reporter.report(*pending)
            self.step += 1
            pending = (self.step, metrics, self.batches.seconds)
        self.reporter.report(*pending)
        jax.block_until_ready(self.looping)

    def run_train_step(self) -> None:
        self.stepping, _ = jax.block_until_ready(self.train_step(self.stepping, self.batch))

    def run_update(self) -> None:
        self.updating, _ = jax.block_until_ready(self.update(self.updating, self.loss, self.aux, self.grads))

    def run_ema(self) -> None:
        self.averaged = jax.block_until_ready(self.ema(self.averaged, self.still.params))

    def run_report(self) -> None:
        self.step += 1  # every tenth is printed
        self.reporter.report(self.step, self.metrics, 0.0)


def loop_turn(parts: Parts, calls: int) -> Callable[[], float]:
    """A turn of the loop: seconds of a step."""

    def turn() -> float:
        start = time.perf_counter()
        parts.run_loop(calls)
        seconds = (time.perf_counter() - start) / calls
        time.sleep(SETTLE_SECONDS)
        return seconds

    return turn


def data_turn(parts: Parts, calls: int) -> Callable[[], float]:
    """A turn of the loader alone, from an empty buffer on: seconds of a batch."""

    def turn() -> float:
        for _ in range(parts.experiment.data.prefetch + 1):
            parts.batches.next()
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(parts.batches.next())
        seconds = (time.perf_counter() - start) / calls
        time.sleep(SETTLE_SECONDS)
        return seconds

    return turn


def turns_of(parts: Parts, calls: int) -> dict[str, Callable[[], float]]:
    """All candidates, warmed up, and no waits of the loop counted yet."""
    alone = {
        "train_step": parts.run_train_step,
        "forward": lambda: jax.block_until_ready(parts.forward(parts.still, parts.batch)),
        "gradients": lambda: jax.block_until_ready(parts.gradients(parts.still, parts.batch)),
        "update": parts.run_update,
        "ema": parts.run_ema,
        "report": parts.run_report,
    }
    parts.run_loop(2)
    parts.waits.clear()
    for candidate in alone.values():
        candidate()
    timed = {name: timing.timed(candidate, calls) for name, candidate in alone.items()}
    return {"loop": loop_turn(parts, calls), "next_batch": data_turn(parts, calls), **timed}


def percentages(seconds: timing.Seconds) -> dict[str, float]:
    """Shares of the loop's step: medians over rounds, each of numbers of one round."""

    def share(part: Callable[[dict[str, float]], float]) -> float:
        rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
        return statistics.median(100 * part(t) / t["loop"] for t in rounds)

    def outside(t: dict[str, float]) -> float:
        return t["wait_in_loop"] + t["update"] + t["report"]

    return {
        "data": share(lambda t: t["wait_in_loop"]),
        "forward": share(lambda t: t["forward"]),
        "backward": share(lambda t: t["gradients"] - t["forward"]),
        "optimizer": share(lambda t: t["update"] - t["ema"]),
        "ema": share(lambda t: t["ema"]),
        "logging": share(lambda t: t["report"]),
        "sum_of_parts": share(lambda t: outside(t) + t["gradients"]),
        "outside_forward_and_backward": share(lambda t: t["loop"] - t["gradients"]),
        "outside_by_parts": share(lambda t: outside(t) / (outside(t) + t["gradients"]) * t["loop"]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    values = tiny_values() if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    experiment = make_experiment(values)
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):  # its printed steps
        parts = Parts(experiment, Path(workdir))
        with jax.set_mesh(parts.mesh), contextlib.closing(parts.reporter):
            turns = turns_of(parts, arguments.calls)
            seconds = timing.reported_turns(turns, arguments.rounds)
    waits = [parts.waits[i : i + arguments.calls] for i in range(0, len(parts.waits), arguments.calls)]
    seconds["wait_in_loop"] = [statistics.mean(turn) for turn in waits]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(parts.still.params))
    sizes = f"{numbers:,} parameters, batches of {experiment.train.batch_size}, {experiment.model.dtype}"
    found = timing.case(sizes, seconds, "loop", percent=percentages(seconds))
    return {"environment": environment, "cases": {"step": found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    arguments = timing.parse(parser, rounds=5, calls=10)
    with timing.emoji_data(arguments.data) as data:
        timing.run_all("step", arguments, measure, f"--data={data}")


if __name__ == "__main__":
    main()
