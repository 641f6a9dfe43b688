"""Measures the rows of `accelerator`, each in its own process. The timed code is the product's."""

import argparse
import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ecdit import runtime
from ecdit.components import total_flops
from ecdit.diffusion.flow import sample_keys
from ecdit.experiment import Experiment, check_mesh
from ecdit.models.attention import ATTENTIONS
from ecdit.models.embeddings import rope_angles
from ecdit.models.moe import FeedForward, MixtureOfExperts
from ecdit.partitioning import make_mesh
from ecdit.sampling.sampler import make_sampler
from ecdit.system import Params, System, make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, init_state, run_key, state_shardings
from ecdit.training.step import abstract_batch, make_train_step
from tests.benchmarks import timing
from tests.benchmarks.accelerator_device import (
    bytes_limit,
    experiment,
    mfu,
    milliseconds,
    needed_bytes,
    paired,
    peak_bytes,
    random_batch,
    random_tokens,
    turns,
)
from tests.benchmarks.moe_layer import feed_forward, finished, moe, relative_error, split, with_gradients

SMALLEST_BATCH, LARGEST_BATCH, TINY_BATCH = 8, 4096, 8  # images of a training step: a group of 1024 tokens holds eight
HALVINGS = 2  # of a batch that was thought to fit
SMALL_BATCHES = (32, 64)  # whose memory says what larger ones would take
SAMPLED, TINY_SAMPLED = (1, 8, 64), (2,)  # images
LAYER_GROUPS, ATTENDED = 32, 64  # groups of tokens of the layer's row, images of attention's
FREE = 0.97  # of a device's memory that a step may take: the rest is fragments
WRONG = 0.03  # of the largest value: an attention that is further from float32 computes something else

Emit = Callable[[dict[str, Any]], None]


def measure(arguments: argparse.Namespace, add: Emit) -> None:
    """The row --child, whose lines go to `add`."""
    row, start = arguments.child, time.monotonic()
    kind, _, name = row.partition("/")
    runtime.configure(experiment(arguments, "XL-dense").runtime)
    device = jax.devices()[0]

    def emit(found: dict[str, Any]) -> None:
        common = {"device": device.device_kind, "jax": jax.__version__, "attention": arguments.attention}
        seconds = {"seconds": round(time.monotonic() - start, 1)}
        add({"row": row, **common, **found, **seconds})

    mesh = make_mesh(experiment(arguments, "XL-dense").mesh, [device])
    KINDS_OF_ROWS[kind](arguments, name, mesh, emit)


# Attention


def attention_row(arguments: argparse.Namespace, name: str, mesh: Mesh, emit: Emit) -> None:
    """Milliseconds and errors of each kernel that runs here, at XL's sizes; the fastest that is right is chosen."""
    del name, mesh
    config = experiment(arguments, "XL-dense")
    kinds = ["plain", "fused", *(["cudnn"] if jax.default_backend() == "gpu" else [])]
    found: dict[str, Any] = {kind: {"error": 0.0, "milliseconds": 0.0} for kind in kinds}
    for case, inputs, rest in attention_inputs(config, 2 if arguments.tiny else ATTENDED):
        run = {kind: attention_gradients(kind, *rest) for kind in kinds}
        exact = [x.astype(jnp.float32) for x in inputs[:4]]
        with jax.default_matmul_precision("highest"):  # a GPU rounds float32 otherwise
            expected = run["plain"](*exact, *inputs[4:])
        candidates = {}
        for kind in list(kinds):
            try:
                output = jax.block_until_ready(run[kind](*inputs))
            except Exception as error:  # whatever a kernel that is not made for this device or version raises
                kinds.remove(kind)
                found[kind] = {"failed": f"{type(error).__name__}: {error}"[:500]}
                continue
            as_float = jax.tree.map(lambda x: np.asarray(x, np.float32), output)
            found[kind]["error"] = max(found[kind]["error"], relative_error(as_float, jax.device_get(expected)))
            candidates[kind] = functools.partial(finished, run[kind], *inputs)
        for kind, times in turns(candidates, arguments).items():
            found[kind][case] = milliseconds(times)
            found[kind]["milliseconds"] += found[kind][case]["median"]
    right = [kind for kind in kinds if found[kind]["error"] <= WRONG]
    chosen = min(right or ["plain"], key=lambda kind: found[kind]["milliseconds"])
    emit({"kinds": found, "chosen": chosen, "bytes_limit": bytes_limit(), "xla_flags": os.environ.get("XLA_FLAGS", "")})


