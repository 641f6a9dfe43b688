"""The three parts of a text-to-image model as protocols: denoiser, text encoder, autoencoder.

Trainer, sampler, planner and counters know a model by these protocols alone. The paper's denoiser is
`models.dit.DiT`; a user's own is a class in a file of theirs, which the config names as `FILE.py:Class`. All parts
are `flax.nnx` modules whose parameters name their logical axes (`models.layers.param`).

Axes: B batch, h w c a latent's height, width and channels, N tokens that the loss is weighted by, L text tokens,
t text width, p width of the pooled text, H W an image's height and width in pixels.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key

# "inspect" samples in the same way and reports which expert took which token.
Mode = Literal["train", "sample", "inspect"]
Metrics = dict[str, Array]


class TextStates(NamedTuple):
    """An encoded caption."""

    states: Float[Array, "B L t"]
    mask: Bool[Array, "B L"]  # False on padding; never False for a whole row
    pooled: Float[Array, "B p"]


class TextWidths(NamedTuple):
    """The widths of what a text encoder gives of a caption, which a public one may have different."""

    states: int  # t
    pooled: int  # p


class Prediction(NamedTuple):
    """The result of a denoiser."""

    velocity: Float[Array, "B h w c"]  # float32
    # How much the error on each token counts, 0 to 1: 0 on tokens that the denoiser did not see. N is a square number;
    # tokens are square patches of the latent in raster order.
    loss_weights: Float[Array, "B N"]
    auxiliary_loss: Float[Array, ""]  # is added to the flow's loss as it is: weights are the denoiser's own; float32
    # In training what to report: a number, or one a layer; microbatches are averaged, except that of a name that ends
    # in `_most` the largest counts. In sampling `experts_per_token`, int32[layers, B, N], where experts are counted; in
    # mode "inspect" also `expert_gates`, float32[layers, B, N, E], above 0 exactly where the expert took the token.
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class PartFlops:
    """The work of one part of a model on one image, forward."""

    name: str
    tokens: float  # rows of its inputs (image or text tokens, slots of experts, vectors), summed over its layers
    flops: float


def total_flops(parts: Iterable[PartFlops]) -> float:
    """Returns the sum over all parts."""
    return sum(part.flops for part in parts)


class DenoiserConfig(Protocol):
    """The fields that every denoiser's config has; it is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def latent_size(self) -> int:
        """Returns the side of the square latent, in latent pixels."""
        ...

    @property
    def latent_channels(self) -> int:
        """Returns the number of channels of the latent."""
        ...

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Returns the dtype of activations."""
        ...


class Denoiser(Protocol):
    """Predicts the velocity of noisy latents; made as `Class(config, text_widths, rngs)`.

    Its methods but `__call__` read the config alone, never parameters, so that they work on a model of abstract shapes.
    `WithoutExperts` has all of them but `flops` for a denoiser whose images do not meet.
    """

    Config: ClassVar[type]  # its DenoiserConfig, as which the group `model` of the config file is read

    def __init__(self, config: Any, text_widths: TextWidths, rngs: nnx.Rngs): ...

    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        time: Float[Array, " B"],
        text: TextStates,
        size_crop: Float[Array, "B 4"],
        mask_keys: Key[Array, " B"] | None,
        mode: Mode,
    ) -> Prediction:
        """Predicts the velocity.

        Args:
          latents: x_t, noise at time 1, float32.
          time: in [0, 1], float32.
          text: the encoded captions.
          size_crop: the original's height and width, the crop's top and left, in pixels.
          mask_keys: of each image, for dropping tokens at random; None to drop none.
          mode: whether images compete for experts as in training or as in sampling.
        """
        ...

    def images_together(self, mode: Mode) -> int:
        """Returns how many consecutive images must stay on one device, because they compete for experts."""
        ...

    def check_layout(self, mesh: Mesh | AbstractMesh, images: int, mode: Mode) -> None:
        """Raises ConfigError if it cannot run on the mesh with so many images a device."""
        ...

    def flops(self, mode: Mode, text_widths: TextWidths, text_length: int) -> tuple[PartFlops, ...]:
        """Returns what one forward pass does for one image, part by part; in training with tokens dropped."""
        ...

    def idle_params(self) -> int:
        """Returns how many parameters do not work on a token, on average over tokens."""
        ...

    def counts_experts(self) -> bool:
        """Returns whether `Prediction.metrics` has `experts_per_token` in sampling (and `expert_gates` if asked)."""
        ...

    def gradient_metrics(self, gradients: dict[str, Any]) -> Metrics:
        """Returns what to report of its parameters' gradients, nested as the parameters are."""
        ...


class WithoutExperts:
    """The methods of a `Denoiser` that is dense, and in which no image depends on another."""

    def images_together(self, mode: Mode) -> int:
        """Returns 1."""
        return 1

    def check_layout(self, mesh: Mesh | AbstractMesh, images: int, mode: Mode) -> None:
        """Accepts every mesh."""

    def idle_params(self) -> int:
        """Returns 0."""
        return 0

    def counts_experts(self) -> bool:
        """Returns False."""
        return False

    def gradient_metrics(self, gradients: dict[str, Any]) -> Metrics:
        """Reports nothing."""
        return {}


class TextEncoder(Protocol):
    """Captions to states; made as `Class(config, max_length, rngs)`."""

    @property
    def widths(self) -> TextWidths:
        """Returns the widths of states and pooled state."""
        ...

    def __call__(self, tokens: Int[Array, "B L"], mode: Mode = "sample") -> TextStates:
        """Encodes captions: int32 ids, padded at the end. In training it may pack them, which rounds differently."""
        ...

    def check_layout(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ConfigError if it cannot run on the mesh."""
        ...

    def flops(self, length: int, mode: Mode = "sample") -> PartFlops:
        """Returns its work on one caption of `length` tokens, forward: with its padding, unless it packs captions."""
        ...


class Autoencoder(Protocol):
    """Images to latents and back. Pixels are float32 in [-1, 1]."""

    downsampling: int  # pixels along a side for each latent pixel

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns height, width and channels of the latents of square images of `image_size` pixels."""
        ...

    def encode(self, content: Float[Array, "B H W k"], keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
        """Encodes images, float32[B, H, W, 3]; `keys` are for latents that are drawn from a posterior.

        Where the data holds prepared latents `content` is their means and log variances, side by side.
        """
        ...

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Decodes latents."""
        ...

    def flops(self, image_size: int) -> PartFlops:
        """Returns the work of `encode` on one image of `image_size` pixels."""
        ...
