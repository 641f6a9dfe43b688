"""Layers of networks with published weights.

These networks are never trained, so their parameters have the dtype of their activations, and their initial values do
not matter. Parameters have the names of the files, except that matrices are `kernel` [in, out] or, for convolutions,
[height, width, in, out], and norms have a `scale`.

Axes: B batch, L tokens, M tokens attended to, H heads, k head width, h w an image's height and width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ecdit.functions import exact_gelu

Dtype = Literal["float32", "bfloat16"]  # dtype of parameters and activations


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], dtype: Dtype) -> nnx.Param:
    """Returns a new parameter whose dimensions have the logical `axes` (see partitioning.AXIS_RULES)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), tuple(shape), dtype), out_sharding=tuple(axes))


class Linear(nnx.Module):
    """Computes x @ kernel + bias."""

    def __init__(
        self, inputs: int, outputs: int, axes: tuple[str, str], rngs: nnx.Rngs, dtype: Dtype, bias: bool = True
    ):
        self.kernel = param(rngs, (inputs, outputs), axes, dtype)
        self.bias = param(rngs, (outputs,), axes[1:], dtype) if bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Returns the output, mapped along the last axis."""
        y = x @ self.kernel[...]
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, computed in float32."""

    def __init__(self, width: int, epsilon: float, rngs: nnx.Rngs, dtype: Dtype):
        self.epsilon = epsilon
        self.scale = param(rngs, (width,), ("norm",), dtype)
        self.bias = param(rngs, (width,), ("norm",), dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis; returns the dtype of x."""
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.broadcast_to(p[...].astype(jnp.float32), y.shape) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


class RmsNorm(nnx.Module):
    """RMSNorm with a scale and a float32 variance."""

    def __init__(self, width: int, epsilon: float, rngs: nnx.Rngs, dtype: Dtype):
        self.epsilon = epsilon
        self.scale = param(rngs, (width,), ("norm",), dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis; returns the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * jnp.broadcast_to(self.scale[...], x.shape)


class GroupNorm(nnx.Module):
    """GroupNorm over pixels and a group of channels, computed in float32."""

    def __init__(self, channels: int, groups: int, epsilon: float, rngs: nnx.Rngs, dtype: Dtype):
        self.groups, self.epsilon = groups, epsilon
        self.scale = param(rngs, (channels,), ("norm",), dtype)
        self.bias = param(rngs, (channels,), ("norm",), dtype)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Normalises each image; returns the dtype of x."""
        batch, height, width, channels = x.shape
        y = x.astype(jnp.float32).reshape(batch, height * width, self.groups, channels // self.groups)
        y = y - y.mean(axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=(1, 3), keepdims=True) + self.epsilon)
        scale, bias = (p[...].astype(jnp.float32)[None, None, None] for p in (self.scale, self.bias))
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


class Conv(nnx.Module):
    """A convolution of images. Every device holds its whole kernel, because these networks are small."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        rngs: nnx.Rngs,
        dtype: Dtype,
        stride: int = 1,
        padding: int | tuple[int, int] | Sequence[tuple[int, int]] = 0,
        bias: bool = True,
    ):
        """Makes the parameters. `padding` is one number, (height, width), or (before, after) for each of the two."""
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        sides = (padding, padding) if isinstance(padding, int) else padding
        self.stride = stride
        self.padding = [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides]
        self.kernel = param(rngs, (height, width, inputs, outputs), ("features",) * 4, dtype)
        self.bias = param(rngs, (outputs,), ("features",), dtype) if bias else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the convolution of x."""
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if self.bias is None else y + self.bias[...][None, None, None]


def attention(
    query: Float[Array, "B L H k"],
    key: Float[Array, "B M H k"],
    value: Float[Array, "B M H k"],
    bias: Float[Array, "#B #H #L M"] | None,
    scale: float,
) -> Float[Array, "B L H*k"]:
    """Returns softmax(scale query key + bias) value with joined heads. Scores and softmax are float32."""
    scores = scale * jnp.einsum("blhk,bmhk->bhlm", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bhlm,bmhk->blhk", weights, value)
    return attended.reshape(*attended.shape[:2], -1)


def quick_gelu(x: Array) -> Array:
    """Returns x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def tanh_gelu(x: Array) -> Array:
    """Returns GELU by its tanh approximation, which T5's configs call gelu_new."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Any] = {"quick_gelu": quick_gelu, "gelu": exact_gelu}
