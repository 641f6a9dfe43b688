"""Makes tiny models with random parameters, and inputs for them. Share them, because compiling is slow."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ecdit.components import TextStates, TextWidths
from ecdit.models.config import DiTConfig
from ecdit.models.dit import DiT

# Unoptimised code runs these sizes as fast and compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = DiTConfig(
    latent_size=8,
    latent_channels=3,
    patch_size=2,
    width=16,
    depth=2,
    extra_blocks=1,
    heads=4,
    kv_heads=2,
    rope_theta=100.0,
    prediction="velocity",
    attention="plain",
    projections="plain",
    absolute_positions=False,
    ffn_multiplier=2,
    ffn="expert_choice",
    even_ffn_multiplier=2,
    num_experts=4,
    capacity_factor=2.0,
    token_choice_dropless=False,
    balance_loss_weight=0.01,
    expert_width=0,
    num_shared_experts=0,
    router_input="modulated",
    gate_norm="none",
    route_scale=1.0,
    router_z_loss=0.0,
    router_init_std=0.006,
    group="image",
    sampling_group="image",
    dispatch="gather",
    expert_products="plain",
    moe_output_norm="expert",
    mask_ratio=0.5,
    block_table=True,
    gate_init=0.2,
    remat="none",
    scan_unroll=1,
    dtype="float32",
)
TEXT_WIDTH, TEXT_LENGTH = 12, 5


class Model:
    """A module's structure, and random parameters none of which is zero: `model(params)` is the module."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], seed: int = 0):
        with nnx.use_eager_sharding(False):
            self.graphdef, self.abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
        rng = np.random.default_rng(seed)
        shapes = nnx.to_pure_dict(self.abstract)
        self.params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)

    def __call__(self, params: Any) -> Any:
        return nnx.merge(self.graphdef, nnx.State(params))


def config(**changes: Any) -> DiTConfig:
    return dataclasses.replace(CONFIG, **changes)


class Inputs(NamedTuple):
    """What a DiT is called with, but for the group size."""

    latents: Any
    time: Any
    text: TextStates
    size_crop: Any
    kept: Any


def inputs(config: DiTConfig, batch: int, seed: int = 0, masked: bool = True) -> Inputs:
    """Random inputs: captions of every length from 1, and `kept` in raster order (None unless `masked`)."""
    rng = np.random.default_rng(seed)
    side = config.latent_size
    mask = np.arange(TEXT_LENGTH)[None, :] < 1 + np.arange(batch)[:, None] % TEXT_LENGTH
    text = TextStates(normal(rng, batch, TEXT_LENGTH, TEXT_WIDTH), mask, normal(rng, batch, TEXT_WIDTH))
    kept = np.stack([np.sort(rng.permutation(config.num_tokens)[: config.num_kept]) for _ in range(batch)])
    return Inputs(
        latents=normal(rng, batch, side, side, config.latent_channels),
        time=rng.uniform(0.1, 0.9, batch).astype(np.float32),
        text=text,
        size_crop=rng.uniform(0, 500, (batch, 4)).astype(np.float32),
        kept=kept.astype(np.int32) if masked else None,
    )


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@functools.cache
def dit(config: DiTConfig) -> Model:
    return Model(lambda rngs: DiT(config, TextWidths(TEXT_WIDTH, TEXT_WIDTH), rngs))


@functools.cache
def forward(config: DiTConfig, group_size: int) -> Callable[[Any, Inputs], Any]:
    """The compiled (params, inputs) -> (velocity, report)."""
    return jit(lambda params, inputs: dit(config)(params).forward(*inputs, group_size))


def replace_leaf(params: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """`params` with the leaf at a path such as "head/kernel" changed."""
    name, _, rest = path.partition("/")
    return {**params, name: replace_leaf(params[name], rest, change) if rest else change(params[name])}


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that two trees agree, leaf by leaf, to `tolerance` times the largest number of the leaf."""
    expected_leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
    for (path, b), a in zip(expected_leaves, structure.flatten_up_to(actual), strict=True):
        b = np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


def float32_all(tree: Any) -> bool:
    return all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
