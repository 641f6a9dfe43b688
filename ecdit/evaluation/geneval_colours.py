"""GenEval's colours: CLIP's choice among ten for an object that is cut out of its image.

The rule is that of color_classification in github.com/djghosh13/geneval at commit af4902f with its default options. Its
CLIP is OpenAI's ViT-L/14. The object's box, grey (#999) outside the object's mask, is prepared as OpenCLIP prepares
images. A colour's embedding is the mean of three captions' normalised embeddings.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32
from PIL import Image

from ecdit.errors import UserError
from ecdit.evaluation.clip_score import Clip, centre_square
from ecdit.evaluation.geneval import COLOURS, MAX_OBJECTS
from ecdit.evaluation.geneval_images import Classifier

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = "#999"


def colour_classifier(clip: Clip) -> Classifier:
    """Returns a function that names the colours of at most MAX_OBJECTS objects of a class.

    The function raises UserError for an embedding that is not finite.
    """
    known: dict[str, np.ndarray] = {}

    def classify(
        image: Image.Image, boxes: Float32[np.ndarray, "n 5"], masks: Sequence[Bool[np.ndarray, "h w"]], name: str
    ) -> list[str | None]:
        if name not in known:
            known[name] = colour_embeddings(clip, name)
        crops = [cut_out(image, box, mask) for box, mask in zip(boxes, masks, strict=True)]
        prepared = np.stack([centre_square(crop, clip.image_size) for crop in crops])
        filled = prepared[np.arange(MAX_OBJECTS) % len(prepared)]  # one size of batch is compiled
        similar = normalised(np.asarray(clip.see(filled)))[: len(prepared)] @ known[name].T
        if not np.isfinite(similar).all():  # the largest of NaN would be the first colour
            raise UserError(f"the embedding of a {name} by --clip is not finite; its weights may be damaged")
        return [COLOURS[place] for place in similar.argmax(axis=1).tolist()]

    return classify


def colour_embeddings(clip: Clip, name: str) -> Float[np.ndarray, "10 p"]:
    """Returns an embedding of length 1 for each of COLOURS on a class."""
    captions = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
    encoded = np.asarray(clip.read(clip.tokenizer.encode(captions, clip.caption_length).ids))
    return normalised(normalised(encoded).reshape(len(COLOURS), len(TEMPLATES), -1).mean(axis=1))


def cut_out(image: Image.Image, box: Float32[np.ndarray, "5"], mask: Bool[np.ndarray, "h w"]) -> Image.Image:
    """Returns the box of an image, grey where the mask is false."""
    blank = Image.new("RGB", image.size, BACKGROUND)
    x1, y1, x2, y2 = (round(side) for side in box[:4].tolist())
    return Image.composite(image, blank, Image.fromarray(mask)).crop((x1, y1, x2, y2))


def normalised(rows: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """Returns rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
