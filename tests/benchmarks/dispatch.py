"""Compares expert choice by indices ("gather") with products by one-hot matrices ("one_hot"), by group size.

    python -m tests.benchmarks.dispatch [--runs=5] [--json=FILE] [--groups=64,256,1024] [--tokens=4096] [--width=128]

Both are the project's layer, which gives the same with either. With PyTorch installed (the `parity` extra) its plain
forms of the same layer take turns too, for information: the batch in groups, top-k, an index or one-hot products,
batched matrix products. All candidates get the same weights, and must agree before they are timed. Forward and
backward, gradients with respect to parameters and input, float32.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ecdit.experiment import make_experiment
from ecdit.models.moe import MixtureOfExperts
from ecdit.models.routing import expert_capacity
from ecdit.partitioning import make_mesh
from tests.benchmarks import timing
from tests.benchmarks.moe_layer import (
    CAPACITY_FACTOR,
    Weights,
    check_agreement,
    finished,
    layer_config,
    moe,
    relative_error,
    split,
    with_gradients,
)
from tests.runs import emoji_config


def torch_layer(form: str, capacity: int) -> Callable[..., Any]:
    """(weights, x) -> output, in PyTorch, by index or by one-hot matrices. Axes as in ecdit.models.moe."""
    import torch
    from torch.nn import functional

    def experts(slots: torch.Tensor, weights: dict) -> torch.Tensor:
        hidden = functional.gelu(torch.bmm(slots, weights["up"]), approximate="tanh")
        return torch.bmm(hidden, weights["down"])

    def by_index(weights: dict, x: torch.Tensor, gate: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        groups, size, width = x.shape
        flat = index + size * torch.arange(groups)[:, None, None]  # which of all tokens, (G, E, C)
        flat = flat.transpose(0, 1).flatten(1)  # (E, G C)
        outputs = experts(x.reshape(-1, width)[flat], weights) * gate.transpose(0, 1).flatten(1)[..., None]
        zeros = torch.zeros(groups * size, width)
        return zeros.index_add(0, flat.flatten(), outputs.flatten(0, 1)).view_as(x)

    def by_one_hot(weights: dict, x: torch.Tensor, gate: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        chosen = functional.one_hot(index, x.shape[1]).to(x.dtype)  # (G, E, C, S)
        slots = torch.einsum("gecs,gsd->egcd", chosen, x)
        outputs = experts(slots.flatten(1, 2), weights).view_as(slots)
        return torch.einsum("gecs,egcd->gsd", chosen * gate[..., None], outputs)

    def apply(weights: dict, x: torch.Tensor) -> torch.Tensor:
        affinity = torch.softmax(x @ weights["router"], dim=-1).transpose(1, 2)
        gate, index = torch.topk(affinity, capacity)
        return (by_index if form == "gather" else by_one_hot)(weights, x, gate, index)

    return apply


def torch_candidates(capacity: int, weights: Weights, x: jax.Array, cotangent: jax.Array) -> dict[str, Callable]:
    """By name: functions that return (output, (gradients of weights, of x)), the weights copied."""
    import torch

    torch.set_num_threads(os.cpu_count())

    def tensor(array: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(array))

    def candidate(form: str) -> Callable[[], Any]:
        apply = torch_layer(form, capacity)
        leaves = {name: tensor(weight).requires_grad_() for name, weight in weights.items()}
        inputs, pulled = tensor(x).requires_grad_(), tensor(cotangent)

        def run() -> Any:
            output = apply(leaves, inputs)
            *grads, input_grad = torch.autograd.grad(output, [*leaves.values(), inputs], pulled)
            return output.detach(), (dict(zip(leaves, grads, strict=True)), input_grad)

        return run

    return {f"torch_{form}": candidate(form) for form in ("gather", "one_hot")}


def measure_group(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One group size's case: checked first, then timed."""
    width, experts = arguments.width, arguments.experts
    groups, rest = divmod(arguments.tokens, size)
    if rest:
        raise SystemExit(f"--groups: {size} does not divide --tokens={arguments.tokens}")
    capacity = expert_capacity(size, experts, CAPACITY_FACTOR)
    x, cotangent = (jax.random.normal(key, (groups, size, width)) for key in jax.random.split(jax.random.key(1)))
    # Routers start near 0, where all affinities are nearly equal and rounding alone could part the candidates.
    changes = {"moe_output_norm": "none", "router_init_std": width**-0.5}
    candidates: dict[str, Callable[[], Any]] = {}
    for form in ("gather", "one_hot"):
        config = layer_config(width, experts, dispatch=form, **changes)
        graphdef, weights = split(functools.partial(MixtureOfExperts, config))
        run = with_gradients(functools.partial(moe, graphdef))
        candidates[form] = functools.partial(finished, run, weights, x, cotangent)
    if importlib.util.find_spec("torch"):
        candidates |= torch_candidates(capacity, weights, x, cotangent)

    expected = jax.tree.map(np.asarray, candidates["gather"]())
    errors = {name: relative_error(jax.tree.map(np.asarray, run()), expected) for name, run in candidates.items()}
    check_agreement(f"groups of {size}", errors)
    seconds = timing.take_turns(candidates, arguments.rounds, arguments.calls)
    sizes = (
        f"{groups} groups of {size} tokens, width {width}, {experts} experts of hidden {4 * width}, f_c 2, "
        f"capacity {capacity}, float32, forward and backward"
    )
    return timing.case(sizes, seconds, "gather", relative_error=errors)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    environment = timing.use_emoji_runtime()
    if importlib.util.find_spec("torch"):
        import torch

        environment["torch"] = f"{torch.__version__}, {os.cpu_count()} threads"
    else:
        environment["torch"] = "not installed: left out"
    with jax.set_mesh(make_mesh(make_experiment(emoji_config()).mesh)):
        cases = {f"group_{size}": measure_group(int(size), arguments) for size in arguments.groups.split(",")}
    return {"environment": environment, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="64,256,1024", help="tokens of a group")
    parser.add_argument("--tokens", type=int, default=4096, help="of all groups")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=8)
    timing.run_all("dispatch", timing.parse(parser, rounds=15, calls=2), measure)


if __name__ == "__main__":
    main()
