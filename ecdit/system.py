"""The whole model: text tower, codec and denoiser, and its parameters as a nested dict."""

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from ecdit.config import require
from ecdit.encoders.autoencoder import CODECS
from ecdit.encoders.flops import text_part
from ecdit.encoders.text_tower import TextConfig, TextTower
from ecdit.models.config import DiTConfig
from ecdit.models.dit import DiT
from ecdit.models.flops import Part, denoiser_parts, total_flops
from ecdit.partitioning import param_shardings

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """What a text-to-image model is made of."""

    model: DiTConfig
    text: TextConfig
    codec: Literal["identity", "latents"]
    caption_length: int  # L, tokens

    def __post_init__(self):
        channels = CODECS[self.codec].channels
        require(
            channels in (None, self.model.latent_channels),
            "model.latent_channels",
            self.model.latent_channels,
            f"the {self.codec} codec has {channels}",
        )

    @property
    def image_size(self) -> int:
        """Side of a picture, pixels."""
        return self.model.latent_size * CODECS[self.codec].downsampling

    @property
    def has_pictures(self) -> bool:
        """Whether latents can be made of pictures and pictures of latents."""
        return CODECS[self.codec].has_pictures


class TextToImage(nnx.Module):
    """Text tower, codec and denoiser."""

    def __init__(self, config: SystemConfig, rngs: nnx.Rngs):
        self.text = TextTower(config.text, config.caption_length, rngs)
        self.codec = CODECS[config.codec]()
        self.denoiser = DiT(config.model, config.text.width, rngs)


@dataclasses.dataclass(frozen=True)
class System:
    """A model's structure without its parameters: `bind` joins them."""

    config: SystemConfig
    graphdef: nnx.GraphDef
    abstract: nnx.State  # Params of ShapeDtypeStructs, with their logical axes

    def init(self, key: jax.Array) -> Params:
        """Draws the parameters, float32; call it inside jit with out_shardings, so that they are created sharded."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(TextToImage(self.config, nnx.Rngs(key)), nnx.Param))

    def shapes(self) -> Params:
        """Shapes and dtypes of what `init` draws; touches no device."""
        return nnx.to_pure_dict(self.abstract)

    def split(self, params: Params) -> tuple[Params, Params]:
        """What is trained of a dict like `init`'s, and what is frozen; `{**trained, **frozen}` is the whole again."""
        frozen = {"text"} if self.config.text.frozen else set()
        return (
            {name: part for name, part in params.items() if name not in frozen},
            {name: part for name, part in params.items() if name in frozen},
        )

    def bind(self, params: Params) -> TextToImage:
        """The model with these parameters, all of them."""
        return nnx.merge(self.graphdef, nnx.State(params))

    def shardings(self, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
        """Where each parameter lives; see `partitioning.param_shardings` for what it refuses."""
        return param_shardings(self.abstract, mesh)


def make_system(config: SystemConfig) -> System:
    """The structure of the model that `config` describes; allocates nothing."""
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: TextToImage(config, nnx.Rngs(0))), nnx.Param)
    return System(config, graphdef, abstract)


def forward_parts(system: SystemConfig, tokens: int, group: str) -> tuple[Part, ...]:
    """One image and its caption, forward; `tokens` and `group` as in `models.sizes.denoiser_parts`."""
    denoiser = denoiser_parts(system.model, system.text.width, system.caption_length, tokens, group)
    return (*denoiser, text_part(system.text, system.caption_length))


def training_flops(system: SystemConfig) -> float:
    """An image's share of a training step: forward, and twice that backward, but for a text tower that is frozen.

    What remat computes again is not the model's and does not count, so a rate of these is a model FLOP/s
    (arXiv 2204.02311, appendix B).
    """
    parts = forward_parts(system, system.model.num_kept, system.model.group)
    untrained = text_part(system.text, system.caption_length).flops if system.text.frozen else 0.0
    return 3 * total_flops(parts) - 2 * untrained
