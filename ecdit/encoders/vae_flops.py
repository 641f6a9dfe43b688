"""Counts the parameters and operations of Stable Diffusion's autoencoder: see `models.flops` for what counts."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ecdit.components import PartFlops


class _Conv(NamedTuple):
    """A convolution with a bias, or a linear map of pixels (kernel 1), with the norm before it if it has one."""

    kernel: int
    inputs: int
    outputs: int
    shrink: int  # side of the image / side of its output
    norm: bool = False

    @property
    def params(self) -> int:
        return self.kernel**2 * self.inputs * self.outputs + self.outputs + 2 * self.inputs * self.norm

    def flops(self, side: int) -> float:
        return 2.0 * self.kernel**2 * self.inputs * self.outputs * (side // self.shrink) ** 2


# Stable Diffusion's autoencoder (arXiv 2112.10752), by the config that is published with its weights.
_VAE_WIDTHS, _VAE_LATENTS, _VAE_SHRINK = (128, 256, 512, 512), 4, 8


def _resnet(inputs: int, outputs: int, shrink: int) -> Iterator[_Conv]:
    yield _Conv(3, inputs, outputs, shrink, norm=True)
    yield _Conv(3, outputs, outputs, shrink, norm=True)
    if inputs != outputs:
        yield _Conv(1, inputs, outputs, shrink)


def _middle(width: int) -> Iterator[_Conv]:
    yield from _resnet(width, width, _VAE_SHRINK)
    yield _Conv(1, width, 3 * width, _VAE_SHRINK, norm=True)  # queries, keys and values of the attention
    yield _Conv(1, width, width, _VAE_SHRINK)
    yield from _resnet(width, width, _VAE_SHRINK)


def _encoder() -> Iterator[_Conv]:
    yield _Conv(3, 3, _VAE_WIDTHS[0], 1)
    inputs = _VAE_WIDTHS[0]
    for level, width in enumerate(_VAE_WIDTHS):
        yield from _resnet(inputs, width, 2**level)
        yield from _resnet(width, width, 2**level)
        if level < 3:
            yield _Conv(3, width, width, 2 ** (level + 1))
        inputs = width
    yield from _middle(inputs)
    yield _Conv(3, inputs, 2 * _VAE_LATENTS, _VAE_SHRINK, norm=True)
    yield _Conv(1, 2 * _VAE_LATENTS, 2 * _VAE_LATENTS, _VAE_SHRINK)


def _decoder() -> Iterator[_Conv]:
    yield _Conv(1, _VAE_LATENTS, _VAE_LATENTS, _VAE_SHRINK)
    yield _Conv(3, _VAE_LATENTS, _VAE_WIDTHS[-1], _VAE_SHRINK)
    yield from _middle(_VAE_WIDTHS[-1])
    inputs = _VAE_WIDTHS[-1]
    for level, width in reversed(list(enumerate(_VAE_WIDTHS))):
        yield from _resnet(inputs, width, 2**level)
        yield from _resnet(width, width, 2**level)
        yield from _resnet(width, width, 2**level)
        if level > 0:
            yield _Conv(3, width, width, 2 ** (level - 1))
        inputs = width
    yield _Conv(3, inputs, 3, 1, norm=True)


VAE_PARAMS = sum(conv.params for conv in itertools.chain(_encoder(), _decoder()))


def vae_part(image_size: int) -> PartFlops:
    """Returns the work of Stable Diffusion's encoder on one image; its tokens are the latent's pixels."""
    pixels = (image_size // _VAE_SHRINK) ** 2
    attention = 4.0 * pixels**2 * _VAE_WIDTHS[-1]
    return PartFlops("vae", float(pixels), sum(conv.flops(image_size) for conv in _encoder()) + attention)
