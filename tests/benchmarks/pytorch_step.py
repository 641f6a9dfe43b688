"""Compares a whole training step with that of the same model in PyTorch, eager and compiled, on the CPU.

    python -m tests.benchmarks.pytorch_step [--cases=emoji,wide] [--tiny] [--json=FILE]

Needs the extra `parity`, and for the compiled candidate a C++ compiler. `emoji` has the sizes of configs/emoji.py,
`wide` a width of 512 and a quarter of its batch. All candidates take turns in one process and do the same work on a
batch that is already there: noise and times, the text tower and the denoiser forward and backward, clipping by the
global norm, RMSProp with momentum, and the moving average of the weights. `ours` is the step of `ecdit.train`, which
also computes its metrics and checks for bad steps. `eager` and `compiled` run the PyTorch files that `ecdit.checkpoint
export --format=diffusers` writes, with PyTorch's own RMSprop; `compiled` compiles the loss, with its gradients, and the
update. All start from random weights of the same number, which is printed.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecdit.experiment import Experiment, make_experiment
from ecdit.interop.pytorch_parts import denoiser_values, tower_values
from ecdit.partitioning import make_mesh
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import make_train_step
from tests.benchmarks import timing
from tests.benchmarks.accelerator_device import random_tokens
from tests.runs import emoji_config, tiny_values

WIDE = {"width": 512, "heads": 16, "kv_heads": 8}  # heads of 32 numbers, as the emoji run's


def experiment(case: str, tiny: bool) -> Experiment:
    """Returns the experiment of configs/emoji.py, wider if `case` is "wide"."""
    values: Any = tiny_values(model__mask_ratio=0.0) if tiny else emoji_config()
    if case == "wide":
        for key, value in WIDE.items():
            values.model[key] = value // 8 if tiny else value
        values.train.batch_size //= 4
    return make_experiment(values)


def random_batch(config: Experiment) -> dict[str, np.ndarray]:
    """Returns a batch of noise under random words, as the loader gives it."""
    rng, batch, side = np.random.default_rng(0), config.train.batch_size, config.data.image_size
    return {
        "image": rng.integers(0, 256, (batch, side, side, 3)).astype(np.uint8),
        "tokens": random_tokens(rng, config, batch),
        "size_crop": np.tile(np.array([[72, 72, 0, 0]], np.float32), (batch, 1)),
    }


class Ours:
    """Runs the step of `ecdit.train`, with its state."""

    def __init__(self, config: Experiment, batch: dict[str, np.ndarray]):
        self.mesh, system = make_mesh(config.mesh), make_system(config.system)
        optimizer = make_optimizer(config.optimizer)
        shardings = state_shardings(system, optimizer, self.mesh)
        with jax.set_mesh(self.mesh):
            self.state = init_state(system, optimizer, shardings, config.seed)
            self.step = make_train_step(config.step_config, system, self.mesh)
            self.batch = {key: jnp.asarray(array) for key, array in batch.items()}
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def __call__(self) -> float:
        with jax.set_mesh(self.mesh):
            self.state, metrics = jax.block_until_ready(self.step(self.state, self.batch))
        return float(metrics["loss"])


class PyTorch:
    """Runs the same step in PyTorch, with its state."""

    def __init__(self, config: Experiment, batch: dict[str, np.ndarray], compiled: bool):
        import torch

        from ecdit.interop.pytorch.ec_dit import Denoiser, DenoiserConfig
        from ecdit.interop.pytorch.text_tower import TextConfig, TextTower

        torch.manual_seed(0)
        self.torch, self.config = torch, config
        self.text = TextTower(TextConfig(**tower_values(config.system)))
        self.denoiser = Denoiser(DenoiserConfig(**denoiser_values(config.system)))
        weights = [*self.text.parameters(), *self.denoiser.parameters()]
        with torch.no_grad():
            for weight in weights:
                weight.normal_(0, 0.02)  # as in a run: the files' experts begin with zeros
        self.weights, self.averaged = weights, [weight.detach().clone() for weight in weights]
        o = config.optimizer
        self.optimizer = torch.optim.RMSprop(
            weights, o.learning_rate, o.rmsprop_decay, o.rmsprop_eps, momentum=o.rmsprop_momentum, foreach=compiled
        )
        tensors = {key: torch.tensor(array) for key, array in batch.items()}
        self.inputs = (tensors["image"], tensors["tokens"].long(), tensors["size_crop"])
        self.parameters = sum(weight.numel() for weight in weights)
        if compiled:
            self.loss, self.update = torch.compile(self.loss), torch.compile(self.update)

    def loss(self, images: Any, tokens: Any, size_crop: Any) -> Any:
        torch, flow = self.torch, self.config.flow
        data = images.permute(0, 3, 1, 2) / 127.5 - 1
        noise, time = torch.randn_like(data), torch.sigmoid(flow.time_mean + flow.time_std * torch.randn(len(data)))
        at = time[:, None, None, None]
        group = self.config.model.group
        velocity = self.denoiser(
            at * noise + (1 - at) * data, time, *self.text(tokens), size_crop=size_crop, group=group
        )
        return (velocity - (noise - data)).square().mean()

    def update(self) -> None:
        torch = self.torch
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.optimizer.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.weights, 1 - self.config.train.ema_decay)

    def __call__(self) -> float:
        loss = self.loss(*self.inputs)
        loss.backward()
        self.update()
        self.optimizer.zero_grad()
        return loss.item()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in one process: a case for each size, ratios of seconds against the faster of PyTorch's."""
    environment = timing.use_emoji_runtime()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    cases = {}
    for name in arguments.cases.split(","):
        config = experiment(name, arguments.tiny)
        batch = random_batch(config)
        steps: dict[str, Callable[[], float]] = {
            "ours": Ours(config, batch),
            "eager": PyTorch(config, batch, compiled=False),
            "compiled": PyTorch(config, batch, compiled=True),
        }
        counts = {candidate: step.parameters for candidate, step in steps.items()}
        assert len(set(counts.values())) == 1, counts
        losses = {candidate: step() for candidate, step in steps.items()}
        assert all(0.5 < loss < 20 for loss in losses.values()), losses
        seconds = timing.take_turns(steps, arguments.rounds, arguments.calls, warmup=3)
        sizes = f"{counts['ours']:,} parameters, batches of {config.train.batch_size}, width {config.model.width}"
        cases[name] = timing.case(sizes, seconds, timing.fastest(seconds, ("eager", "compiled")))
        torch._dynamo.reset()
    return {"environment": {**environment, "torch": torch.__version__}, "cases": cases}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="emoji,wide", help="which sizes")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    timing.run_all("pytorch_step", timing.parse(parser, rounds=5, calls=5), measure)


if __name__ == "__main__":
    main()
