"""Compares the project's expert-choice layer with the fastest dense FFN with the same activated FLOPs.

    python -m tests.benchmarks.moe_layer [--runs=5] [--json=FILE] [--sizes=128x64x64x8,512x16x256x16]

A size is width x images x tokens of an image x experts. With f_c = 2 every token is worked on by two experts of hidden
width 4 d on average, which is what a dense FFN of hidden width 8 d multiplies. Forward and backward, gradients with
respect to parameters and input, float32. `moe` is the layer alone; `moe_expert_norm` has the norm of every expert's
output that configs/emoji.py asks for, and which no dense candidate has.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ecdit.experiment import make_experiment
from ecdit.models.config import DiTConfig
from ecdit.models.moe import FeedForward, MixtureOfExperts
from ecdit.models.routing import expert_capacity
from ecdit.partitioning import make_mesh
from tests.benchmarks import timing
from tests.runs import emoji_config

Weights = dict[str, Array]
CAPACITY_FACTOR = 2.0
MAX_RELATIVE_ERROR = 1e-3  # of float32 sums over thousands of products, in other orders


def layer_config(width: int, experts: int, **changes: Any) -> DiTConfig:
    """The emoji model's config for an expert-choice layer of this size."""
    config = make_experiment(emoji_config()).model
    return dataclasses.replace(
        config, width=width, num_experts=experts, capacity_factor=CAPACITY_FACTOR, ffn="expert_choice", **changes
    )


