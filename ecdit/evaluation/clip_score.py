"""CLIP score: how near an image and its caption are in CLIP's embedding (arXiv 2103.00020), in three published forms.

    cosine        mean cosine
    torchmetrics  100 x mean cosine, and 0 where that is below 0, as torchmetrics' CLIPScore
    hessel        mean of 2.5 max(cosine, 0) of captions after "A photo depicts " (arXiv 2104.08718)

Images are prepared as OpenCLIP does: the shortest side to the encoder's size, bicubic with antialiasing; the centre
square; channels normalised. Captions that are too long are cut before their end token, as OpenCLIP does; torchmetrics
cuts the end token off, so its number differs for those. Which CLIP computes the score decides the number.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from ecdit.errors import UserError
from ecdit.evaluation.image_files import read_image
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, read_clip_text
from ecdit.pretrained.clip_vision import CLIP_VISION_LAYOUT, ClipVision, cosines, normalise, read_clip_vision
from ecdit.pretrained.layout import Layout
from ecdit.pretrained.tokenizers import ClipTokenizer, Tokenizer
from ecdit.pretrained.weights import load_folder
from ecdit.progress import each

PREFIX = "A photo depicts "  # of captions in Hessel's form


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A CLIP's image encoder, with weights."""

    image_size: int  # pixels
    # uint8[B, H, W, 3] -> float32[B, p], not normalised; compiled for each B
    see: Callable[[UInt8[np.ndarray, "B H W 3"]], Float[Array, "B p"]]


@dataclasses.dataclass(frozen=True)
class Clip(ImageEncoder):
    """Both encoders of a CLIP, with weights."""

    caption_length: int  # tokens
    tokenizer: Tokenizer
    # int32[B, L] -> float32[B, p], not normalised; compiled for each B
    read: Callable[[Int[np.ndarray, "B L"]], Float[Array, "B p"]]


def read_image_encoder(folder: Path) -> ImageEncoder:
    """Returns the image encoder of a folder as transformers writes it, alone or in a CLIP; it computes in float32.

    Raises:
      WeightsError: the folder has no whole image encoder.
    """
    config = read_clip_vision(folder, "float32")
    graphdef, params = _load(lambda rngs: ClipVision(config, rngs), CLIP_VISION_LAYOUT, folder)

    @jax.jit
    def see(params: Any, images: Array) -> Array:
        return nnx.merge(graphdef, nnx.State(params))(normalise(images.astype(jnp.float32) / 255))

    return ImageEncoder(config.image_size, lambda images: see(params, images))


def read_clip(folder: Path) -> Clip:
    """Returns the CLIP of a folder as transformers writes it, with its tokenizer's files; it computes in float32.

    Raises:
      WeightsError: the folder has no whole CLIP.
    """
    config = read_clip_text(folder, projection=True, states="last", dtype="float32")
    tokenizer = ClipTokenizer(folder, "open_clip")
    tokenizer.check_fits(config.vocab_size)
    image = read_image_encoder(folder)
    graphdef, params = _load(lambda rngs: ClipText(config, config.positions, rngs), CLIP_TEXT_LAYOUT, folder)

    @jax.jit
    def read(params: Any, tokens: Array) -> Array:
        return nnx.merge(graphdef, nnx.State(params))(tokens).pooled

    return Clip(image.image_size, image.see, config.positions, tokenizer, lambda tokens: read(params, tokens))


def _load(make: Callable[[nnx.Rngs], nnx.Module], layout: Layout, folder: Path) -> tuple[nnx.GraphDef, dict[str, Any]]:
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return graphdef, load_folder(abstract, layout, folder, None).params


def clip_scores(clip: Clip, pairs: Iterable[tuple[Path, str]], batch_size: int) -> dict[str, Any]:
    """Returns the three forms over all pairs of an image file and its caption, and how many there are.

    Raises:
      UserError: there are none, an image cannot be read, or a cosine is not finite.
    """
    found, batches = [], list(_batches(pairs, batch_size))
    for batch in each(batches, "scoring", "batches", len(batches)):
        images = np.stack([prepare(path, clip.image_size) for path, _ in batch])
        captions = [caption for _, caption in batch]
        filled = np.arange(batch_size) % len(batch)  # one size of batch is compiled
        both = [[prefix + caption for caption in captions] for prefix in ("", PREFIX)]
        tokens = [clip.tokenizer.encode(some, clip.caption_length).ids for some in both]
        seen = clip.see(images[filled])
        cosine = np.stack([cosines(seen, clip.read(some[filled])) for some in tokens], axis=1)
        cosine = cosine.astype(np.float64)[: len(batch)]
        wrong = np.flatnonzero(~np.isfinite(cosine).all(axis=1))
        if len(wrong):
            path, caption = batch[wrong[0]]
            raise UserError(f"{path}: its cosine with {caption!r} is not finite; CLIP's weights may be damaged")
        found.append(cosine)
    if not found:
        raise UserError("there is no image to score")
    plain, prefixed = np.concatenate(found).T
    return {**forms(plain, prefixed), "images": len(plain)}


def forms(cosine: Float[np.ndarray, " n"], prefixed: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Returns the three forms from the cosines of images and captions, plain and after PREFIX."""
    mean = float(cosine.mean())
    hessel = float(2.5 * np.maximum(prefixed, 0).mean())
    return {"cosine": mean, "torchmetrics": max(100 * mean, 0.0), "hessel": hessel}


def prepare(path: Path, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a file's image as `centre_square` prepares it.

    Raises:
      UserError: it cannot be read.
    """
    return centre_square(Image.fromarray(read_image(path)), size)


def centre_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the centre square of an RGB image whose shortest side is resized to `size` pixels."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _batches(pairs: Iterable[tuple[Path, str]], size: int) -> Iterator[Sequence[tuple[Path, str]]]:
    pairs = iter(pairs)
    while batch := list(islice(pairs, size)):
        yield batch
