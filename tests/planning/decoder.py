"""Defines the calibrator of the step-time estimate, a dense language model with a published speed on a v5p-128.

AI-Hypercomputer/maxtext publishes how it trains 32 B parameters on the 64 chips of a v5p-128, in
MaxText/configs/v5p/32b.sh (global_parameter_scale 32, which is the shape below; remat "minimal"), and that it measures
328 TFLOP/s per chip, 71.47 % of peak, in MaxText/configs/v5p/README.md. This file has that step in plain JAX, to be
compiled for the same slice and estimated like the product's steps. It differs as follows:

- Attention is plain. MaxText's is a Pallas kernel, whose time no compiler estimates.
- All 64 chips hold a shard of each weight and a part of the batch. MaxText splits every layer over 4 chips
  (ici_tensor_parallelism=4) and the weights over 16.
- Each chip has 4 sequences, which fit beside the attention's scores. MaxText had 8, later 7 and 6.

Gathers and reductions are written out, in shard_map, each over a part of the slice: the rows of every matrix are
sharded over 16 chips and the columns over 4. Over all chips of a v5p slice at once the TPU compiler has no
all-gather and no reduce-scatter, and all-reduces matrices that are padded with zeros instead.

Axes: B sequences of a chip, N tokens, d width, f hidden width, H heads, k head width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

WIDTH, HIDDEN, LAYERS, HEADS, LENGTH, VOCABULARY = 8192, 28672, 32, 64, 2048, 32000
BATCH_PER_CHIP = 4
MEASURED_MFU = 0.7147  # of a v5p's 459 TFLOP/s

COLUMNS = 4  # chips over which the columns of a matrix are sharded; its rows are over the others
AXES = ("rows", "columns")
MATRIX = PartitionSpec(*AXES)
# Of a block; embeddings are matrices V x d.
BLOCK = {
    "query": (WIDTH, WIDTH),
    "key": (WIDTH, WIDTH),
    "value": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
    "attention_norm": (WIDTH,),
    "mlp_norm": (WIDTH,),
}

# What MaxText's script of 2024 passes to libtpu: gathers run behind matrix products.
COMPILER_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
OPTIMIZER = optax.adamw(3e-5, b1=0.9, b2=0.95, weight_decay=0.1)  # MaxText's

Params = dict[str, Any]


def compile_decoder(
    topology_devices: Sequence[Any],
    layers: int = LAYERS,
    batch_per_chip: int = BATCH_PER_CHIP,
    compiler_options: Mapping[str, str] = COMPILER_OPTIONS,
) -> jax.stages.Compiled:
    """The training step, compiled for these devices; takes minutes."""
    return lower_step(topology_devices, layers, batch_per_chip).compile(compiler_options=dict(compiler_options))


def lower_step(
    topology_devices: Sequence[Any], layers: int = LAYERS, batch_per_chip: int = BATCH_PER_CHIP
) -> jax.stages.Lowered:
    """(params, Adam's state, tokens) -> (params, Adam's state, loss), of abstract arrays: nothing is allocated."""
    mesh = make_mesh(topology_devices)
    loss_and_gradients = sharded_loss_and_gradients(mesh)

    def step(params: Params, moments: Any, tokens: Int[Array, "B N"]) -> tuple[Params, Any, Float[Array, ""]]:
        loss, gradients = loss_and_gradients(params, tokens)
        scale = jnp.minimum(1.0, 1.0 / optax.tree.norm(gradients))  # clipped to a norm of 1
        updates, moments = OPTIMIZER.update(jax.tree.map(lambda g: scale * g, gradients), moments, params)
        return optax.apply_updates(params, updates), moments, loss

    params = abstract_params(mesh, layers)
    moments = _like_params(jax.eval_shape(OPTIMIZER.init, params), params, mesh)
    batch = NamedSharding(mesh, PartitionSpec(AXES))
    tokens = jax.ShapeDtypeStruct((batch_per_chip * len(topology_devices), LENGTH), jnp.int32, sharding=batch)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, NamedSharding(mesh, PartitionSpec())))
    return jitted.lower(params, moments, tokens)


def make_mesh(topology_devices: Sequence[Any]) -> Mesh:
    """Rows of matrices over most of the devices, columns over COLUMNS of them."""
    sizes = len(topology_devices) // COLUMNS, COLUMNS
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=topology_devices)


def model_flops(num_chips: int, layers: int = LAYERS, batch_per_chip: int = BATCH_PER_CHIP) -> float:
    """Of one step on all chips, as MaxText counted when it published (arXiv 2204.02311, appendix B).

    That is 6 a parameter and token, embeddings too, and of attention the half that the causal mask leaves.
    """
    tokens = num_chips * batch_per_chip * LENGTH
    block = sum(math.prod(shape) for shape in BLOCK.values())
    params = layers * block + 2 * VOCABULARY * WIDTH + WIDTH
    return float(tokens * (6 * params + 6 * layers * LENGTH * WIDTH))


def param_specs() -> Params:
    """How each parameter is sharded; those of blocks are stacked."""
    blocks = {name: PartitionSpec(None, *(MATRIX if len(shape) == 2 else ())) for name, shape in BLOCK.items()}
    return {"embedding": MATRIX, "blocks": blocks, "norm": PartitionSpec(), "unembedding": MATRIX}


def abstract_params(mesh: Mesh, layers: int) -> Params:
    """Float32, as optimizers want them."""
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "blocks": {name: (layers, *shape) for name, shape in BLOCK.items()},
        "norm": (WIDTH,),
        "unembedding": (VOCABULARY, WIDTH),
    }
    return jax.tree.map(
        lambda spec, shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)),
        param_specs(),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def _like_params(moments: Any, params: Params, mesh: Mesh) -> Any:
    """Adam's state with the parameters' shardings."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree.map_params(
        OPTIMIZER,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        moments,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
    )