def attention_inputs(config: Experiment, images: int) -> Iterator[tuple[str, list[jax.Array], tuple[Any, Any]]]:
    """For self- and cross-attention: query, key, value, the output's gradient and norms; angles and mask."""
    model, length = config.model, config.data.caption_length
    rng, dtype = np.random.default_rng(0), jnp.dtype(model.dtype)
    tokens, width = model.num_kept, model.head_dim

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    angles = jnp.broadcast_to(
        rope_angles(model.grid, width, model.rope_theta)[None, :tokens], (images, tokens, width // 2)
    )
    mask = jnp.asarray(np.arange(length)[None, None] < rng.integers(1, length + 1, (images, 1, 1)))
    norms = [jnp.asarray(1 + 0.1 * rng.normal(size=width), jnp.float32) for _ in range(2)]
    for case, kv_heads, attended, rest in (
        ("self", model.kv_heads, tokens, (angles, None)),
        ("cross", model.heads, length, (None, mask)),
    ):
        query, gradient = (normal(images, model.heads, width, tokens) for _ in range(2))
        key, value = (normal(images, kv_heads, width, attended) for _ in range(2))
        yield case, [query, key, value, gradient, *norms], rest


def attention_gradients(kind: str, angles: Any, mask: Any) -> Callable[..., Any]:
    """Jitted (query, key, value, the output's gradient, norms) -> (output, gradients)."""

    def run(query: Any, key: Any, value: Any, gradient: Any, *norms: Any) -> Any:
        output, back = jax.vjp(lambda *heads: ATTENTIONS[kind](*heads, angles, mask), query, key, value, norms)
        return output, back(gradient)

    return jax.jit(run)


# Training


class DoesNotFit(Exception):
    """By the compiler's account, a step needs more memory than the device has."""


def train_row(arguments: argparse.Namespace, name: str, mesh: Mesh, emit: Emit, **changes: Any) -> None:
    """A training step at the largest batch that fits."""
    base = experiment(arguments, name, **changes)
    system = make_system(base.system)
    small = None if arguments.batch or arguments.tiny else step_bytes(base, system, mesh)
    first = arguments.batch or (TINY_BATCH if arguments.tiny else largest_batch(small, FREE * (bytes_limit() or 0)))
    refused = {}
    for batch in [first // 2**halved for halved in range(HALVINGS + 1) if first >= 2**halved]:
        try:
            found = timed_step(with_batch(base, batch), system, mesh, arguments)
        except DoesNotFit as error:
            refused[batch] = str(error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused[batch] = str(error)[:300]
        else:
            emit({**found, "step_bytes_by_batch": small, "refused": refused})
            return
        gc.collect()  # what the failed step held
    raise SystemExit(f"no batch fits: {refused}")


def train_without_text_row(arguments: argparse.Namespace, name: str, mesh: Mesh, emit: Emit) -> None:
    """The same with one layer of the text tower: its states are what cross-attention needs."""
    train_row(arguments, name, mesh, emit, text__layers=1)


def with_batch(base: Experiment, batch: int) -> Experiment:
    return dataclasses.replace(base, train=dataclasses.replace(base.train, batch_size=batch))


def step_bytes(base: Experiment, system: System, mesh: Mesh) -> dict[int, int] | None:
    """What the compiler gives a step of each of SMALL_BATCHES; None where it or the device does not say."""
    needs = {}
    for batch in SMALL_BATCHES if bytes_limit() else ():
        needs[batch] = needed_bytes(quickly_compiled(lower_step(with_batch(base, batch), system, mesh)))
    return needs if needs and None not in needs.values() else None


def quickly_compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """For its memory alone: choosing the fastest products takes most of a GPU's compile time, and hardly changes it."""
    if jax.default_backend() == "gpu":
        try:
            return lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})
        except jax.errors.JaxRuntimeError as error:  # an option of the compiler's own, which may go
            print(f"compiling as usual: {error}", flush=True)
    return lowered.compile()


def largest_batch(small: Mapping[int, int] | None, limit: float) -> int:
    """The largest power of two whose step fits, if memory grows evenly with the batch; the smallest if none does."""
    if small is None:
        return SMALL_BATCHES[0]
    (first, low), (second, high) = sorted(small.items())
    slope = (high - low) / (second - first)
    batch = SMALLEST_BATCH
    while 2 * batch <= LARGEST_BATCH and low + slope * (2 * batch - first) <= limit:
        batch *= 2
    return batch


def lower_step(config: Experiment, system: System, mesh: Mesh) -> jax.stages.Lowered:
    check_mesh(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    step = make_train_step(config.step_config, system, mesh)  # before the mesh is set: optax makes arrays
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(config.system, config.train.batch_size, mesh))


def timed_step(config: Experiment, system: System, mesh: Mesh, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step takes, on random latents under random tokens."""
    start = time.monotonic()
    compiled = lower_step(config, system, mesh).compile()
    compiling, need = time.monotonic() - start, needed_bytes(compiled)
    if need is not None and bytes_limit() is not None and need > bytes_limit():
        raise DoesNotFit(f"a step needs {need} bytes of {bytes_limit()}")
    optimizer = make_optimizer(config.optimizer)
    shardings = state_shardings(system, optimizer, mesh)
    with jax.set_mesh(mesh):
        state, batch = init_state(system, optimizer, shardings, config.seed), random_batch(config, mesh)
        initial, metrics = peak_bytes(), {}

        def step() -> None:
            nonlocal state, metrics
            state, metrics = jax.block_until_ready(compiled(state, batch))

        times = turns({"step": step}, arguments)["step"]
    metrics = jax.device_get(metrics)
    if metrics["bad_steps"]:
        raise SystemExit(f"{metrics['bad_steps']} steps were not finite: what they take says nothing")
    images, model = config.train.batch_size, config.model
    flops = 3 * total_flops(system.denoiser_flops("train"))
    tower = system.parts.text.flops(config.data.caption_length).flops
    return {
        "batch": images,
        "milliseconds": milliseconds(times),
        "images_per_second": timing.spread([images / seconds for seconds in times]),
        "mfu": mfu(times, images * flops),
        "mfu_with_text": mfu(times, images * (flops + tower)),
        "denoiser_gflops_per_image": flops / 1e9,
        "text_gflops_per_image": tower / 1e9,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before_steps": initial,
        "step_bytes": need,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "remat": model.remat,
        "compile_seconds": round(compiling, 1),
        "loss": float(metrics["loss"]),
    }


# The expert layer


def layer_row(arguments: argparse.Namespace, name: str, mesh: Mesh, emit: Emit) -> None:
    """The expert layer by rule and dispatch, and the dense FFN of equal FLOPs, taking turns."""
    config = experiment(arguments, f"XL-{name}").model
    groups, size = 2 if arguments.tiny else LAYER_GROUPS, int(config.group)
    hidden = round(config.capacity_factor) * config.expert_hidden
    kinds = {
        "expert_choice": config,
        "expert_choice_one_hot": dataclasses.replace(config, dispatch="one_hot"),
        "expert_choice_no_norm": dataclasses.replace(config, moe_output_norm="none"),
        "token_choice": dataclasses.replace(config, ffn="token_choice"),
    }
    keys = jax.random.split(jax.random.key(1), 2)
    with jax.set_mesh(mesh):
        x, gradient = (jax.random.normal(key, (groups, size, config.width), jnp.dtype(config.dtype)) for key in keys)
        dense_graph, dense_weights = split(functools.partial(FeedForward, config.width, hidden))
        graphs = {kind: split(functools.partial(MixtureOfExperts, changed)) for kind, changed in kinds.items()}
        weights = graphs["expert_choice"][1]  # all kinds have the same
        functions = {kind: with_gradients(functools.partial(moe, graph)) for kind, (graph, _) in graphs.items()}
        del graphs
        candidates = {kind: functools.partial(finished, run, weights, x, gradient) for kind, run in functions.items()}
        dense = with_gradients(functools.partial(feed_forward, dense_graph))
        candidates["dense"] = functools.partial(finished, dense, dense_weights, x, gradient)
        outputs = {
            kind: np.asarray(candidates[kind]()[0], np.float32) for kind in ("expert_choice", "expert_choice_one_hot")
        }
        times = turns(candidates, arguments)
    emit(
        {
            "tokens": groups * size,
            "group": size,
            "width": config.width,
            "dense_hidden": hidden,
            "gflops": 3 * 2 * 2 * groups * size * config.width * hidden / 1e9,
            "milliseconds": {kind: milliseconds(seconds) for kind, seconds in times.items()},
            "over_dense": {kind: paired(seconds, times["dense"]) for kind, seconds in times.items()},
            "dense_peak_share": mfu(times["dense"], 3 * 2 * 2 * groups * size * config.width * hidden),
            "one_hot_difference": relative_error(outputs["expert_choice_one_hot"], outputs["expert_choice"]),
            "peak_bytes": peak_bytes(),
        }
    )


# Sampling


def sample_row(arguments: argparse.Namespace, name: str, mesh: Mesh, emit: Emit) -> None:
    """Images a second of a model with experts and of XL-dense, taking turns; a line for each batch."""
    configs = {which: experiment(arguments, which) for which in (name, "XL-dense")}
    systems = {which: make_system(config.system) for which, config in configs.items()}
    params = {which: drawn(system, mesh) for which, system in systems.items()}
    params["XL-dense"]["text"] = params[name]["text"]  # once in memory
    flops = {which: total_flops(system.denoiser_flops("sample")) for which, system in systems.items()}
    for batch in TINY_SAMPLED if arguments.tiny else SAMPLED:
        try:
            times = turns(samplers(configs, systems, params, mesh, batch), arguments)
        except jax.errors.JaxRuntimeError as error:
            emit({"batch": batch, "error": str(error)[:500]})
            continue
        over, by_flops = paired(times[name], times["XL-dense"]), flops[name] / flops["XL-dense"]
        emit(
            {
                "batch": batch,
                "steps": configs[name].sampling.num_steps,
                "guidance": configs[name].sampling.guidance.scale,
                "images_per_second": {
                    which: timing.spread([batch / seconds for seconds in found]) for which, found in times.items()
                },
                "overhead_percent": {key: 100 * (value - 1) for key, value in over.items()},
                "overhead_percent_by_flops": 100 * (by_flops - 1),
                "peak_bytes": peak_bytes(),
            }
        )


def drawn(system: System, mesh: Mesh) -> Params:
    """Parameters as a run draws them."""
    with jax.set_mesh(mesh):
        return jax.jit(system.init, out_shardings=system.shardings(mesh))(run_key(0, "init"))


def samplers(
    configs: Mapping[str, Experiment],
    systems: Mapping[str, System],
    params: Mapping[str, Params],
    mesh: Mesh,
    batch: int,
) -> dict[str, Callable[[], Any]]:
    """For each model a function that draws `batch` images and waits for them."""
    candidates = {}
    for which, config in configs.items():
        sampling = dataclasses.replace(config.sampling, batch_size=batch)
        sampler = make_sampler(systems[which], sampling, mesh)
        rng = np.random.default_rng(0)
        tokens, null = random_tokens(rng, config, batch), np.zeros((1, config.data.caption_length), np.int32)
        null[0, 0] = 1
        keys = sample_keys(0, [""] * batch, range(batch))
        candidates[which] = functools.partial(finished, sampler, params[which], tokens, null, keys)
    return candidates


KINDS_OF_ROWS = {
    "attention": attention_row,
    "train": train_row,
    "train_without_text": train_without_text_row,
    "layer": layer_row,
    "sample": sample_row,
}
