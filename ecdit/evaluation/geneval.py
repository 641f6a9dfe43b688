"""GenEval: does an image show the objects, counts, colours and positions that its prompt names?

Ghosh, Hajishirzi, Schmidt: GenEval (arXiv 2310.11513). The rules are those of evaluation/evaluate_images.py and
evaluation/summary_scores.py of github.com/djghosh13/geneval at commit af4902f, with its default options. They are
applied to detections of any detector; the original's are Mask2Former's, and its colours are CLIP's.

Arithmetic is in float32, because the original's boxes are: a score of float32(0.3) is no score above 0.3, though it is
0.30000001. Differences on purpose:
- Relations that hold together are named in the order of RELATIONS; the original joins a Python set, in any order.
- Metadata that the original would ignore or fail on is refused when it is read (`geneval_lines`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int

from ecdit.errors import UserError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD = 0.3  # a detection counts if its score is larger
COUNTING_THRESHOLD = 0.9  # in the task "counting"
MAX_OBJECTS = 16  # objects of a class that count, those with the highest scores
POSITION_THRESHOLD = 0.1  # share of the summed sizes by which offsets are shortened
# evaluation/object_names.txt: COCO's classes in GenEval's own spelling.
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,
knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
)


@dataclasses.dataclass(frozen=True)
class Clause:
    """A prompt's demand on one class: at least (or, excluded, fewer than) `count` objects."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None  # to each object that clause number `target` found
    target: int = 0


@dataclasses.dataclass(frozen=True)
class DetectedImage:
    """An image's prompt and detections. Boxes are rows (x1, y1, x2, y2, score), in any order."""

    filename: str
    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    boxes: Mapping[str, Float32[np.ndarray, "n 5"]]
    colours: Mapping[str, Sequence[str | None]]  # colour of each box in the same order; None is none of COLOURS


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says whether an image is right, and why not, one reason per line."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str


def confident(scores: Float32[np.ndarray, " n"], tag: str) -> Int[np.ndarray, " k"]:
    """Returns the detections of a class that count: highest score first, above the threshold, at most MAX_OBJECTS.

    Boxes that overlap, even exact duplicates, all count: the original's suppression is off by default. Equal scores
    come in the order of the original's call, which NumPy does not define: the last one first in short lists on most
    machines.
    """
    order = np.argsort(scores)[::-1]
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    return order[scores[order] > threshold][:MAX_OBJECTS]


def relations(box: Float32[np.ndarray, "5"], target: Float32[np.ndarray, "5"]) -> list[str]:
    """Returns the relations of RELATIONS that hold of a box to a target: none, one or two.

    With o the offset of the centres, r = sign(o) max(|o| - 0.1 (size + target size), 0). Nothing holds if |r| < 1e-3 on
    both axes; otherwise a relation holds where r / |o| is beyond 0.5 on its axis. y grows downwards.
    """
    corners = np.stack([box, target])[:, :4].reshape(2, 2, 2)  # [which, corner, axis]
    centres = corners.mean(axis=1)
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    slack = np.float32(POSITION_THRESHOLD) * (sizes[0] + sizes[1])
    revised = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return []
    dx, dy = revised / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return [relation for relation, held in zip(RELATIONS, holds, strict=True) if held]


def judge(image: DetectedImage) -> Verdict:
    """Judges an image: each included clause must be met, and no excluded one.

    Raises:
      UserError: a clause asks for the colour of a class whose colours are not there.
    """
    asked = {clause.name for clause in (*image.include, *image.exclude)} & set(image.boxes)
    kept = {name: confident(image.boxes[name][:, 4], image.tag) for name in asked}
    reasons, groups = [], []  # groups has, for each clause so far, its boxes, or None if it is not met
    for clause in image.include:
        best = kept.get(clause.name, np.zeros(0, int))[: clause.count]
        found = image.boxes[clause.name][best] if len(best) else np.zeros((0, 5), np.float32)
        wrong = _wrong_number(clause, len(best)) or _wrong_colour(clause, image, best)
        wrong = wrong or _wrong_position(clause, found, groups)
        groups.append(None if wrong else found)
        reasons += [wrong] if wrong else []
    for clause in image.exclude:
        if (number := len(kept.get(clause.name, ()))) >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {number}")
    return Verdict(image.filename, image.tag, image.prompt, not reasons, "\n".join(reasons))


def _wrong_number(clause: Clause, number: int) -> str:
    """Returns why `number` objects are too few, or "". More than the count are correct."""
    return f"expected {clause.name}>={clause.count}, found {number}" if number < clause.count else ""


def _wrong_colour(clause: Clause, image: DetectedImage, best: Int[np.ndarray, " k"]) -> str:
    """Returns why the best boxes do not have the colour that the clause asks for, or ""."""
    if clause.colour is None:
        return ""
    if clause.name not in image.colours:
        raise UserError(f"colors.{clause.name} is missing: must be a list with a colour or null for each box")
    colours = [image.colours[clause.name][box] for box in best]
    number = colours.count(clause.colour)
    if number >= clause.count:
        return ""
    seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
    return f"expected {clause.colour} {clause.name}>={clause.count}, found {number} {clause.colour}; and {seen}"


def _wrong_position(clause: Clause, found: Float32[np.ndarray, "k 5"], groups: Sequence[np.ndarray | None]) -> str:
    """Returns why the first pair of box and target that fails does not stand as the clause asks for; or ""."""
    if clause.relation is None:
        return ""
    targets = groups[clause.target]
    if targets is None:
        return f"no target for {clause.name} to be {clause.relation}"
    for box in found:
        for target in targets:
            held = relations(box, target)
            if clause.relation not in held:
                return f"expected {clause.name} {clause.relation} target, found {' and '.join(held)} target"
    return ""


def summarize(verdicts: Iterable[Verdict]) -> dict:
    """Returns the share of correct images of each task, and `overall`, their mean, not weighted by tasks' sizes."""
    tasks: dict[str, list[bool]] = {}
    for verdict in verdicts:
        tasks.setdefault(verdict.tag, []).append(verdict.correct)
    shares = {tag: float(np.mean(correct)) for tag, correct in tasks.items()}
    return {"tasks": shares, "overall": float(np.mean(list(shares.values())))}