def sharded_loss_and_gradients(mesh: Mesh) -> Callable[[Params, Array], tuple[Array, Params]]:
    """(params, tokens) -> (mean loss, its gradients, sharded like the parameters)."""

    def of_a_chip(params: Params, tokens: Int[Array, "B N"]) -> tuple[Float[Array, ""], Params]:
        # The transposes of the gathers add up the chips' gradients.
        loss, gradients = jax.value_and_grad(lambda params: _loss(params, tokens) / mesh.size)(params)
        return jax.lax.psum(loss, AXES), gradients

    specs = param_specs()
    return jax.shard_map(
        of_a_chip, mesh=mesh, in_specs=(specs, PartitionSpec(AXES)), out_specs=(PartitionSpec(), specs)
    )


def _loss(params: Params, tokens: Int[Array, "B N"]) -> Float[Array, ""]:
    """Cross-entropy of the next token."""
    # A product, as with MaxText's use_iota_embed: its transpose needs no scatter.
    embedding = _gathered(params["embedding"])
    x = jax.nn.one_hot(tokens, len(embedding), dtype=embedding.dtype) @ embedding
    block = jax.checkpoint(
        _block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    )  # MaxText's "minimal"
    x, _ = jax.lax.scan(block, x, params["blocks"])
    logits = (_norm(x, params["norm"]) @ _gathered(params["unembedding"]).T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def _block(x: Float[Array, "B N d"], params: Params) -> tuple[Float[Array, "B N d"], None]:
    """Causal attention and a gated MLP."""
    y = _norm(x, params["attention_norm"])
    query, key, value = (
        (y @ _gathered(params[name])).reshape(*y.shape[:2], HEADS, -1) for name in ("query", "key", "value")
    )
    attended = jax.nn.dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)
    x = x + attended.reshape(x.shape) @ _gathered(params["out"])
    y = _norm(x, params["mlp_norm"])
    hidden = jax.nn.silu(y @ _gathered(params["gate"])) * (y @ _gathered(params["up"]))
    return x + hidden @ _gathered(params["down"]), None


def _gathered(shard: Float[Array, "i j"]) -> Float[Array, "I J"]:
    """The whole matrix in bfloat16, from all chips; its transpose scatters the sum of the gradients."""
    some = jax.lax.all_gather(shard.astype(jnp.bfloat16), "columns", axis=1, tiled=True)
    return jax.lax.all_gather(some, "rows", axis=0, tiled=True)


def _norm(x: Float[Array, "B N d"], scale: Float[Array, " d"]) -> Float[Array, "B N d"]:
    """RMSNorm in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-5)
    scale = jax.lax.pcast(scale, AXES, to="varying")  # or the gradient of y is reduced, not the scale's
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def _rotated(x: Float[Array, "B N H k"]) -> Float[Array, "B N H k"]:
    """Rotary positions (arXiv 2104.09864) in float32."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = (jnp.broadcast_to(f(angles), first.shape) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)
