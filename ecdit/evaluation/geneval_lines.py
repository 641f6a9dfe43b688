"""The lines that GenEval's scorer reads: an image's metadata and what a detector found in it."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ecdit.errors import UserError
from ecdit.evaluation.geneval import CLASSES, COLOURS, RELATIONS, Clause, DetectedImage, Verdict, judge
from ecdit.json_lines import at_line, is_number, read_lines, require, take


def judge_lines(path: Path) -> list[Verdict]:
    """Returns the verdict on each line {"filename", "metadata", "detections", "colors"} of a file, in its order.

    Raises:
      UserError: a line is unreadable, lacks a key or has a value that is not allowed; or a filename stands twice.
    """
    verdicts, seen = [], {}
    for number, values in read_lines(path):
        with at_line(path, number):
            verdict = judge(image_of(values))
            if verdict.filename in seen:
                raise UserError(f"filename = {verdict.filename!r}: stands in line {seen[verdict.filename]} already")
        seen[verdict.filename] = number
        verdicts.append(verdict)
    return verdicts


def image_of(values: dict[str, Any]) -> DetectedImage:
    """Returns the image that a line's object describes.

    Raises:
      UserError: a key is missing, or has a value that is not allowed.
    """
    metadata = take(values, "metadata", dict)
    _refuse_unknown("metadata.", metadata, ("tag", "include", "exclude", "prompt"))
    include = _clauses(metadata, "include", ("class", "count", "color", "position"))
    exclude = _clauses(metadata, "exclude", ("class", "count")) if "exclude" in metadata else ()
    require(bool(include or exclude), "metadata.include", [], "must ask for something")
    boxes = {}
    for name, found in take(values, "detections", dict).items():
        _require_class("detections", name)
        boxes[name] = _boxes(f"detections.{name}", found)
    colours = {} if "colors" not in values else take(values, "colors", dict)
    for name, found in colours.items():
        _require_class("colors", name)
        _check_colours(f"colors.{name}", found, len(boxes.get(name, ())))
    return DetectedImage(
        filename=take(values, "filename", str),
        tag=take(metadata, "tag", str, "metadata."),
        prompt=take(metadata, "prompt", str, "metadata."),
        include=include,
        exclude=exclude,
        boxes=boxes,
        colours=colours,
    )


def _clauses(metadata: dict[str, Any], key: str, known: tuple[str, ...]) -> tuple[Clause, ...]:
    clauses = []
    for i, values in enumerate(take(metadata, key, list, "metadata.")):
        name = f"metadata.{key}[{i}]"
        require(isinstance(values, dict), name, values, "must be an object")
        _refuse_unknown(f"{name}.", values, known)
        _require_class(f"{name}.class", take(values, "class", str, f"{name}."))
        count = take(values, "count", int, f"{name}.")
        require(count >= 1, f"{name}.count", count, "must be 1 or more")
        colour, relation, target = values.get("color"), None, 0
        if "color" in values:
            require(colour in COLOURS, f"{name}.color", colour, f"must be one of {', '.join(COLOURS)}")
        if "position" in values:
            relation, target = _position(f"{name}.position", values["position"], i)
        clauses.append(Clause(values["class"], count, colour, relation, target))
    return tuple(clauses)


def _refuse_unknown(inside: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in values:  # a claim that is misspelt would be ignored, and the image pass
        require(key in known, f"{inside}{key}", values[key], f"unknown key; there are {', '.join(known)}")


def _position(name: str, value: Any, index: int) -> tuple[str, int]:
    """Returns the relation and the number of the clause that it refers to, which must come before clause `index`."""
    valid = isinstance(value, list) and len(value) == 2 and value[0] in RELATIONS
    valid = valid and type(value[1]) is int and 0 <= value[1] < index
    allowed = f"must be [relation, number of an earlier clause]; relations: {', '.join(RELATIONS)}"
    require(valid, name, value, allowed)
    return value[0], value[1]


def _require_class(key: str, name: str) -> None:
    require(name in CLASSES, key, name, f"unknown class; GenEval's spellings are {', '.join(CLASSES)}")


def _boxes(name: str, found: Any) -> Float32[np.ndarray, "n 5"]:
    require(isinstance(found, list), name, found, "must be a list of [x1, y1, x2, y2, score]")
    for i, box in enumerate(found):
        valid = isinstance(box, list) and len(box) == 5 and all(map(is_number, box))
        require(valid, f"{name}[{i}]", box, "must be five numbers, [x1, y1, x2, y2, score]")
    with np.errstate(over="ignore"):
        boxes = np.array(found, np.float64).reshape(-1, 5).astype(np.float32)
    require(bool(np.isfinite(boxes).all()), name, found, "must be numbers that float32 holds")
    return boxes


def _check_colours(name: str, found: Any, num_boxes: int) -> None:
    require(isinstance(found, list), name, found, "must be a list with a colour or null for each box")
    require(len(found) == num_boxes, name, found, f"must have one entry for each of {num_boxes} boxes")
    for i, colour in enumerate(found):
        known = colour is None or colour in COLOURS
        require(known, f"{name}[{i}]", colour, f"must be null or one of {', '.join(COLOURS)}")
