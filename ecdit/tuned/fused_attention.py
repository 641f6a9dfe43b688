"""Computes normed and rotated attention in one Pallas kernel, which keeps scores out of the chip's main memory.

A step of the kernel's grid computes some heads of an image. `_tile`, the function of one key-value head and its
queries, is plain JAX. The backward kernel recomputes and differentiates it in place, and on other platforms than TPUs
it is mapped over images and heads. (One program is for TPUs or for others, because JAX cannot lower a kernel for both.)

Axes: B batch, H heads, K key-value heads, G = H / K, k head width, pairs k / 2, N tokens, M tokens attended
to, C chunks of heads.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ecdit.functions import NORM_EPSILON
from ecdit.partitioning import AXIS_RULES

# VMEM budget (16 MB on v4): double-buffered blocks of a grid step, plus about five score arrays of an iteration.
CHUNK_BYTES = 4 * 2**20
SCORE_BYTES = 2 * 2**20
HEADS_TOGETHER = 8  # query heads per iteration; the compiler interleaves their work
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # added to masked scores; the sum is still finite

Inputs = tuple[Array, Array, Array, tuple[Array, Array], tuple[Array, Array] | None, Array | None]


def fused_attention(
    query: Float[Array, "B H k N"],
    key: Float[Array, "B K k M"],
    value: Float[Array, "B K k M"],
    norms: tuple[Float[Array, " k"], Float[Array, " k"]],
    angles: Float[Array, "B N pairs"] | None = None,
    mask: Bool[Array, "B 1 M"] | None = None,
) -> Float[Array, "B H k N"]:
    """Computes `attention.normed_attention`, with queries and keys rounded to their dtype after norm and rotation.

    Angles get no gradient. Every image needs a token that its mask does not hide.
    """
    turn = None if angles is None else tuple(function(angles.swapaxes(1, 2)) for function in (jnp.cos, jnp.sin))
    bias = None if mask is None else jnp.where(mask, 0.0, HIDDEN)
    scales = tuple(norm.astype(jnp.float32)[:, None] for norm in norms)
    return _attend(query, key, value, scales, turn, bias)


@jax.custom_vjp
def _attend(*inputs: Any) -> Array:
    return _on_shards(functools.partial(jax.lax.platform_dependent, tpu=forward_kernel, default=_forward), 1)(*inputs)


def _attend_saving(*inputs: Any) -> tuple[Array, Inputs]:
    return _attend(*inputs), inputs


def _attend_gradient(inputs: Inputs, gradient: Array) -> tuple[Any, ...]:
    backward = functools.partial(jax.lax.platform_dependent, tpu=backward_kernel, default=_backward)
    *heads, query_scale, key_scale = _on_shards(backward, 5)(*inputs, gradient)
    return *heads, (query_scale.sum(axis=(0, 1)), key_scale.sum(axis=(0, 1))), None, None


_attend.defvjp(_attend_saving, _attend_gradient)


def _on_shards(function: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """Maps `function` over each device's images and heads; every output is sharded like them."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    heads = PartitionSpec(AXIS_RULES["batch"], AXIS_RULES["heads"])
    images, whole = PartitionSpec(AXIS_RULES["batch"]), PartitionSpec()
    inputs = (heads, heads, heads, whole, images, images, heads)

    def split(*arrays: Any) -> Any:
        specs = {"in_specs": inputs[: len(arrays)], "out_specs": (heads,) * outputs if outputs > 1 else heads}
        # JAX cannot infer over which mesh axes a kernel's results vary.
        return jax.shard_map(function, **specs, check_vma=False)(*arrays)

    return split


def _tile(
    query: Float[Array, "G k N"],
    key: Float[Array, "k M"],
    value: Float[Array, "k M"],
    scales: tuple[Float[Array, "k 1"], Float[Array, "k 1"]],
    turn: tuple[Float[Array, "pairs N"], Float[Array, "pairs N"]] | None,
    bias: Float[Array, "1 M"] | None,
) -> Float[Array, "G k N"]:
    """Returns the heads of one key-value head by two-dimensional matrix products, which a TPU kernel supports."""
    key = _prepared(key, scales[1], turn)
    heads = []
    for group in range(query.shape[0]):
        turned = _prepared(query[group], scales[0], turn)
        scores = _product(turned, key, 0, 0) * turned.shape[0] ** -0.5
        scores = scores if bias is None else scores + bias
        exponentials = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=1, keepdims=True)))
        weights = exponentials / exponentials.sum(axis=1, keepdims=True)
        heads.append(_product(value, weights.astype(value.dtype), 1, 1).astype(value.dtype))
    return jnp.stack(heads)


def _prepared(x: Array, scale: Array, turn: tuple[Array, Array] | None) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=0, keepdims=True) + NORM_EPSILON) * scale
    if turn is not None:
        half = y.shape[0] // 2
        (first, second), (cos, sin) = (y[:half], y[half:]), turn
        y = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=0)
    return y.astype(x.dtype)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


# Without a kernel


def _forward(query: Array, key: Array, value: Array, *rest: Any) -> Array:
    grouped = query.reshape(*key.shape[:2], -1, *query.shape[2:])
    heads = jax.vmap(_tile, in_axes=(0, 0, 0, None, None, None))
    return jax.vmap(heads, in_axes=(0, 0, 0, None, 0, 0))(grouped, key, value, *rest).reshape(query.shape)


