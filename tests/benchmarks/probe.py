"""Compares the emoji run's training step with a plain probe, a one-file program for the same training.

    python -m tests.benchmarks.probe [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

The probe is all in this file: Flax NNX and optax, a Python loop over six blocks, float32, expert choice by vmapped
indexing and scatter-add (the obvious version), no masking, SiLU, parameter-free norms around each branch with gates
from 0.2, word embeddings as text, AdamW 2e-3 after 300 steps of warm-up, clipping, EMA and caption dropout. Its step
is jitted once and donates its state, and its data is in memory. It has XLA's and glibc's defaults, where the emoji run
has its config's flags, allocator settings, text tower, micro-conditions, checks for bad steps and loader; so the two
are processes of their own, which take turns of --calls steps. The ratio is that of steps per second.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ecdit.data.images import decode_stored
from ecdit.data.prepared import caption_of, open_prepared, prompt_tokens, stored_records
from ecdit.experiment import Experiment, make_experiment
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import device_batches
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import init_state, state_shardings
from ecdit.training.step import make_train_step
from tests.benchmarks import timing
from tests.runs import emoji_config, tiny_values

WARMUP_CALLS = 3  # steps before the first turn; the first one compiles


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The probe's hyper-parameters."""

    image: int = 32  # pixels
    patch: int = 4
    width: int = 128
    blocks: int = 6
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    capacity_factor: int = 2
    vocabulary: int = 2048
    batch: int = 64
    warmup_steps: int = 300


TINY_SIZES = Sizes(patch=8, width=32, blocks=2, heads=2, experts=4, batch=16, warmup_steps=5)
TINY_EMOJI = {"model__depth": 2, "model__mask_ratio": 0.0, "model__extra_blocks": 0}


class Attention(nnx.Module):
    """Attention of x to context, with fewer key than query heads if so asked."""

    def __init__(self, width: int, heads: int, kv_heads: int, rngs: nnx.Rngs):
        self.heads, self.kv_heads = heads, kv_heads
        kv_width = width // heads * kv_heads
        self.query = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(width, kv_width, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(width, kv_width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B N d"], context: Float[Array, "B L d"], mask: Bool[Array, "B 1 1 L"] | None = None
    ) -> Float[Array, "B N d"]:
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        key = self.key(context).reshape(*context.shape[:2], self.kv_heads, -1)
        value = self.value(context).reshape(*context.shape[:2], self.kv_heads, -1)
        return self.out(jax.nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape))


