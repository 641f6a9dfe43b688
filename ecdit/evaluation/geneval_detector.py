"""GenEval's detector: Mask2Former's instances, with the steps around the network as the original's library takes them.

The original (github.com/djghosh13/geneval at commit af4902f) runs mmdet 2's Mask2Former, Swin-S, trained on COCO's
instances. What mmdet does before and after the network (the test pipeline of its config, and MaskFormerFusionHead) is
done here in NumPy. The network is transformers' (extra `evaluation`). Differences:

- the weights that transformers has are those of Mask2Former's authors and not mmdet's own of the same architecture;
- OpenCV resizes bytes in fixed point, here they are resized in floating point and then rounded, so that a byte can
  differ by one.

Axes: q queries, C classes, n instances, h w height and width.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from ecdit.errors import UserError
from ecdit.evaluation.geneval import CLASSES
from ecdit.evaluation.resizing import bilinear, resized
from ecdit.pretrained.config_json import WeightsError, read_config
from ecdit.pretrained.safetensors_folder import weight_files

SHORTEST, LONGEST = 800, 1333  # pixels: an image's sides are scaled to at most these
DIVISOR = 32  # of the padded sides
PADDING = 128
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_INSTANCES = 100
# COCO's spellings where GenEval has its own.
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
# Classes that all lists of COCO's names spell alike; some have "aeroplane", "sofa" or "tvmonitor".
SPELLED_ALIKE = ("person", "car", "bus", "stop sign", "dog", "apple", "pizza", "computer mouse", "book", "toothbrush")

# (float32[1, 3, h, w]) -> (class logits [q, C + 1], mask logits [q, h / 4, w / 4]); the last class is "no object"
Network = Callable[
    [Float32[np.ndarray, "1 3 h w"]], tuple[Float32[np.ndarray, "q classes"], Float32[np.ndarray, "q y x"]]
]


@dataclasses.dataclass(frozen=True)
class Instances:
    """Holds what the detector found in an image, in no order."""

    boxes: Float32[np.ndarray, "n 5"]  # x1, y1, x2, y2 in pixels, exclusive, and the score
    classes: Int[np.ndarray, " n"]  # places in CLASSES
    queries: Int[np.ndarray, " n"]  # whose mask it is
    masks: Mapping[int, Bool[np.ndarray, "h w"]]  # by query


def read_detector(folder: Path, device: str) -> Network:
    """Returns the network in a folder that transformers has written.

    Raises:
      WeightsError: the folder has no whole Mask2Former of COCO's 80 classes in safetensors.
      UserError: a package is missing.
    """
    config = read_config(folder, ("mask2former",), "model_type", {})
    _check_labels(config.path, config.values.get("id2label"))
    weight_files(folder)  # it refuses pickles
    torch, model_class = _library("torch"), _library("transformers", "Mask2FormerForUniversalSegmentation")
    try:
        model, loading = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder}: transformers cannot read it: {error}") from None
    # transformers only warns of tensors that are missing, and draws them at random.
    if lost := sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])]):
        raise WeightsError(f"{folder}: {len(lost)} tensors are missing or of another shape, such as {lost[0]}")
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device}: PyTorch cannot use it: {error}") from None

    def network(pixels: Float32[np.ndarray, "1 3 h w"]) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            found = model(pixel_values=torch.from_numpy(pixels).to(device))
        return found.class_queries_logits[0].cpu().numpy(), found.masks_queries_logits[0].cpu().numpy()

    return network


def _library(name: str, part: str = "") -> Any:
    try:
        module = importlib.import_module(name)
        return getattr(module, part) if part else module  # transformers imports a part when it is asked for
    except ImportError as error:
        raise UserError(f"the detector needs {name}: pip install 'ecdit[evaluation]' ({error})") from None


def _check_labels(path: Path, labels: Any) -> None:
    """Raises WeightsError unless the labels are COCO's 80 things in COCO's order."""
    if not isinstance(labels, dict) or len(labels) != len(CLASSES):
        count = len(labels) if isinstance(labels, dict) else "no"
        raise WeightsError(f"{path}: id2label has {count} classes; it must have COCO's {len(CLASSES)} instances")
    for name in SPELLED_ALIKE:
        place = CLASSES.index(name)
        found, wanted = labels.get(str(place)), COCO_NAMES.get(name, name)
        if found not in (name, wanted):
            raise WeightsError(f"{path}: id2label.{place} = {found!r}: must be {wanted!r}, as in COCO's order")


def detect(network: Network, image: UInt8[np.ndarray, "h w 3"]) -> Instances:
    """Returns the instances in an image."""
    pixels, inside = prepare(image)
    class_logits, mask_logits = network(pixels)
    return instances(class_logits, mask_logits, pixels.shape[2:], inside, image.shape[:2])


def prepare(image: UInt8[np.ndarray, "h w 3"]) -> tuple[Float32[np.ndarray, "1 3 H W"], tuple[int, int]]:
    """Returns the network's input, and how much of its height and width the image takes; the rest is padding."""
    height, width = image.shape[:2]
    scale = min(LONGEST / max(height, width), SHORTEST / min(height, width))
    inside = int(height * scale + 0.5), int(width * scale + 0.5)
    rows, columns = (bilinear(before, after) for before, after in zip(image.shape[:2], inside, strict=True))
    # Halves are made exact first, so that the order of a sum, another on each machine, does not decide how they round.
    smooth = np.rint(np.round(resized(image.astype(np.float64), rows, columns), 6))
    missing = [(0, -side % DIVISOR) for side in inside]
    padded = np.pad(smooth, [*missing, (0, 0)], constant_values=PADDING)
    mean, deviation = (np.array(values)[None, None] for values in (MEAN, DEVIATION))
    normalised = ((padded - mean) / deviation).astype(np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None]), inside


