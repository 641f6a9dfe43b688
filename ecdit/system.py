"""The whole model: text encoder, autoencoder and denoiser, its parameters as a nested dict, and its FLOPs."""

import dataclasses
import functools
import hashlib
import sys
import types
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from ecdit.components import Autoencoder, Denoiser, DenoiserConfig, Mode, PartFlops, TextEncoder, total_flops
from ecdit.config import require
from ecdit.encoders.autoencoder import AUTOENCODERS, StoredLatents, VaeConfig
from ecdit.encoders.text_tower import TextConfig
from ecdit.models.dit import DiT
from ecdit.partitioning import param_shardings
from ecdit.pretrained.agreement import fingerprint_once, load_agreed, share_fingerprints
from ecdit.pretrained.autoencoder_kl import (
    AUTOENCODER_LAYOUT,
    AutoencoderConfig,
    AutoencoderKL,
    PreparedLatents,
    read_autoencoder,
)
from ecdit.pretrained.config_json import CONFIG
from ecdit.pretrained.text_encoders import load_text, make_text_encoder

Params = dict[str, Any]

PAPERS = "ec_dit"  # the name of the paper's denoiser, as configs write it


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Selects the parts of a text-to-image model, with their configs."""

    denoiser: str  # "ec_dit", or a user's own as FILE.py:Class: see `denoiser_class`
    model: DenoiserConfig  # the denoiser's own
    text: TextConfig
    autoencoder: Literal["identity", "latents", "vae"]
    vae: VaeConfig  # of autoencoder "vae"
    caption_length: int  # tokens of a caption, by each text encoder

    def __post_init__(self):
        size, public, model = self.image_size, self.public_autoencoder, self.model
        channels = public.latent_channels if public else self.make_autoencoder().latent_shape(size)[2]
        allowed = f"the {self.autoencoder} autoencoder has {channels}"
        require(channels == model.latent_channels, "model.latent_channels", model.latent_channels, allowed)
        if public and self.reads_latents:
            prepared, found = StoredLatents.downsampling, size // model.latent_size
            allowed = f"must be online: {self.vae.weights} shrinks images by {found}, prepared latents by {prepared}"
            require(found == prepared, "vae.encode", self.vae.encode, allowed)

    def make_autoencoder(self, rngs: nnx.Rngs | None = None) -> Autoencoder:
        """Returns the autoencoder; a public one needs `rngs`, and has its weights after `System.load`."""
        if self.public_autoencoder is None:
            return AUTOENCODERS[self.autoencoder](self.model.latent_channels)
        assert rngs is not None
        kind = PreparedLatents if self.reads_latents else AutoencoderKL
        return kind(self.public_autoencoder, rngs)

    @functools.cached_property
    def public_autoencoder(self) -> AutoencoderConfig | None:
        """Returns the config of a public autoencoder, from its folder; None for other autoencoders.

        Raises:
          ConfigError: the folder is not there.
          WeightsError: it cannot be read, or is another architecture's.
        """
        return _read_vae(self.vae) if self.autoencoder == "vae" else None

    @property
    def image_size(self) -> int:
        """Returns the side of an image in pixels."""
        public = self.public_autoencoder
        return self.model.latent_size * (public.downsampling if public else AUTOENCODERS[self.autoencoder].downsampling)

    @property
    def folders(self) -> dict[str, tuple[Path, ...]]:
        """Returns the folders of public weights, by the part of the model that takes them."""
        text = {"text": self.text.folders} if self.text.public else {}
        return text | ({"autoencoder": (Path(self.vae.weights),)} if self.autoencoder == "vae" else {})

    def fingerprints(self) -> dict[str, str]:
        """Returns the sha256 of the public weights, by the part of the model that has them.

        Reads all of them once, unless the first process has told it (`share_fingerprints`).

        Raises:
          WeightsError: a folder cannot be read.
        """
        return {name: "-".join(map(fingerprint_once, folders)) for name, folders in self.folders.items()}

    def share_fingerprints(self) -> None:
        """Lets only the first process read all of the public weights: see `agreement`. Collective.

        Raises:
          WeightsError: a folder cannot be read, or differs between processes.
        """
        share_fingerprints([folder for folders in self.folders.values() for folder in folders])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Returns the height, width and channels of an image's latents."""
        return self.model.latent_size, self.model.latent_size, self.model.latent_channels

    @property
    def text_length(self) -> int:
        """Returns the number of a caption's tokens and states, L: those of two encoders follow each other."""
        return self.caption_length * max(len(self.text.folders), 1)

    @property
    def predicts_data(self) -> bool:
        """Returns whether the network predicts the data; the config of a user's denoiser may not have the field."""
        return getattr(self.model, "prediction", "velocity") == "data"

    @property
    def has_images(self) -> bool:
        """Returns True if latents can be decoded to images."""
        return self.autoencoder != "latents"

    @property
    def reads_latents(self) -> bool:
        """Returns True if the data holds means and log variances of latents in place of images."""
        return self.autoencoder == "latents" or (self.autoencoder == "vae" and self.vae.encode == "prepared")


