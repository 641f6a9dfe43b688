"""Counts the floating-point operations of the whole model on one image: see models.sizes for what counts."""

from ecdit.conditioning.text_to_image import SystemConfig
from ecdit.conditioning.text_tower import TextConfig
from ecdit.models.sizes import Part, denoiser_parts, total_flops


def text_part(config: TextConfig, length: int) -> Part:
    """The text tower on one caption of `length` tokens, padding included; causal attention counts as a full one."""
    layer = length * 12 * config.width**2 + 2 * length**2 * config.width
    return Part("text_tower", float(config.layers * length), 2.0 * config.layers * layer)


def forward_parts(system: SystemConfig, tokens: int, group: str) -> tuple[Part, ...]:
    """One image and its caption, forward; `tokens` and `group` as in `models.sizes.denoiser_parts`."""
    denoiser = denoiser_parts(system.model, system.text.width, system.caption_length, tokens, group)
    return (*denoiser, text_part(system.text, system.caption_length))


def training_flops(system: SystemConfig) -> float:
    """An image's share of a training step: forward, and twice that backward.

    What remat computes again is not the model's and does not count, so a rate of these is a model FLOP/s
    (arXiv 2204.02311, appendix B).
    """
    return 3 * total_flops(forward_parts(system, system.model.num_kept, system.model.group))