class FeedForward(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
        return self.down(jax.nn.silu(self.up(x)))


class Experts(nnx.Module):
    """Every expert takes the tokens of an image that want it most."""

    def __init__(self, width: int, experts: int, capacity_factor: int, rngs: nnx.Rngs):
        self.experts, self.capacity_factor = experts, capacity_factor
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, width, 4 * width)))
        self.down = nnx.Param(init(rngs.params(), (experts, 4 * width, width)))

    def __call__(self, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
        capacity = x.shape[1] * self.capacity_factor // self.experts
        affinity = jax.nn.softmax(self.router(x), axis=-1).swapaxes(1, 2)
        gate, index = jax.lax.top_k(affinity, capacity)  # both (B, E, C)
        slots = jax.vmap(lambda tokens, index: tokens[index])(x, index)
        hidden = jax.nn.silu(jnp.einsum("becd,edf->becf", slots, self.up[...]))
        outputs = jnp.einsum("becf,efd->becd", hidden, self.down[...]) * gate[..., None]
        return jax.vmap(lambda tokens, index, y: jnp.zeros_like(tokens).at[index].add(y))(x, index, outputs)


def norm(x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-6)


class Block(nnx.Module):
    def __init__(self, sizes: Sizes, sparse: bool, rngs: nnx.Rngs):
        self.attention = Attention(sizes.width, sizes.heads, sizes.kv_heads, rngs)
        self.cross_attention = Attention(sizes.width, sizes.heads, sizes.heads, rngs)
        if sparse:
            self.feed_forward = Experts(sizes.width, sizes.experts, sizes.capacity_factor, rngs)
        else:
            self.feed_forward = FeedForward(sizes.width, rngs)
        offsets = jnp.array([0.0, 0.0, 0.2, 0.0, 0.0, 0.2])  # (shift, scale, gate) x 2
        self.offsets = nnx.Param(jnp.tile(offsets[:, None], (1, sizes.width)))

    def __call__(
        self,
        x: Float[Array, "B N d"],
        modulation: Float[Array, "B 6 d"],
        words: Float[Array, "B L d"],
        mask: Bool[Array, "B 1 1 L"],
    ) -> Float[Array, "B N d"]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = jnp.split(modulation + self.offsets[...], 6, axis=1)
        branch = norm(x) * (1 + scale) + shift
        x = x + gate * norm(self.attention(branch, branch))
        x = x + self.cross_attention(norm(x), words, mask)
        return x + ff_gate * norm(self.feed_forward(norm(x) * (1 + ff_scale) + ff_shift))


def waves(x: Array, width: int) -> Array:
    """Sines and cosines of x[..., None] at width / 2 frequencies."""
    angles = x[..., None] * jnp.exp(-np.log(1e4) * jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Probe(nnx.Module):
    """The velocity of a noisy image's patches."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        self.sizes, width = sizes, sizes.width
        zeros = nnx.initializers.zeros
        self.words = nnx.Embed(sizes.vocabulary, width, rngs=rngs)
        self.patches = nnx.Linear(3 * sizes.patch**2, width, rngs=rngs)
        self.time_in = nnx.Linear(width, width, rngs=rngs)
        self.time_out = nnx.Linear(width, width, rngs=rngs)
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zeros, rngs=rngs)
        self.blocks = nnx.List([Block(sizes, i % 2 == 1, rngs) for i in range(sizes.blocks)])
        self.head = nnx.Linear(width, 3 * sizes.patch**2, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, patches: Float[Array, "B N p"], time: Float[Array, " B"], tokens: Int[Array, "B L"]
    ) -> Float[Array, "B N p"]:
        side, width = self.sizes.image // self.sizes.patch, self.sizes.width
        rows, columns = jnp.divmod(jnp.arange(side * side), side)
        x = self.patches(patches) + jnp.concatenate([waves(rows, width // 2), waves(columns, width // 2)], axis=-1)
        words, mask = self.words(tokens), tokens != 0
        pooled = (words * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        condition = self.time_out(jax.nn.silu(self.time_in(waves(1000 * time, width)))) + pooled
        modulation = self.modulation(jax.nn.silu(condition)).reshape(-1, 6, width)
        for block in self.blocks:
            x = block(x, modulation, words, mask[:, None, None, :])
        return self.head(norm(x))


class State(NamedTuple):
    params: Any
    ema: Any
    optimizer: Any


def make_probe(sizes: Sizes) -> tuple[State, Callable[..., tuple[State, Float[Array, ""]]]]:
    """The probe's first state, and its jitted step (state, images, tokens, key) -> (state, loss)."""
    graphdef, params = nnx.split(Probe(sizes, nnx.Rngs(0)), nnx.Param)
    schedule = optax.linear_schedule(0.0, 2e-3, sizes.warmup_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))

    def loss_of(params: Any, images: Array, tokens: Array, key: Key[Array, ""]) -> Float[Array, ""]:
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        side, patch = sizes.image // sizes.patch, sizes.patch
        x = images.astype(jnp.float32) / 127.5 - 1
        x = x.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), side * side, -1)
        noise = jax.random.normal(noise_key, x.shape)
        time = jax.nn.sigmoid(jax.random.normal(time_key, (len(x),)))
        empty = jnp.zeros_like(tokens).at[:, 0].set(1)  # end of sequence
        tokens = jnp.where(jax.random.bernoulli(drop_key, 0.1, (len(x), 1)), empty, tokens)
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * x
        return jnp.mean((nnx.merge(graphdef, params)(noisy, time, tokens) - (noise - x)) ** 2)

    def step(state: State, images: Array, tokens: Array, key: Key[Array, ""]) -> tuple[State, Float[Array, ""]]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, images, tokens, key)
        updates, new_optimizer = optimizer.update(grads, state.optimizer, state.params)
        new_params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(new_params, state.ema, 1 - 0.995)
        return State(new_params, ema, new_optimizer), loss

    return State(params, jax.tree.map(jnp.copy, params), optimizer.init(params)), jax.jit(step, donate_argnums=0)


def probe_steps(experiment: Experiment, sizes: Sizes) -> Iterator[tuple[Any, Array]]:
    """Dispatches a step of the probe, on images in memory, whenever asked; (parameters, loss)."""
    data = experiment.data
    records = list(stored_records(open_prepared(data), "train"))
    images = np.stack([decode_stored(record.image) for record in records])
    tokens = prompt_tokens(data)([caption_of(data, record.captions) for record in records])
    state, step = make_probe(sizes)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    while True:
        rows, (key, step_key) = rng.integers(len(images), size=sizes.batch), jax.random.split(key)
        state, loss = step(state, images[rows], tokens[rows], step_key)
        yield state.params, loss