@functools.cache  # experiments are made anew while a run goes on, which must not need the folder then
def _read_vae(vae: VaeConfig) -> AutoencoderConfig:
    path = Path(vae.weights) / CONFIG
    named = bool(vae.weights) and path.is_file()
    require(named, "vae.weights", vae.weights, f"there is no {path}: must be a folder of an AutoencoderKL")
    return read_autoencoder(Path(vae.weights), vae.posterior, vae.dtype)


def denoiser_class(name: str) -> type[Denoiser]:
    """Returns the class of a denoiser: of "ec_dit" the paper's, of "FILE.py:Class" that of a user's file.

    Raises:
      ConfigError: no such file or class, or a class without a `Config` dataclass.
    """
    return DiT if name == PAPERS else _users_class(name)[0]


def user_files(denoiser: str) -> dict[str, str]:
    """Returns the sha256 of the user's file that a denoiser is from, by its path; nothing for the paper's.

    It is that of the code which this process runs, whatever has become of the file since.
    """
    return {} if denoiser == PAPERS else {denoiser.rpartition(":")[0]: _users_class(denoiser)[1]}


@functools.cache
def _users_class(name: str) -> tuple[type[Denoiser], str]:
    """Runs the user's file; returns the class and the sha256 of the file."""
    path, colon, attribute = name.rpartition(":")
    fits = bool(colon) and path.endswith(".py") and attribute.isidentifier()
    require(fits, "denoiser", name, f'must be "{PAPERS}" or FILE.py:Class')
    require(Path(path).is_file(), "denoiser", name, f"there is no file {path}")
    source = Path(path).read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = types.ModuleType(f"ecdit_user_{digest[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look up their annotations there
    exec(compile(source, path, "exec"), module.__dict__)
    found: Any = getattr(module, attribute, None)
    require(isinstance(found, type), "denoiser", name, f"{path} has no class {attribute}")
    config = getattr(found, "Config", None)
    require(dataclasses.is_dataclass(config), "denoiser", name, f"{attribute} needs a dataclass as its `Config`")
    return found, digest


class TextToImage(nnx.Module):
    """Text encoder, autoencoder and denoiser."""

    text: TextEncoder
    autoencoder: Autoencoder
    denoiser: Denoiser

    def __init__(self, config: SystemConfig, rngs: nnx.Rngs):
        self.text = make_text_encoder(config.text, config.caption_length, rngs)
        self.autoencoder = config.make_autoencoder(rngs)
        self.denoiser = denoiser_class(config.denoiser)(config.model, self.text.widths, rngs)


@dataclasses.dataclass(frozen=True)
class System:
    """A model's structure without its parameters: `bind` joins them."""

    config: SystemConfig
    graphdef: nnx.GraphDef
    abstract: nnx.State  # Params of ShapeDtypeStructs, with their logical axes

    @functools.cached_property
    def parts(self) -> TextToImage:
        """Returns the model with shapes for parameters, for the methods of components that need none."""
        return nnx.merge(self.graphdef, self.abstract)

    def init(self, key: jax.Array) -> Params:
        """Draws the parameters, float32, but for those that `load` reads.

        Call it inside jit with out_shardings, so that they are created sharded.
        """
        with nnx.use_eager_sharding(False):
            return self.drawn(nnx.to_pure_dict(nnx.state(TextToImage(self.config, nnx.Rngs(key)), nnx.Param)))

    def load(self, mesh: Mesh) -> Params:
        """Reads the parameters of parts whose weights are those of a folder, laid out on the mesh.

        Raises:
          WeightsError: the files are not the network's.
        """
        loaded = {}
        if self.config.text.public:
            loaded["text"] = load_text(self.config.text, self.abstract["text"], mesh)
        if self.config.public_autoencoder is not None:
            folder, abstract = Path(self.config.vae.weights), self.abstract["autoencoder"]
            loaded["autoencoder"] = load_agreed(abstract, AUTOENCODER_LAYOUT, folder, mesh)
        return loaded

    def shapes(self) -> Params:
        """Returns shapes and dtypes of all parameters; touches no device."""
        return nnx.to_pure_dict(self.abstract)

    def drawn(self, params: Params) -> Params:
        """Returns the parts of a dict of all parameters that `init` draws."""
        return {name: part for name, part in params.items() if name not in self.config.folders}

    def loaded(self, params: Params) -> Params:
        """Returns the parts of a dict of all parameters that `load` reads."""
        return {name: part for name, part in params.items() if name in self.config.folders}

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits a dict like `init`'s into what is trained and what is frozen; `{**trained, **frozen}` is the whole."""
        frozen = {"text"} if self.config.text.frozen else set()
        return (
            {name: part for name, part in params.items() if name not in frozen},
            {name: part for name, part in params.items() if name in frozen},
        )

    def bind(self, params: Params) -> TextToImage:
        """Returns the model with these parameters, all of them."""
        return nnx.merge(self.graphdef, nnx.State(params))

    def shardings(self, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
        """Returns where each parameter lives; see `partitioning.param_shardings` for what it refuses."""
        return param_shardings(self.abstract, mesh)

    def denoiser_flops(self, mode: Mode) -> tuple[PartFlops, ...]:
        """Returns the denoiser's work on one image, forward."""
        return self.parts.denoiser.flops(mode, self.parts.text.widths, self.config.text_length)

    def forward_flops(self, mode: Mode) -> tuple[PartFlops, ...]:
        """Returns the work on one image and its caption, forward: the denoiser's and the encoders' that a step runs."""
        return (*self.denoiser_flops(mode), *self._encoder_flops(mode))

    def _encoder_flops(self, mode: Mode) -> tuple[PartFlops, ...]:
        text = self.parts.text.flops(self.config.caption_length, mode)
        if mode == "train" and self.config.text.encode == "prepared":
            text = PartFlops(text.name, 0.0, 0.0)
        if mode != "train" or self.config.public_autoencoder is None or self.config.reads_latents:
            return (text,)
        return text, self.parts.autoencoder.flops(self.config.image_size)

    def training_flops(self) -> float:
        """Returns an image's share of a step: forward, and twice that backward, but for encoders that are frozen.

        What remat computes again is not the model's and does not count, so a rate of these is a model FLOP/s
        (arXiv 2204.02311, appendix B).
        """
        text, *others = self._encoder_flops("train")
        untrained = total_flops([text, *others] if self.config.text.frozen else others)
        return 3 * total_flops(self.forward_flops("train")) - 2 * untrained


@functools.lru_cache(maxsize=16)  # tracing a large model takes a second, and a start asks for it several times
def make_system(config: SystemConfig) -> System:
    """Returns the structure of the model that `config` describes; allocates nothing."""
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: TextToImage(config, nnx.Rngs(0))), nnx.Param)
    return System(config, graphdef, abstract)


def image_groups(system: System) -> System:
    """Returns the system with groups of one image in sampling, so that no image depends on its neighbours."""
    config = system.config
    if not hasattr(config.model, "sampling_group"):  # a denoiser without experts
        return system
    model = dataclasses.replace(config.model, sampling_group="image")
    return make_system(dataclasses.replace(config, model=model))
