"""Shares one device's experiments, inputs, times and memory among the rows of `accelerator`."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ecdit.chips import limits
from ecdit.experiment import Experiment
from ecdit.partitioning import batch_sharding
from ecdit.training.step import Batch, abstract_batch
from tests.benchmarks import timing
from tests.benchmarks.paper import paper_experiment

TINY: Mapping[str, Any] = {
    "model__latent_size": 8,
    "data__image_size": 64,
    "model__width": 32,
    "model__depth": 2,
    "model__heads": 4,
    "model__kv_heads": 2,
    "model__extra_blocks": 1,
    "model__group": "16",
    "text__vocab_size": 300,
    "data__vocab_size": 300,
    "data__caption_length": 8,
    "text__width": 16,
    "text__heads": 2,
    "text__layers": 2,
    "model__dtype": "float32",  # quicker to compile for a CPU
    "sampling__num_steps": 2,
}
# On one device; what is not there is not read.
ALONE = {
    "mesh__slices": 1,
    "mesh__data": 1,
    "mesh__fsdp": -1,
    "mesh__expert": 1,
    "mesh__tensor": 1,
    "runtime__distributed": False,
}
SLOW = 2.0  # seconds of a call, from which three rounds are enough


def experiment(arguments: argparse.Namespace, name: str, **changes: Any) -> Experiment:
    """configs/ec_dit.py:`name` on one device, with the command line's changes."""
    cache = {"runtime__compilation_cache": "" if arguments.tiny else arguments.cache or ""}
    asked = {}
    for text in arguments.set:
        key, _, value = text.partition("=")
        try:
            asked[key.replace(".", "__")] = json.loads(value)
        except json.JSONDecodeError:
            asked[key.replace(".", "__")] = value
    attention = arguments.attention or "plain"
    # As each kernel reads heads: cuDNN's would transpose what has tokens last.
    kind = {"model__attention": attention, "model__projections": "tokens_last" if attention == "fused" else "plain"}
    tiny = TINY if arguments.tiny else {}
    return paper_experiment(name, **{**ALONE, **cache, **kind, **tiny, **changes, **asked})


def random_batch(config: Experiment, mesh: Mesh) -> Batch:
    """A batch as data would give it: captions of random length that end in EOS and padding."""
    rng, size = np.random.default_rng(0), config.data.image_size
    shapes = abstract_batch(config.system, config.train.batch_size, mesh)
    mean = rng.normal(size=(*shapes["latents"].shape[:3], config.model.latent_channels)).astype(np.float16)
    batch = {
        "latents": np.concatenate([mean, np.full_like(mean, -30)], axis=-1),  # with next to no variance
        "tokens": random_tokens(rng, config, shapes["tokens"].shape[0]),
        "size_crop": np.broadcast_to(np.float32([size, size, 0, 0]), shapes["size_crop"].shape),
    }
    return jax.device_put(batch, batch_sharding(mesh))


def random_tokens(rng: np.random.Generator, config: Experiment, rows: int) -> np.ndarray:
    length = config.data.caption_length
    tokens = rng.integers(3, config.data.vocab_size, (rows, length)).astype(np.int32)
    last = rng.integers(0, length, rows)
    tokens[np.arange(length)[None] > last[:, None]] = 0  # padding
    tokens[np.arange(rows), last] = 1  # end of sequence
    return tokens


def turns(candidates: Mapping[str, Callable[[], Any]], arguments: argparse.Namespace) -> timing.Seconds:
    """Seconds of a call in each round; as many calls a turn as --turn asks for, fewer rounds where a call is long."""
    longest = 0.0
    for candidate in candidates.values():
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            candidate()
            last = time.perf_counter() - start
        longest = max(longest, last)
    if arguments.tiny:
        return timing.take_turns(candidates, 2, 1, warmup=0)
    rounds = min(arguments.rounds, 3) if longest > SLOW else arguments.rounds
    return timing.take_turns(candidates, rounds, max(1, round(arguments.turn / longest)), warmup=0)


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return timing.spread([1e3 * x for x in seconds])


def paired(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """The ratio within each round."""
    return timing.spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def mfu(seconds: list[float], flops: float) -> dict[str, float] | None:
    """Share of the device's peak; None where that is not known."""
    device = limits(jax.devices()[0].device_kind)
    return timing.spread([flops / x / device.peak_flops for x in seconds]) if device else None


def memory(name: str) -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get(name)


def bytes_limit() -> int | None:
    """What JAX may take of the device's memory; None where it does not say (a CPU)."""
    return memory("bytes_limit")


def peak_bytes() -> int | None:
    """The most that this process had on the device at once."""
    return memory("peak_bytes_in_use")


def needed_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What the compiler gives arguments, results and intermediates; None where it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    reused = found.alias_size_in_bytes  # by results, of arguments
    return found.argument_size_in_bytes + found.output_size_in_bytes - reused + found.temp_size_in_bytes