def emoji_steps(experiment: Experiment) -> Iterator[tuple[Any, Array]]:
    """Dispatches a step of the emoji run as `training.loop` does, whenever asked; (parameters, loss)."""
    mesh, system = make_mesh(experiment.mesh), make_system(experiment.system)
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)
    with jax.set_mesh(mesh):
        state = init_state(system, optimizer, shardings, experiment.seed)
        train_step = make_train_step(experiment.step_config, system, mesh)
        for batch in device_batches(experiment, mesh, 0):
            state, metrics = train_step(state, batch)
            yield state.params, metrics["loss"]


def turn(steps: Iterator[tuple[Any, Array]], calls: int) -> tuple[float, list[float]]:
    """Seconds of a step over `calls` steps, and their losses, each read when the next step is dispatched."""
    losses: list[float] = []
    pending, start = None, time.perf_counter()
    for _ in range(calls):
        params, loss = next(steps)
        if pending is not None:
            losses.append(float(pending))
        pending = loss
    losses.append(float(pending))
    jax.block_until_ready(params)
    return (time.perf_counter() - start) / calls, losses


def work(arguments: argparse.Namespace) -> None:
    """One side's process: takes a turn for each line it reads, and answers with a line of JSON."""
    values = tiny_values(**TINY_EMOJI) if arguments.tiny else emoji_config()
    values.data.directory = arguments.data
    experiment = make_experiment(values)
    if arguments.child == "emoji":
        environment, steps = timing.use_emoji_runtime(), emoji_steps(experiment)
    else:
        environment, steps = timing.machine(), probe_steps(experiment, TINY_SIZES if arguments.tiny else Sizes())
    _, losses = turn(steps, WARMUP_CALLS)
    params, _ = next(steps)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(json.dumps({"environment": environment, "params": numbers, "losses": losses}), flush=True)
    for _ in sys.stdin:
        seconds, losses = turn(steps, arguments.calls)
        print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)


class Worker:
    """A process that takes turns when asked."""

    def __init__(self, side: str, data: str, environment: dict[str, str]):
        command = [sys.executable, "-m", "tests.benchmarks.probe", *sys.argv[1:], f"--data={data}", f"--child={side}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=timing.ROOT, env=environment, **pipes)
        self.setup: dict[str, Any] = {}
        self.losses: list[float] = []

    def wait_until_ready(self) -> None:
        """Until it is warmed up, with nothing left to compile."""
        self.setup = self._answer()
        self.losses += self.setup["losses"]

    def turn(self) -> float:
        """Seconds of a step."""
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.losses += answer["losses"]
        return answer["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"probe: a process ended with exit code {self.process.wait()}; it says above why")
        return json.loads(line)


def measure(arguments: argparse.Namespace, data: str) -> dict[str, Any]:
    """One run: two fresh processes in turns."""
    environment = timing.child_environment(arguments.quick)
    with contextlib.ExitStack() as stack:
        workers = {
            side: stack.enter_context(contextlib.closing(Worker(side, data, environment)))
            for side in ("probe", "emoji")
        }
        for worker in workers.values():  # both have started by now, and compile at the same time
            worker.wait_until_ready()
        turns = {side: worker.turn for side, worker in workers.items()}
        seconds = timing.reported_turns(turns, arguments.rounds)
    sizes = "float32, batches of 64, 32 px" if not arguments.tiny else "tiny"
    numbers = ", ".join(f"{side} {worker.setup['params']:,} parameters" for side, worker in workers.items())
    environment = workers["emoji"].setup["environment"]
    environment["xla_flags of the probe"] = workers["probe"].setup["environment"]["xla_flags"]
    rates = {side: 1 / statistics.median(values) for side, values in seconds.items()}
    losses = {side: worker.losses for side, worker in workers.items()}
    found = timing.case(f"{numbers}; {sizes}", seconds, "emoji", steps_per_second=rates, losses=losses)
    return {"environment": environment, "cases": {"step": found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="both sides small: whether it works, not how fast")
    arguments = timing.parse(parser, rounds=6, calls=10)
    if arguments.child:
        work(arguments)
        return
    with timing.emoji_data(arguments.data) as data:
        timing.report("probe", arguments, [measure(arguments, data) for _ in range(arguments.runs)])


if __name__ == "__main__":
    main()