def instances(
    class_logits: Float32[np.ndarray, "q classes"],
    mask_logits: Float32[np.ndarray, "q y x"],
    padded: tuple[int, ...],
    inside: tuple[int, ...],
    size: tuple[int, ...],
) -> Instances:
    """Returns the instances of the network's outputs.

    The MAX_INSTANCES most probable pairs of query and class are instances, so that a query can be several. The score is
    the class's probability times the mean probability of the mask's pixels, those above one half.

    Args:
      class_logits: the last class is "no object".
      mask_logits: of a part of the padded input's pixels.
      padded: height and width of the network's input.
      inside: the part of it that is image.
      size: the image's own height and width.
    """
    shifted = np.exp(class_logits - class_logits.max(axis=1, keepdims=True))
    scores = (shifted / shifted.sum(axis=1, keepdims=True))[:, :-1].reshape(-1)
    best = np.argsort(-scores, kind="stable")[:MAX_INSTANCES]
    queries, classes = np.divmod(best, class_logits.shape[1] - 1)
    # Mask logits are enlarged to the padded input, cut where the image ends, and resized to the image.
    rows, columns = (
        (bilinear(cut, last) @ bilinear(small, whole)[:cut]).astype(np.float32)
        for small, whole, cut, last in zip(mask_logits.shape[1:], padded, inside, size, strict=True)
    )
    masks, boxes = {}, {}
    for query in sorted(set(queries.tolist())):
        logits = rows @ mask_logits[query] @ columns.T
        masks[query] = logits > 0
        boxes[query] = np.array([*_bounds(masks[query]), _mean_probability(logits, masks[query])], np.float32)
    found = np.stack([boxes[query] for query in queries.tolist()])
    found[:, 4] *= scores[best]
    return Instances(found, classes, queries, masks)


def _bounds(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Returns x1, y1, x2, y2 of a mask, exclusive; zeros if it is empty."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return (int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1) if len(x) else (0, 0, 0, 0)


def _mean_probability(logits: Float32[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> float:
    inside = logits[mask]
    return float((1 / (1 + np.exp(-inside))).sum() / (len(inside) + 1e-6))
