"""Implements Inception-v3 (arXiv 1512.00567) in the version for FID: the network of 2015-12-05 with 1008 classes.

It differs from later versions in its pools: averages exclude the padding, and the last block's pool takes the maximum.
Modules have the names of torchvision's network. Axes: B batch, h w height and width, i inputs, o outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ecdit.pretrained.layers import Conv, Dtype, Linear, param
from ecdit.pretrained.layout import Layout

IMAGE_SIZE = 299  # pixels after resizing; FIDs with different resizing functions are not comparable
FEATURES, CLASSES = 2048, 1008
EPSILON = 1e-3  # added to variances in norms


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Selects the network's outputs and its dtype."""

    logits: bool  # whether to return the classes' logits too, for the Inception score
    dtype: Dtype


class Norm(nnx.Module):
    """Batch normalisation with the stored statistics, computed in float32."""

    def __init__(self, channels: int, rngs: nnx.Rngs, dtype: Dtype):
        self.scale, self.bias, self.running_mean, self.running_var = (
            param(rngs, (channels,), ("norm",), dtype) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B h w o"]) -> Float[Array, "B h w o"]:
        """Normalises each channel; returns the dtype of x."""
        scale, bias, mean, variance = (
            p[...].astype(jnp.float32)[None, None, None]
            for p in (self.scale, self.bias, self.running_mean, self.running_var)
        )
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)


class Layer(nnx.Module):
    """A convolution without a bias, then a norm and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        rngs: nnx.Rngs,
        dtype: Dtype,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        self.conv = Conv(inputs, outputs, kernel, rngs, dtype, stride=stride, padding=padding, bias=False)
        self.bn = Norm(outputs, rngs, dtype)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the layer's output."""
        return jax.nn.relu(self.bn(self.conv(x)))


def max_pool(x: Float[Array, "B h w i"], stride: int, padding: int = 0) -> Float[Array, "B y x i"]:
    """Returns the maximum of 3 x 3 pixels."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), sides)


def average_pool(x: Float[Array, "B h w i"]) -> Float[Array, "B h w i"]:
    """Returns the mean of 3 x 3 pixels, excluding those outside the image."""
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))

    def total(x: Array) -> Array:
        return jax.lax.reduce_window(x.astype(jnp.float32), 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), sides)

    return (total(x) / total(jnp.ones((1, *x.shape[1:3], 1)))).astype(x.dtype)


class BlockA(nnx.Module):
    """A block on 35 x 35 pixels: parallel 1x1, 5x5 and double 3x3 convolutions and a pool."""

    def __init__(self, inputs: int, pool_features: int, rngs: nnx.Rngs, dtype: Dtype):
        self.branch1x1 = Layer(inputs, 64, 1, rngs, dtype)
        self.branch5x5_1 = Layer(inputs, 48, 1, rngs, dtype)
        self.branch5x5_2 = Layer(48, 64, 5, rngs, dtype, padding=2)
        self.branch3x3dbl_1 = Layer(inputs, 64, 1, rngs, dtype)
        self.branch3x3dbl_2 = Layer(64, 96, 3, rngs, dtype, padding=1)
        self.branch3x3dbl_3 = Layer(96, 96, 3, rngs, dtype, padding=1)
        self.branch_pool = Layer(inputs, pool_features, 1, rngs, dtype)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        """Returns the branches' outputs, joined along the channels."""
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockB(nnx.Module):
    """A block from 35 x 35 to 17 x 17 pixels."""

    def __init__(self, inputs: int, rngs: nnx.Rngs, dtype: Dtype):
        self.branch3x3 = Layer(inputs, 384, 3, rngs, dtype, stride=2)
        self.branch3x3dbl_1 = Layer(inputs, 64, 1, rngs, dtype)
        self.branch3x3dbl_2 = Layer(64, 96, 3, rngs, dtype, padding=1)
        self.branch3x3dbl_3 = Layer(96, 96, 3, rngs, dtype, stride=2)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the branches' outputs, joined along the channels."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, max_pool(x, 2)], axis=-1)


