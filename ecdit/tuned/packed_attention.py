"""Computes the attention of packed captions in one Pallas kernel, which keeps scores out of the chip's main memory.

No caption is longer than a chunk, so the token at place i of a chunk attends to places 0 to i of its own chunk, or to
places after i of the chunk before. These are as many keys as a chunk has: a matrix of c x c scores holds both, with
half of the exponentials that keys of two whole chunks take. (The products still compute both.)

A step of the kernel's grid computes some heads of a chunk. `_tile`, the function of one head, is plain JAX; on other
platforms than TPUs it is mapped over chunks and heads. There is no backward pass, because captions are packed for
frozen encoders alone.

Axes: C chunks, H heads, k head width, c tokens of a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ecdit.partitioning import AXIS_RULES

STEP_BYTES = 2 * 2**20  # of a grid step's blocks, of which a chip holds two: VMEM has 16 MB on v4
HEADS_TOGETHER = 10  # heads per iteration at most; the compiler interleaves their work
LANES = 128  # numbers in a row of a tile
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # in place of masked scores


@jax.custom_vjp
def packed_attention(
    query: Float[Array, "C H k c"],
    key: Float[Array, "C H k c"],
    value: Float[Array, "C H k c"],
    positions: Int[Array, "C c"],
) -> Float[Array, "C H k c"]:
    """Returns softmax(query key / sqrt(k)) value over the tokens of each token's own caption up to itself.

    Scores and softmax are float32. The first chunk of a device must not continue a caption.

    Args:
      query: heads of the queries.
      key: heads of the keys.
      value: heads of the values.
      positions: of each token in its caption, below c. A token attends to itself and to so many tokens before it.

    Raises:
      NotImplementedError: it is differentiated.
    """
    attend = functools.partial(jax.lax.platform_dependent, tpu=forward_kernel, default=_forward)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(query, key, value, positions)
    heads, chunks = PartitionSpec(AXIS_RULES["batch"], AXIS_RULES["heads"]), PartitionSpec(AXIS_RULES["batch"])
    # JAX cannot infer over which mesh axes a kernel's results vary.
    split = jax.shard_map(attend, in_specs=(heads, heads, heads, chunks), out_specs=heads, check_vma=False)
    return split(query, key, value, positions)


def _refuse_gradient(*inputs: Any) -> Any:
    raise NotImplementedError("packed attention has no gradient: only frozen text encoders pack captions")


packed_attention.defvjp(_refuse_gradient, _refuse_gradient)


def _tile(
    query: Float[Array, "k c"],
    key: Float[Array, "k c"],
    value: Float[Array, "k c"],
    key_before: Float[Array, "k c"],
    value_before: Float[Array, "k c"],
    positions: Int[Array, "1 c"],
) -> Float[Array, "k c"]:
    """Returns a head of a chunk, given the keys and values of its own chunk and of the chunk before it."""
    width, tokens = query.shape
    of_key, of_query = (jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
    own = of_key <= of_query  # the others are in the chunk before
    distance = of_query - of_key + jnp.where(own, 0, tokens)
    scores = jnp.where(own, _product(key, query, 0, 0), _product(key_before, query, 0, 0)) * width**-0.5
    scores = jnp.where(distance <= positions, scores, HIDDEN)
    exponentials = jnp.exp(scores - scores.max(axis=0, keepdims=True))
    total = exponentials.sum(axis=0, keepdims=True)
    weights, weights_before = jnp.where(own, exponentials, 0.0), jnp.where(own, 0.0, exponentials)
    attended = _product(value, weights.astype(value.dtype), 1, 0)
    attended = attended + _product(value_before, weights_before.astype(value.dtype), 1, 0)
    return (attended * (1.0 / total)).astype(value.dtype)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(query: Array, key: Array, value: Array, positions: Array) -> Array:
    """Returns the attention of a device's chunks and heads without a kernel."""
    key_before, value_before = (jnp.concatenate([x[:1], x[:-1]]) for x in (key, value))
    heads = jax.vmap(_tile, in_axes=(0, 0, 0, 0, 0, None))
    return jax.vmap(heads)(query, key, value, key_before, value_before, positions[:, None])


def forward_kernel(query: Array, key: Array, value: Array, positions: Array, interpret: bool = False) -> Array:
    """Returns the attention of a device's chunks and heads by the kernel. `interpret` runs it without a TPU."""
    chunks, heads, width, tokens = query.shape
    held = step_heads(query)
    block, grid = (1, held, width, tokens), (chunks, heads // held)
    own = pl.BlockSpec(block, lambda chunk, part: (chunk, part, 0, 0))
    before = pl.BlockSpec(block, lambda chunk, part: (jnp.maximum(chunk - 1, 0), part, 0, 0))
    of_positions = pl.BlockSpec((1, 1, tokens), lambda chunk, part: (chunk, 0, 0))
    scores = chunks * heads * (math.ceil(tokens / LANES) * LANES) ** 2  # in whole tiles
    return pl.pallas_call(
        _body,
        grid=grid,
        in_specs=[own, own, own, before, before, of_positions],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        cost_estimate=pl.CostEstimate(
            flops=8 * scores * width,  # keys and values of two chunks
            transcendentals=scores,
            bytes_accessed=6 * query.size * query.dtype.itemsize + 4 * positions.size,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),  # uses both cores of a chip
        interpret=interpret,
        name="packed_attention",
    )(query, key, value, key, value, positions[:, None])


def _body(query: Any, key: Any, value: Any, key_before: Any, value_before: Any, positions: Any, out: Any) -> None:
    heads = query.shape[1]
    together = _largest_divisor(heads, HEADS_TOGETHER)

    def iteration(index: Array, _: None) -> None:
        for i in range(together):
            head = index * together + i
            own = query[0, head], key[0, head], value[0, head]
            out[0, head] = _tile(*own, key_before[0, head], value_before[0, head], positions[0])

    jax.lax.fori_loop(0, heads // together, iteration, None)


def step_heads(query: Any) -> int:
    """Returns the heads of a grid step: the largest divisor of H whose blocks take at most STEP_BYTES."""
    _, heads, width, tokens = query.shape
    return _largest_divisor(heads, STEP_BYTES // (6 * width * tokens * query.dtype.itemsize))


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, number + 1) if number % n == 0 and (n <= most or n == 1))
