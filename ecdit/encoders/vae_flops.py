"""Counts the parameters and operations of AutoencoderKL, such as Stable Diffusion's: see `models.flops`."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class VaeSizes:
    """The sizes of an AutoencoderKL."""

    widths: tuple[int, ...]  # of the levels, from the full resolution down; each but the last halves it
    resnets: int  # a level, of the encoder; the decoder has one more
    latent_channels: int
    quant_convs: bool  # a 1x1 convolution after the encoder and one before the decoder

    @property
    def shrink(self) -> int:
        """Returns the number of pixels along a side for each latent pixel."""
        return 2 ** (len(self.widths) - 1)


# Stable Diffusion's (arXiv 2112.10752), by the config that is published with its weights.
STABLE_DIFFUSION = VaeSizes(widths=(128, 256, 512, 512), resnets=2, latent_channels=4, quant_convs=True)


def _resnet(inputs: int, outputs: int, shrink: int) -> Iterator[_Conv]:
    yield _Conv(3, inputs, outputs, shrink, norm=True)
    yield _Conv(3, outputs, outputs, shrink, norm=True)
    if inputs != outputs:
        yield _Conv(1, inputs, outputs, shrink)


def _middle(width: int, shrink: int) -> Iterator[_Conv]:
    yield from _resnet(width, width, shrink)
    yield _Conv(1, width, 3 * width, shrink, norm=True)  # queries, keys and values of the attention
    yield _Conv(1, width, width, shrink)
    yield from _resnet(width, width, shrink)


def _encoder(sizes: VaeSizes) -> Iterator[_Conv]:
    yield _Conv(3, 3, sizes.widths[0], 1)
    inputs = sizes.widths[0]
    for level, width in enumerate(sizes.widths):
        for _ in range(sizes.resnets):
            yield from _resnet(inputs, width, 2**level)
            inputs = width
        if level < len(sizes.widths) - 1:
            yield _Conv(3, width, width, 2 ** (level + 1))
    yield from _middle(inputs, sizes.shrink)
    channels = 2 * sizes.latent_channels
    yield _Conv(3, inputs, channels, sizes.shrink, norm=True)
    if sizes.quant_convs:
        yield _Conv(1, channels, channels, sizes.shrink)


def _decoder(sizes: VaeSizes) -> Iterator[_Conv]:
    if sizes.quant_convs:
        yield _Conv(1, sizes.latent_channels, sizes.latent_channels, sizes.shrink)
    yield _Conv(3, sizes.latent_channels, sizes.widths[-1], sizes.shrink)
    yield from _middle(sizes.widths[-1], sizes.shrink)
    inputs = sizes.widths[-1]
    for level, width in reversed(list(enumerate(sizes.widths))):
        for _ in range(sizes.resnets + 1):
            yield from _resnet(inputs, width, 2**level)
            inputs = width
        if level > 0:
            yield _Conv(3, width, width, 2 ** (level - 1))
    yield _Conv(3, inputs, 3, 1, norm=True)


def vae_params(sizes: VaeSizes) -> int:
    """Returns the parameters of encoder and decoder."""
    return sum(conv.params for conv in itertools.chain(_encoder(sizes), _decoder(sizes)))


VAE_PARAMS = vae_params(STABLE_DIFFUSION)


def vae_part(image_size: int, sizes: VaeSizes = STABLE_DIFFUSION) -> PartFlops:
    """Returns the work of the encoder on one image; its tokens are the latent's pixels."""
    pixels = (image_size // sizes.shrink) ** 2
    attention = 4.0 * pixels**2 * sizes.widths[-1]
    return PartFlops("vae", float(pixels), sum(conv.flops(image_size) for conv in _encoder(sizes)) + attention)
