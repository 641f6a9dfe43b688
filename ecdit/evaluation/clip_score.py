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
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, read_clip_text
from ecdit.pretrained.clip_vision import CLIP_VISION_LAYOUT, ClipVision, cosines, normalise, read_clip_vision
from ecdit.pretrained.layout import Layout
from ecdit.pretrained.tokenizers import ClipTokenizer, Tokenizer
from ecdit.pretrained.weights import load_folder

PREFIX = "A photo depicts "  # of captions in Hessel's form


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both encoders of a CLIP, with weights."""

    image_size: int  # pixels
    caption_length: int  # tokens
    tokenizer: Tokenizer
    # (uint8[B, H, W, 3], int32[B, k, L]) -> float32[B, k], the cosines of an image and its k captions; compiled for
    # each B and k
    cosine: Callable[[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, "B k L"]], Float[Array, "B k"]]


def read_clip(folder: Path) -> Clip:
    """Returns the CLIP of a folder as transformers writes it, with its tokenizer's files; it computes in float32.

    Raises:
      WeightsError: the folder has no whole CLIP.
    """
    vision_config = read_clip_vision(folder, "float32")
    text_config = read_clip_text(folder, projection=True, states="last", dtype="float32")
    tokenizer = ClipTokenizer(folder, "open_clip")
    tokenizer.check_fits(text_config.vocab_size)
    vision = _load(lambda rngs: ClipVision(vision_config, rngs), CLIP_VISION_LAYOUT, folder)
    text = _load(lambda rngs: ClipText(text_config, text_config.positions, rngs), CLIP_TEXT_LAYOUT, folder)

    @jax.jit
    def cosine(params: Any, images: Array, tokens: Array) -> Array:
        image = nnx.merge(vision[0], nnx.State(params[0]))(normalise(images.astype(jnp.float32) / 255))
        encode = nnx.merge(text[0], nnx.State(params[1]))
        return jnp.stack([cosines(image, encode(tokens[:, k]).pooled) for k in range(tokens.shape[1])], axis=1)

    params = vision[1], text[1]
    return Clip(
        vision_config.image_size,
        text_config.positions,
        tokenizer,
        lambda images, tokens: cosine(params, images, tokens),
    )


def _load(make: Callable[[nnx.Rngs], nnx.Module], layout: Layout, folder: Path) -> tuple[nnx.GraphDef, dict[str, Any]]:
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return graphdef, load_folder(abstract, layout, folder, None).params


def clip_scores(clip: Clip, pairs: Iterable[tuple[Path, str]], batch_size: int) -> dict[str, Any]:
    """Returns the three forms over all pairs of an image file and its caption, and how many there are.

    Raises:
      UserError: there are none, or an image cannot be read.
    """
    found = []
    for batch in _batches(pairs, batch_size):
        images = np.stack([prepare(path, clip.image_size) for path, _ in batch])
        captions = [caption for _, caption in batch]
        filled = np.arange(batch_size) % len(batch)  # one size of batch is compiled
        both = [[prefix + caption for caption in captions] for prefix in ("", PREFIX)]
        tokens = np.stack([clip.tokenizer.encode(some, clip.caption_length).ids for some in both], axis=1)
        found.append(np.asarray(clip.cosine(images[filled], tokens[filled]), np.float64)[: len(batch)])
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
    """Returns an image's centre square at `size` pixels.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: {error}") from None
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _batches(pairs: Iterable[tuple[Path, str]], size: int) -> Iterator[Sequence[tuple[Path, str]]]:
    pairs = iter(pairs)
    while batch := list(islice(pairs, size)):
        yield batch