def _backward(
    query: Array, key: Array, value: Array, scales: Any, turn: Any, bias: Any, gradient: Array
) -> tuple[Array, ...]:
    images, chunks = query.shape[0], key.shape[1] // chunk_heads(query, key)

    def forward(query: Array, key: Array, value: Array, scales: Any) -> Array:
        return _forward(query, key, value, scales, turn, bias)

    *heads, norms = jax.vjp(forward, query, key, value, scales)[1](gradient)
    # The kernel returns a part of the sum for each image and chunk; these are equal parts.
    parts = (jnp.broadcast_to(norm / (images * chunks), (images, chunks, *norm.shape)) for norm in norms)
    return *heads, *parts


# With a kernel


def forward_kernel(*inputs: Any, interpret: bool = False) -> Array:
    """Returns the attention of a device's images and heads. The inputs are those of `_tile` with these two axes.

    `interpret` runs it without a TPU.
    """
    return _call(_forward_body, inputs, inputs[:1], 2, interpret)[0]


def backward_kernel(*inputs: Any, interpret: bool = False) -> tuple[Array, ...]:
    """Returns the gradients of query, key and value, and of the norms' scales for each chunk of heads: [B, C, k, 1].

    The last input is the gradient of the output.
    """
    query, key = inputs[:2]
    chunks = key.shape[1] // chunk_heads(query, key)
    norm = jax.ShapeDtypeStruct((query.shape[0], chunks, query.shape[2], 1), jnp.float32)
    return tuple(_call(_backward_body, inputs, (*inputs[:3], norm, norm), 5, interpret))


def _forward_body(query: Any, key: Any, value: Any, scales: Any, turn: Any, bias: Any, out: Any) -> None:
    group, rest = query.shape[1] // key.shape[1], _read(scales, turn, bias)

    @_each(query, key)
    def head(index: Array) -> None:
        queries = pl.ds(index * group, group)
        out[0, queries] = _tile(query[0, queries], key[0, index], value[0, index], *rest)


def _backward_body(
    query: Any, key: Any, value: Any, scales: Any, turn: Any, bias: Any, gradient: Any, *outputs: Any
) -> None:
    group, (scales, turn, bias) = query.shape[1] // key.shape[1], _read(scales, turn, bias)
    of_query, of_key, of_value, *of_scales = outputs
    for norm in of_scales:
        norm[...] = jnp.zeros_like(norm)

    @_each(query, key)
    def head(index: Array) -> None:
        queries = pl.ds(index * group, group)
        forward = functools.partial(_tile, turn=turn, bias=bias)
        _, gradients = jax.vjp(forward, query[0, queries], key[0, index], value[0, index], scales)
        of_query[0, queries], of_key[0, index], of_value[0, index], norms = gradients(gradient[0, queries])
        for norm, part in zip(of_scales, norms, strict=True):
            norm[0, 0] += part


def heads_together(query: Any, key: Any) -> int:
    """Returns the key-value heads per loop iteration; several of them hide latency."""
    (kv_heads, tokens), group = (key.shape[1], key.shape[3]), query.shape[1] // key.shape[1]
    most = min(HEADS_TOGETHER, SCORE_BYTES // score_bytes(1, query.shape[3], tokens))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * group <= max(group, most))


def score_bytes(heads: int, tokens: int, attended: int) -> int:
    """Returns the bytes of the float32 scores of `heads` heads."""
    return 4 * heads * tokens * attended


def _each(query: Any, key: Any) -> Callable[[Callable[[Array], None]], None]:
    """Runs the decorated function for each key-value head of a grid step."""
    together = heads_together(query, key)

    def run(function: Callable[[Array], None]) -> None:
        def iteration(index: Array, _: None) -> None:
            for head in range(together):
                function(index * together + head)

        jax.lax.fori_loop(0, key.shape[1] // together, iteration, None)

    return run


def _read(scales: Any, turn: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Returns the scales and an image's rotation and bias, read from a grid step's references."""
    return jax.tree.map(lambda x: x[...], scales), *jax.tree.map(lambda x: x[0], (turn, bias))


def _call(body: Callable[..., None], inputs: Any, outputs: Any, products: int, interpret: bool) -> Sequence[Array]:
    """Runs the kernel on a grid of images and chunks of heads; `products` is the number of matrix products per head."""
    query, key = inputs[:2]
    images, chunks = query.shape[0], key.shape[1] // chunk_heads(query, key)

    def part(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """Returns a grid step's block: its image and heads, only its image if x has no heads, or all scales."""
        if x.ndim == 4:
            return pl.BlockSpec((1, x.shape[1] // chunks, *x.shape[2:]), lambda image, chunk: (image, chunk, 0, 0))
        if x.ndim == 3:
            return pl.BlockSpec((1, *x.shape[1:]), lambda image, chunk: (image, 0, 0))
        return pl.BlockSpec(x.shape, lambda image, chunk: (0, 0))

    scores = math.prod(query.shape[:2]) * query.shape[3] * key.shape[3]
    everything = jax.tree.leaves((inputs, outputs))
    return pl.pallas_call(
        body,
        grid=(images, chunks),
        in_specs=jax.tree.map(part, inputs),
        out_specs=[part(output) for output in outputs],
        out_shape=[jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * query.shape[2],
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in everything),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),  # uses both cores of a chip
        interpret=interpret,
        name=body.__name__.strip("_").replace("body", "attention"),
    )(*inputs)


def chunk_heads(query: Array, key: Array) -> int:
    """Returns the key-value heads of a grid step: the largest divisor whose arrays take at most CHUNK_BYTES."""
    kv_heads, width, tokens = key.shape[1:]
    per_head = (3 * query.shape[1] // kv_heads * query.shape[3] + 4 * tokens) * width * query.dtype.itemsize
    fitting = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * per_head <= CHUNK_BYTES)
    return max(fitting, default=1)
