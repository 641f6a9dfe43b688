"""The emoji run's training step with experts against the same step with dense FFNs.

    python -m tests.benchmarks.ec_over_dense [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

`expert_choice` and `dense` are the trainer's own steps of configs/emoji.py; they differ in `model.ffn` alone. A call is
a step, with a batch that is on the device before the clock starts. Percent: `flops` is what the ratio of times should
come near, the denoiser's operations with experts over those of the dense one, as `models.flops` counts them;
`over_flops` is how far the ratio of times is above that.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ecdit.components import total_flops
from ecdit.experiment import Experiment, make_experiment
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import device_batches
from ecdit.system import System, make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import Batch, make_train_step
from tests.benchmarks import timing
from tests.runs import emoji_config, tiny_values

FFNS = ("expert_choice", "dense")


def with_ffn(ffn: str, arguments: argparse.Namespace) -> Experiment:
    """The emoji experiment with this feed-forward branch in its even blocks."""
    values = tiny_values() if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    values.model.ffn = ffn
    return make_experiment(values)


def training_flops(experiment: Experiment) -> float:
    """Of the denoiser on one image: forward, and twice that backward."""
    return 3 * total_flops(make_system(experiment.system).denoiser_flops("train"))


def stepper(experiment: Experiment, system: System, mesh: Mesh, batch: Batch) -> Callable[[], None]:
    """Takes a step of training with this batch and waits for it; called with the mesh set."""
    optimizer = make_optimizer(experiment.optimizer)
    state = init_state(system, optimizer, state_shardings(system, optimizer, mesh), experiment.seed)
    train_step = make_train_step(experiment.step_config, system, mesh)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(train_step(state, batch))

    return step


def percentages(ratio: float, flops_ratio: float) -> dict[str, float]:
    """The ratio of operations, and how far that of times is above it."""
    return {"flops": 100 * flops_ratio, "over_flops": 100 * (ratio / flops_ratio - 1)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    experiments = {ffn: with_ffn(ffn, arguments) for ffn in FFNS}
    systems = {ffn: make_system(experiments[ffn].system) for ffn in FFNS}
    experiment = experiments["dense"]
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        batch = next(device_batches(experiment, mesh, 0))
        candidates = {ffn: stepper(experiments[ffn], systems[ffn], mesh, batch) for ffn in FFNS}
        seconds = timing.take_turns(candidates, arguments.rounds, arguments.calls)
    gflops = {ffn: 1e-9 * training_flops(experiments[ffn]) for ffn in FFNS}
    model, size = experiment.model, experiment.train.batch_size
    sizes = (
        f"width {model.width}, {model.depth} blocks, batches of {size}, {model.num_kept} tokens, {model.dtype}, "
        + ", ".join(f"{ffn} {size * count:.2f} GFLOP a step" for ffn, count in gflops.items())
    )
    found = timing.case(sizes, seconds, "dense")
    found["percent"] = percentages(found["ratios"]["expert_choice"], gflops["expert_choice"] / gflops["dense"])
    return {"environment": environment, "cases": {"step": found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    arguments = timing.parse(parser, rounds=15, calls=3)
    with timing.emoji_data(arguments.data) as data:
        timing.run_all("ec_over_dense", arguments, measure, f"--data={data}")


if __name__ == "__main__":
    main()