class BlockC(nnx.Module):
    """A block on 17 x 17 pixels with 7x7 convolutions as pairs of 1x7 and 7x1."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs, dtype: Dtype):
        row: dict[str, Any]
        column: dict[str, Any]
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Layer(inputs, 192, 1, rngs, dtype)
        self.branch7x7_1 = Layer(inputs, width, 1, rngs, dtype)
        self.branch7x7_2 = Layer(width, width, rngs=rngs, dtype=dtype, **row)
        self.branch7x7_3 = Layer(width, 192, rngs=rngs, dtype=dtype, **column)
        self.branch7x7dbl_1 = Layer(inputs, width, 1, rngs, dtype)
        self.branch7x7dbl_2 = Layer(width, width, rngs=rngs, dtype=dtype, **column)
        self.branch7x7dbl_3 = Layer(width, width, rngs=rngs, dtype=dtype, **row)
        self.branch7x7dbl_4 = Layer(width, width, rngs=rngs, dtype=dtype, **column)
        self.branch7x7dbl_5 = Layer(width, 192, rngs=rngs, dtype=dtype, **row)
        self.branch_pool = Layer(inputs, 192, 1, rngs, dtype)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        """Returns the branches' outputs, joined along the channels."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockD(nnx.Module):
    """A block from 17 x 17 to 8 x 8 pixels."""

    def __init__(self, inputs: int, rngs: nnx.Rngs, dtype: Dtype):
        self.branch3x3_1 = Layer(inputs, 192, 1, rngs, dtype)
        self.branch3x3_2 = Layer(192, 320, 3, rngs, dtype, stride=2)
        self.branch7x7x3_1 = Layer(inputs, 192, 1, rngs, dtype)
        self.branch7x7x3_2 = Layer(192, 192, (1, 7), rngs, dtype, padding=(0, 3))
        self.branch7x7x3_3 = Layer(192, 192, (7, 1), rngs, dtype, padding=(3, 0))
        self.branch7x7x3_4 = Layer(192, 192, 3, rngs, dtype, stride=2)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B y x o"]:
        """Returns the branches' outputs, joined along the channels."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return jnp.concatenate([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), max_pool(x, 2)], -1)


class BlockE(nnx.Module):
    """A block on 8 x 8 pixels with 3x3 convolutions that end in a parallel 1x3 and 3x1."""

    def __init__(self, inputs: int, largest: bool, rngs: nnx.Rngs, dtype: Dtype):
        self.largest = largest  # whether the pool takes the maximum instead of the mean
        row: dict[str, Any]
        column: dict[str, Any]
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Layer(inputs, 320, 1, rngs, dtype)
        self.branch3x3_1 = Layer(inputs, 384, 1, rngs, dtype)
        self.branch3x3_2a = Layer(384, 384, rngs=rngs, dtype=dtype, **row)
        self.branch3x3_2b = Layer(384, 384, rngs=rngs, dtype=dtype, **column)
        self.branch3x3dbl_1 = Layer(inputs, 448, 1, rngs, dtype)
        self.branch3x3dbl_2 = Layer(448, 384, 3, rngs, dtype, padding=1)
        self.branch3x3dbl_3a = Layer(384, 384, rngs=rngs, dtype=dtype, **row)
        self.branch3x3dbl_3b = Layer(384, 384, rngs=rngs, dtype=dtype, **column)
        self.branch_pool = Layer(inputs, 192, 1, rngs, dtype)

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        """Returns the branches' outputs, joined along the channels."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, 1, padding=1) if self.largest else average_pool(x)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """Maps images to the features of FID and to logits."""

    Config = InceptionConfig

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs):
        dtype = config.dtype
        self.config = config
        self.Conv2d_1a_3x3 = Layer(3, 32, 3, rngs, dtype, stride=2)
        self.Conv2d_2a_3x3 = Layer(32, 32, 3, rngs, dtype)
        self.Conv2d_2b_3x3 = Layer(32, 64, 3, rngs, dtype, padding=1)
        self.Conv2d_3b_1x1 = Layer(64, 80, 1, rngs, dtype)
        self.Conv2d_4a_3x3 = Layer(80, 192, 3, rngs, dtype)
        self.Mixed_5b = BlockA(192, 32, rngs, dtype)
        self.Mixed_5c = BlockA(256, 64, rngs, dtype)
        self.Mixed_5d = BlockA(288, 64, rngs, dtype)
        self.Mixed_6a = BlockB(288, rngs, dtype)
        self.Mixed_6b = BlockC(768, 128, rngs, dtype)
        self.Mixed_6c = BlockC(768, 160, rngs, dtype)
        self.Mixed_6d = BlockC(768, 160, rngs, dtype)
        self.Mixed_6e = BlockC(768, 192, rngs, dtype)
        self.Mixed_7a = BlockD(768, rngs, dtype)
        self.Mixed_7b = BlockE(1280, False, rngs, dtype)
        self.Mixed_7c = BlockE(2048, True, rngs, dtype)
        self.fc = Linear(FEATURES, CLASSES, ("features", "features"), rngs, dtype) if config.logits else None

    @jax.named_scope("inception")
    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"] | None]:
        """Returns features (pool3), float32, and logits including biases, or None.

        Args:
          images: values in about [-1, 1], resized to IMAGE_SIZE; at least 75 pixels a side.
        """
        x = images.astype(self.config.dtype)
        x = max_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 2)
        x = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.astype(jnp.float32).mean(axis=(1, 2))
        logits = self.fc(features.astype(self.config.dtype)).astype(jnp.float32) if self.fc is not None else None
        return features, logits


INCEPTION_LAYOUT = Layout(names=(), renamed=(), unused=(r"\.num_batches_tracked$", r"^AuxLogits\.", r"^fc\."))