def split(make: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef, Weights]:
    """The structure of the layer make(rngs=...), and its parameters as it draws them."""
    with nnx.use_eager_sharding(False):  # as System.init does
        graphdef, state = nnx.split(make(rngs=nnx.Rngs(0)), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def moe(graphdef: nnx.GraphDef, weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """The project's expert-choice layer; the tokens of an image compete."""
    return nnx.merge(graphdef, nnx.State(weights))(x, x.shape[1])[0]


def feed_forward(graphdef: nnx.GraphDef, weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """The project's own dense FFN."""
    return nnx.merge(graphdef, nnx.State(weights))(x)


def plain(weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """What most would write first."""
    return jax.nn.gelu(x @ weights["up"]) @ weights["down"]


def flat(weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """The tokens of all images in one matrix."""
    return plain(weights, x.reshape(-1, x.shape[-1])).reshape(x.shape)


def recomputed(weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """`flat` whose backward pass computes GELU again instead of saving what is inside it."""
    hidden = jax.checkpoint(jax.nn.gelu)(x.reshape(-1, x.shape[-1]) @ weights["up"])
    return (hidden @ weights["down"]).reshape(x.shape)


def halves(weights: Weights, x: Float[Array, "B N d"]) -> Float[Array, "B N d"]:
    """The hidden units as a batch of two, each as wide as an expert's."""
    width = x.shape[-1]
    up = weights["up"].reshape(width, 2, -1).swapaxes(0, 1)
    down = weights["down"].reshape(2, -1, width)
    hidden = jax.nn.gelu(jnp.einsum("nd,edf->enf", x.reshape(-1, width), up))
    return jnp.einsum("enf,efd->nd", hidden, down).reshape(x.shape)


PLAIN = {f.__name__: f for f in (plain, flat, recomputed, halves)}


def with_gradients(apply: Callable[[Weights, Array], Array]) -> Callable[[Weights, Array, Array], Any]:
    """Jitted (weights, x, cotangent) -> (output, gradients of weights and x)."""

    def run(weights: Weights, x: Array, cotangent: Array) -> tuple[Array, tuple[Weights, Array]]:
        output, pull_back = jax.vjp(apply, weights, x)
        return output, pull_back(cotangent)

    return jax.jit(run)


def finished(run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns, when it is computed."""
    return jax.block_until_ready(run(*arguments))


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference of two trees' leaves, over the largest value of that leaf."""
    errors = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max() / np.abs(b).max(), found, expected)
    return float(np.max(jax.tree.leaves(errors)))  # which is NaN if one is


def check_slots(name: str, tokens: int, experts: int) -> None:
    """Ends the benchmark if rounding gives the experts more tokens than a dense FFN of equal FLOPs works on."""
    slots = expert_capacity(tokens, experts, CAPACITY_FACTOR) * experts
    if slots != CAPACITY_FACTOR * tokens:
        raise SystemExit(f"{name}: {experts} experts have {slots} slots for {tokens} tokens: unequal FLOPs")


def check_agreement(name: str, errors: dict[str, float]) -> None:
    """Ends the benchmark if a candidate computes something else than it should: its speed would say nothing."""
    wrong = {candidate: error for candidate, error in errors.items() if not error <= MAX_RELATIVE_ERROR}
    if wrong:
        raise SystemExit(f"{name}: relative errors above {MAX_RELATIVE_ERROR}: {wrong}")


def layer_by_loop(graphdef: nnx.GraphDef, weights: Weights, x: np.ndarray) -> np.ndarray:
    """What the layer should give, image by image and expert by expert: the routing is the layer's, the rest is not."""
    layer = nnx.merge(graphdef, nnx.State(weights))
    routing = layer.route(layer.router_logits(jnp.asarray(x), None))
    index, gate = np.asarray(routing.index), np.asarray(routing.gate)
    up, down = np.asarray(weights["up"]), np.asarray(weights["down"])
    output = np.zeros_like(x)
    for image in range(x.shape[0]):
        for expert in range(up.shape[0]):
            tokens = index[image, expert]
            hidden = x[image, tokens] @ up[expert]
            hidden *= 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            output[image, tokens] += gate[image, expert][:, None] * (hidden @ down[expert])
    return output


def measure_size(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One size's case: checked first, then timed."""
    width, images, tokens, experts = map(int, size.split("x"))
    config = layer_config(width, experts, moe_output_norm="none")
    normed = dataclasses.replace(config, moe_output_norm="expert")
    hidden = round(CAPACITY_FACTOR) * config.ffn_multiplier * width
    check_slots(size, tokens, experts)
    keys = jax.random.split(jax.random.key(1), 4)
    x, cotangent = (jax.random.normal(key, (images, tokens, width)) for key in keys[:2])
    dense_weights = {
        "up": jax.random.normal(keys[2], (width, hidden)) / width**0.5,
        "down": jax.random.normal(keys[3], (hidden, width)) / hidden**0.5,
    }

    graphdef, weights = split(functools.partial(MixtureOfExperts, config))
    normed_graphdef, _ = split(functools.partial(MixtureOfExperts, normed))
    dense_graphdef, _ = split(functools.partial(FeedForward, width, hidden))
    dense = {"feed_forward": functools.partial(feed_forward, dense_graphdef), **PLAIN}
    functions = {name: (with_gradients(apply), dense_weights) for name, apply in dense.items()}
    functions["moe"] = with_gradients(functools.partial(moe, graphdef)), weights
    functions["moe_expert_norm"] = with_gradients(functools.partial(moe, normed_graphdef)), weights

    expected = functions["plain"][0](dense_weights, x, cotangent)
    errors = {name: relative_error(functions[name][0](dense_weights, x, cotangent), expected) for name in dense}
    output, _ = functions["moe"][0](weights, x, cotangent)
    errors["moe"] = relative_error(output, layer_by_loop(graphdef, weights, np.asarray(x)))
    check_agreement(size, errors)

    candidates = {
        name: functools.partial(finished, run, weights, x, cotangent) for name, (run, weights) in functions.items()
    }
    seconds = timing.take_turns(candidates, arguments.rounds, arguments.calls)
    flops = 3 * 2 * 2 * images * tokens * width * hidden
    sizes = (
        f"width {width}, batch {images}, {tokens} tokens a group, {experts} experts of hidden {4 * width}, f_c 2, "
        f"dense hidden {hidden}, {flops / 1e9:.2f} GFLOP of matrix products each, float32, forward and backward"
    )
    return timing.case(sizes, seconds, timing.fastest(seconds, list(dense)), relative_error=errors)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    with jax.set_mesh(make_mesh(make_experiment(emoji_config()).mesh)):
        cases = {size: measure_size(size, arguments) for size in arguments.sizes.split(",")}
    return {"environment": environment, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128x64x64x8,512x16x256x16", help="width x images x tokens x experts")
    timing.run_all("moe_layer", timing.parse(parser, rounds=15, calls=2), measure)


if __name__ == "__main__":
    main()
